"""The HTML page: every plot and picture is there, whole, needs no other file, and shows names as they are."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from castling_det.report.attention_maps import AttentionPicture
from castling_det.report.build import build_report, comparison_pictures
from castling_det.report.evaluation import Annotations
from castling_det.report.figures import Row
from castling_det.report.records import Report, RunRecord, Series, read_report
from castling_det.report.render import html_page, write_report
from castling_det.report.runs import RunSpec
from tests.report.conftest import Demo, Tool
from tests.report.samples import dump, make_report, make_run, write_data, write_demo, write_predictions
from tools.report import read_pictures

VOID = {"meta", "img", "br", "link", "hr", "input"}
PLOTS = [
    "mAP over multiply-adds", "mAP over latency", "Where the multiply-adds are", "tree", "Loss",
    "Accuracy on the validation images", "Share of the attention weights above the threshold",
    "Share of the probability that they hold",
]  # fmt: skip


class Page(HTMLParser):
    """Collects what a browser would load, draw or run, and checks that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.photographs: list[str] = []
        self.plots: dict[str, str] = {}
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.references: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.tags.add(tag)
        self.attributes |= values.keys()
        self.references += [values[key] for key in ("src", "href", "srcset", "data") if key in values]
        if values.get("class") == "plot":
            body = values["src"].removeprefix("data:image/svg+xml;base64,")
            self.plots[values["alt"]] = base64.b64decode(body).decode()
        elif tag == "img":
            self.photographs.append(values["src"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def drawn(self, plot: str) -> str:
        """The text in a plot; fails if it is no XML."""
        return " ".join(ElementTree.fromstring(self.plots[plot]).itertext())


def decoded(uri: str) -> Image.Image:
    head, _, body = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(body, validate=True)))
    picture.load()
    return picture


def test_the_page_shows_every_plot_and_picture_and_needs_nothing_else(demo_page: str) -> None:
    page = Page(demo_page)
    assert list(page.plots) == PLOTS and len(page.photographs) == 3 * 3
    assert all(decoded(uri).size == (512, 512) for uri in page.photographs)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "svg"})
    assert all(reference.startswith("data:image/") for reference in page.references)
    assert not re.search(r"https?:|@import|url\(", demo_page)
    assert "empty from 160" in page.drawn(PLOTS[6]) and "From iteration 160 on no layer keeps anything" in page.text
    assert "noise & <boxes>" in page.text, "text is escaped, not interpreted"
    assert "score of at least 0.3" in page.text and "at least 0.5" in page.text
    assert "1 right, 0 wrong, 2 missed" in page.text and "3 right, 0 wrong, 0 missed" in page.text
    words = " ".join(page.text.split())
    assert words.index("F1 of deploy 0.50 above softmax") < words.index("Every run")


def test_a_run_has_one_colour_everywhere(demo_page: str) -> None:
    page = Page(demo_page)
    row = re.search(r"background:(#\w{6})\"></span>softmax</td>", demo_page)
    assert row is not None
    assert all(row[1] in page.plots[name] for name in PLOTS[:6])


def test_pictures_are_the_ones_of_their_side(demo: Demo) -> None:
    row = demo.pictures[0]

    def has(picture: Image.Image, color: tuple[int, int, int]) -> bool:
        return color in {pixel for _, pixel in picture.getcolors(1 << 20) or []}

    missed, right, truth = (255, 242, 0), (76, 195, 255), (255, 255, 255)
    assert has(row.baseline, missed) and has(row.baseline, right)
    assert has(row.deployed, right) and not has(row.deployed, missed)
    assert has(row.truth, truth) and not has(row.truth, right)


def test_any_mmdet_run_without_attention_and_mask_has_a_page() -> None:
    loss = Series((10, 20), (2.0, 1.0))
    page = Page(html_page(make_report(*(make_run(name, None, 0.2, loss=loss) for name in ("softmax", "deploy")))))
    assert list(page.plots) == ["Loss"] and "No pictures" in page.text and "vanishes" not in page.text


def test_a_detector_that_scores_zero_is_drawn() -> None:
    page = Page(html_page(make_report(make_run("softmax", 0, 0.2, gmacs=1.0), make_run("deploy", 0, 0.0, gmacs=1.0))))
    assert "softmax" in page.drawn(PLOTS[0]) and "deploy" in page.drawn(PLOTS[0])


