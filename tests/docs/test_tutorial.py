"""The tutorial's blocks, run as they stand and in their order, on small generated data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from castling_det.conversion import load_checkpoint
from castling_det.report.attention_maps import read_picture
from castling_det.report.records import read_report

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
NOT_RUN = ("text",)


class Result(NamedTuple):
    folder: Path
    output: str


def script(markdown):
    """One shell script that writes every titled block and runs every shell block, each announced."""
    lines = ["set -euo pipefail"]
    for language, title, body in BLOCK.findall(markdown):
        if title:
            lines.append(f"cat > {title} <<'END OF FILE'\n{body}END OF FILE")
        elif language == "bash":
            lines.append(f"echo '== {body.splitlines()[0][:40].replace(chr(39), '')}'\n{body}")
        else:
            assert language in NOT_RUN, f"a block of {language!r} that nobody runs; give it a title, or make it text"
    return "\n".join(lines)


def write_data(root):
    """Bright squares (helmets) and wide bars (vests) on noise; ids as another program might number them."""
    random = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    for name, first, count in (("train", 100, 8), ("val", 200, 4)):
        images, annotations = [], []
        for number in range(first, first + count):
            pixels = random.integers(0, 90, (120, 160, 3), dtype=np.uint8)
            for category, (width, height) in ((7, (30, 30)), (9, (48, 20))):
                x, y = int(random.integers(0, 160 - width)), int(random.integers(0, 120 - height))
                pixels[y : y + height, x : x + width] = (250, 220, 40) if category == 7 else (40, 220, 250)
                annotations.append(
                    dict(id=len(annotations) + 1, image_id=number, category_id=category, iscrowd=0,
                         bbox=[x, y, width, height], area=width * height)
                )  # fmt: skip
            Image.fromarray(pixels).save(root / "images" / f"{number}.png")
            images.append(dict(id=number, file_name=f"{number}.png", width=160, height=120))
        categories = [dict(id=7, name="helmet"), dict(id=9, name="vest")]
        (root / f"{name}.json").write_text(
            json.dumps(dict(images=images, annotations=annotations, categories=categories))
        )


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A folder like a clone, in which the tutorial has been followed."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "tools").symlink_to(ROOT / "tools")
    (folder / ".venv").symlink_to(sys.prefix)
    write_data(folder / "data" / "mine")
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", script(TUTORIAL.read_text(encoding="utf-8"))],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3000,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return Result(folder, done.stdout)


def test_it_ends_with_a_report_of_both_runs(followed):
    report = read_report(followed.folder / "work_dirs" / "mine" / "report" / "report.json")
    assert tuple(report.names) == ("softmax", "deploy")
    assert not report.failed and all("mAP" in run.metrics for run in report.runs)
    assert (followed.folder / "work_dirs/mine/report/index.html").stat().st_size > 10_000


def test_conversion_changes_nothing(followed):
    manifest = json.loads((followed.folder / "work_dirs/mine/deploy/deploy.json").read_text())
    assert manifest["mask"]["empty_by"] == "threshold" and manifest["max_abs_drift"] == 0


def test_the_training_says_that_its_mask_is_empty(followed):
    folder = followed.folder / "work_dirs" / "mine" / "castling"
    mask = load_checkpoint((folder / "last_checkpoint").read_text())["meta"]["castling_det"]["mask"]
    assert mask["empty"] and mask["iteration"] == mask["max_iters"] == 6 and len(mask["layers"]) == 4


def test_the_attention_picture_is_of_the_deployed_model(followed):
    picture = read_picture(followed.folder / "work_dirs/mine/attention.png")
    assert "blocks.1, mode 'linear'" in picture.caption and "own mask is empty" in picture.caption


def test_the_exported_detector_takes_every_image(followed):
    found = json.loads((followed.folder / "work_dirs/mine/detections/images.json").read_text())
    assert len(found["images"]) == 12 and len(found["categories"]) == 2


def test_every_block_is_run_or_named_as_text():
    text = TUTORIAL.read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(BLOCK.findall(text)), "a block that the pattern does not see"
    with pytest.raises(AssertionError, match="that nobody runs"):
        script("```python\nprint(1)\n```\n")