def test_pictures_of_the_attention_are_shown_by_name(demo: Demo, tmp_path: Path) -> None:
    for name, width, caption in (("b", 30, "blocks.1, <mode> 'linear'"), ("a", 20, "blocks.0, cos/π")):
        AttentionPicture(Image.new("RGB", (width, 8), (200, 10, 10)), caption).save(tmp_path / f"{name}.png")
    assert [picture.caption for picture in read_pictures(tmp_path / "b.png")] == ["blocks.1, <mode> 'linear'"]
    write_report(tmp_path / "out", demo.report, demo.pictures, read_pictures(tmp_path))
    page = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    shown = [decoded(uri) for uri in page.photographs[9:]]
    assert [picture.size for picture in shown] == [(20, 8), (30, 8)] and abs(shown[0].getpixel((10, 4))[0] - 200) < 12
    assert page.text.index("cos/π") < page.text.index("blocks.1, <mode> 'linear'")
    Image.new("RGB", (3, 3)).save(tmp_path / "c.png")
    for place, message in ((".", "c.png: has no caption"), ("out", "no .png"), ("x", "no such")):
        with pytest.raises(ValueError, match=message):
            read_pictures(tmp_path / place)


HOSTILE = [
    '"><script>alert(1)</script>', "'><img src=x onerror=alert(1)>", "</style><script>x</script>", r"\d\1\g<0>\ ",
    "$\\frac{a}", "_hidden", "{{ 7*7 }}{% raw %}", "a\x00\x1b[31mb\x7f", "<!--", "]]>&amp;&lt;", "a|b `c` <b>",
    "\u202eabc", "é漢字🌲" * 40, " ", "javascript:alert(1)",
]  # fmt: skip


def hostile(demo: Demo, names: list[str]) -> tuple[Report, list[Row]]:
    """`demo` with three names as names of runs, categories, layers, kinds, files, data, configs, commands, machines."""
    first, second, third = names
    baseline, deployed = f"softmax{first}", f"deploy{second}"

    def renamed(run: RunRecord) -> RunRecord:
        mask = run.mask
        if mask.kept_fraction:
            layers = dict(zip(names, mask.kept_fraction.values(), strict=False))
            mask = dataclasses.replace(mask, kept_fraction=layers, kept_mass=layers)
        return dataclasses.replace(
            run, name={"softmax": baseline, "deploy": deployed}.get(run.name, run.name), config=first, work_dir=second,
            commands=(f"command {third}",), notes=(f"note {first}",),
            precision=dict.fromkeys(names, run.precision["tree"]), gmacs_by_kind=dict.fromkeys(names, 1.0), mask=mask,
            metrics_source=second,
        )  # fmt: skip

    failed = dataclasses.replace(make_run("x", 0, None), reason=f"it {third}")
    report = dataclasses.replace(
        demo.report, runs=(*map(renamed, demo.report.runs), failed), baseline=baseline, deployed=deployed,
        dataset=f"data {third}", created_by=f"tools/report.py {first}", differences=(),
        machine=dataclasses.replace(demo.report.machine, cpu=f"cpu {second}"),
    )  # fmt: skip
    return report, [
        row._replace(image=dataclasses.replace(row.image, file_name=name))
        for row, name in zip(demo.pictures, names, strict=True)
    ]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("group", range(5))
def test_hostile_names_are_text_on_every_page_and_picture(
    demo: Demo, demo_page: str, tmp_path: Path, group: int
) -> None:
    names = HOSTILE[group::5]
    report, rows = hostile(demo, names)
    caption = f"caption {names[2]}"
    write_report(tmp_path, report, rows, [AttentionPicture(Image.new("RGB", (9, 9)), caption)])
    clean, page = Page(demo_page), Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert page.tags == clean.tags and page.attributes - {"colspan"} == clean.attributes
    one, two, three = ("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name) for name in names)
    for text in (f"softmax{one}", f"deploy{two}", f"data {three}", f"tools/report.py {one}", f"cpu {two}",
                 f"it {three}", f"caption {three}", f"command {three}", f"note {one}", f"{two}: F1 of"):  # fmt: skip
        assert text in page.text
    assert {one, two, three} <= page.plots.keys() and len(page.plots) == len(PLOTS) + 2
    drawn = {plot: page.drawn(plot) for plot in page.plots}
    assert f"softmax{one}"[:40] in drawn["Loss"]
    for name in (one, two, three):
        assert name[:40] in drawn[PLOTS[6]] and name.replace("_", " ")[:40] in drawn[PLOTS[2]]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<" not in re.sub(r"`` .*? ``|`[^`]*`", "", text) and "\x1b" not in text
    table = [line for line in text.splitlines() if line.startswith("|")][: len(report.names) + 2]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table}) == 1
    assert read_report(tmp_path / "report.json") == report


def small_set(root: Path, **image: object) -> tuple[Path, Path, list[RunSpec]]:
    """Two results files on six images, the first of which has other fields."""
    annotations, images = write_data(root)
    document = json.loads(annotations.read_text())
    box = image.pop("bbox", None)
    document["images"][0].update(image)
    for row in document["annotations"][:4]:
        row["bbox"] = box or row["bbox"]
    dump(annotations, document)
    for name in "ab":
        write_predictions(root / f"{name}.json", annotations)
    rows = json.loads((root / "b.json").read_text())
    dump(root / "b.json", [row for row in rows if row["image_id"]])  # differs most on the first image
    return annotations, images, [RunSpec(name, None, predictions=root / f"{name}.json") for name in "ab"]


def pictures_of(annotations: Path, images: Path, specs: list[RunSpec]) -> list[Any]:
    data = Annotations(annotations)
    report = build_report(specs, baseline="a", deployed="b", annotations=data, created_by="x", resamples=0)
    assert report.comparison is not None and report.comparison.images[0].image_id == 0
    return comparison_pictures(report, data, images)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("box", [[-5e8, -5e8, 1e9, 1e9], [3, 3, 1e9, 1e9], [1e11, 1e11, 5, 5], [5, 5, 0, 1e12]])
def test_a_box_of_a_billion_pixels_is_drawn_in_no_time(tmp_path: Path, box: list[float]) -> None:
    assert len(pictures_of(*small_set(tmp_path, bbox=box))) == 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("../../secret.png", None, "file_name=.*expected a path inside of --images"),
        ("/dev/zero", None, "file_name=.*expected a path inside of --images"),
        ("x/../../../secret.png", None, "file_name=.*expected a path inside of --images"),
        ("this.png", None, r"this\.png: no such image; give the folder .*--images"),
        ("this.png", b"not an image", r"this\.png: cannot be decoded"),
        ("this.png", b"\x89PNG\r\n\x1a\n" + b"\x00" * 99, r"this\.png: cannot be decoded"),
        (".", None, "not a regular file"), ("fifo", "fifo", "not a regular file"),
        ("a\0b.png", None, "set/images"), ("a" * 300 + ".png", None, "set/images"), ("", None, "set/images"),
    ],
)  # fmt: skip
def test_an_image_that_cannot_or_must_not_be_shown_is_named(
    tmp_path: Path, name: str, content: object, message: str
) -> None:
    Image.new("RGB", (64, 64), (1, 2, 3)).save(tmp_path / "secret.png")
    annotations, images, specs = small_set(tmp_path / "set", file_name=name)
    if isinstance(content, bytes):
        (images / name).write_bytes(content)
    elif content == "fifo":
        os.mkfifo(images / name)
    with pytest.raises(ValueError, match=message) as error:
        pictures_of(annotations, images, specs)
    assert "\n" not in str(error.value)


def test_the_command(tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations, images = write_data(tmp_path)
    runs = [part for run in write_demo(tmp_path / "runs", annotations, seeds=1) for part in ("--run", run)]
    out, strip = tmp_path / "out", tmp_path / "strip.png"
    arguments = [*runs, "--baseline", "softmax", "--ann", annotations, "--images", images, "--out", out]
    arguments += ["--strip", strip]
    row = {"p50_ms": 3, "threads": 2, "device": "cpu", "input_shape": [128, 128]}
    measured = ["--latency", dump(tmp_path / "latency.json", {"latency": {"deploy": row}})]
    result = tool("report.py", *arguments, *measured, "--pictures", 2, "--score", 0.4, "--resamples", 20)
    assert result.returncode == 0, result.stderr
    assert "| deploy" in result.stdout and "index.html" in result.stdout
    report = json.loads((out / "report.json").read_text())["report"]
    assert report["deployed"] == "deploy" and report["comparison"]["score_threshold"] == 0.4
    assert report["created_by"].startswith("tools/report.py --run softmax=") and report["runs"][2]["latency"]
    assert report["differences"][0]["resamples"] == 20
    assert len(Page((out / "index.html").read_text()).photographs) == 6
    with Image.open(strip) as picture:
        assert picture.width > 3 * 512 and picture.height > 512 - 1

    arguments += ["--resamples", "0"]
    failing = tool("report.py", *arguments, "--run", f"linear={tmp_path / 'nowhere'}", "--deployed", "deploy")
    assert failing.returncode == 1 and "linear: FAILED" in failing.stdout, "a failed run is in the exit code"
    for wrong, message in (
        (["--latency", annotations], "val.json: "),
        (["--baseline", "none"], "baseline='none': expected the name of a run"),
        (["--ann", tmp_path], "not readable as a COCO annotation file"),
        (["--out", annotations / "out"], "val.json"),
        (["--strip", annotations / "a.png"], "val.json"),
    ):
        result = tool("report.py", *arguments, *wrong)
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("castling_det.files.os.fsync", full)
    result = tool("report.py", *arguments, "--out", tmp_path / "full")
    assert result.returncode == 2 and "No space left" in result.stderr and result.stderr.count("\n") == 1
    assert not list((tmp_path / "full").iterdir())
