"""`castling-det init`: foreign data sets are found, converted and divided; sizes follow from the boxes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from castling_det import check_dataset
from castling_det.config import load_config
from castling_det.datasets.init import Statistics, find_splits, main
from tests.docs.test_tutorial import write_data


def coco(root: Path) -> None:
    write_data(root)


def one_file(root: Path) -> None:
    write_data(root)
    document, more = (json.loads((root / f"{name}.json").read_text()) for name in ("train", "val"))
    for row in more["annotations"]:
        row["id"] += len(document["annotations"])
    for part in ("images", "annotations"):
        document[part] += more[part]
    (root / "train.json").write_text(json.dumps(document))
    (root / "val.json").unlink()


def yolo(root: Path) -> None:
    for number in range(12):
        for part in ("images", "labels"):
            (root / part / "train").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (160, 120), (number, 9, 9)).save(root / "images" / "train" / f"{number}.png")
        (root / "labels" / "train" / f"{number}.txt").write_text("0 0.5 0.5 0.25 0.25\n1 0.25 0.25 0.1 0.2\n")
    (root / "data.yaml").write_text("names: [helmet, vest]\nnc: 2\n")


def yolo_with_validation(root: Path) -> set[str]:
    yolo(root)
    for part, suffix in (("images", "png"), ("labels", "txt")):
        (root / "valid" / part).mkdir(parents=True)
        (root / part / "train" / f"3.{suffix}").rename(root / "valid" / part / f"3.{suffix}")
    return {"3.png"}


def voc(root: Path) -> None:
    (root / "JPEGImages").mkdir(parents=True)
    (root / "Annotations").mkdir()
    for number in range(12):
        Image.new("RGB", (160, 120), (number, 9, 9)).save(root / "JPEGImages" / f"{number}.png")
        objects = "".join(
            f"<object><name>{name}</name><bndbox><xmin>10</xmin><ymin>20</ymin><xmax>60</xmax><ymax>50</ymax></bndbox>"
            "</object>"
            for name in ("helmet", "vest")
        )
        size = "<size><width>160</width><height>120</height><depth>3</depth></size>"
        text = f"<annotation><filename>{number}.png</filename>{size}{objects}</annotation>"
        (root / "Annotations" / f"{number}.xml").write_text(text)


def listed_voc(root: Path) -> set[str]:
    voc(root)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("1\n2\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("3\n4\n")
    return {"3.png", "4.png"}


def unusual_coco(root: Path) -> set[str]:
    write_data(root)
    (root / "annotations").mkdir()
    for name in ("train", "val"):
        (root / f"{name}.json").rename(root / "annotations" / f"instances_{name}2017.json")
        for row in json.loads((root / "annotations" / f"instances_{name}2017.json").read_text())["images"]:
            (root / "images" / f"{name}2017").mkdir(exist_ok=True)
            (root / "images" / row["file_name"]).rename(root / "images" / f"{name}2017" / row["file_name"])
    return {f"{number}.png" for number in range(200, 204)}


@pytest.mark.parametrize("make", [coco, unusual_coco, one_file, yolo, yolo_with_validation, voc, listed_voc])
def test_a_foreign_data_set_gets_configs_that_can_be_trained(make, tmp_path, capsys):
    validation = make(tmp_path / "data")
    out = tmp_path / "mine"
    assert main([str(tmp_path / "data"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("\n  castling-det ") == 4 and f"castling-det train {out}/castling.py" in said
    for name, attention in (("softmax", "softmax"), ("castling", "castling"), ("deploy", "linear")):
        assert len((out / f"{name}.py").read_text().splitlines()) <= 25
        config = load_config(out / f"{name}.py")
        assert config.model.backbone.attention == attention
        assert sorted(config.train_dataloader.dataset.metainfo.classes) == ["helmet", "vest"]
        assert check_dataset(config) == []
    images = {
        stage: {row["file_name"] for row in json.loads(Path(loader.dataset.ann_file).read_text())["images"]}
        for stage, loader in (("train", config.train_dataloader), ("val", config.val_dataloader))
    }
    assert images["train"] and images["val"] and not images["train"] & images["val"]
    assert validation in (None, images["val"])
    hook = load_config(out / "castling.py").custom_hooks[-1]
    crop = config.train_pipeline[4].crop_size[0]
    assert crop % 32 == 0 and "end" not in hook


def test_files_that_are_named(tmp_path, capsys):
    write_data(tmp_path / "data")
    (tmp_path / "data" / "train.json").rename(tmp_path / "here.json")
    given = [str(tmp_path / "data"), "--out", str(tmp_path / "mine"), "--train", str(tmp_path / "here.json")]
    assert main([*given, "--images", str(tmp_path / "data" / "images"), "--no-flip"]) == 0
    assert load_config(tmp_path / "mine" / "softmax.py").train_pipeline[2].prob == 0
    assert main([*given, "--images", str(tmp_path)]) == 1
    assert "softmax.py, castling.py, deploy.py is there already" in capsys.readouterr().err
    given[2] = str(tmp_path / "others")
    assert main([*given, "--images", str(tmp_path)]) == 1
    assert "100.png" in capsys.readouterr().err and not (tmp_path / "data" / "annotations").exists()


def test_images_are_looked_at_before_anything_is_written(tmp_path, capsys):
    write_data(tmp_path / "data")
    Image.new("RGB", (64, 64)).save(tmp_path / "data" / "images" / "100.png")
    assert main([str(tmp_path / "data"), "--out", str(tmp_path / "mine")]) == 1
    assert "another size" in capsys.readouterr().err and not (tmp_path / "mine" / "softmax.py").exists()


def test_no_data_set_says_what_was_looked_for(tmp_path):
    expected = r"no data set was found; looked for annotations/train\.json, .*labels/train, .*Annotations;"
    with pytest.raises(ValueError, match=expected):
        find_splits(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("side", "small", "large", "size", "strides"),
    [
        (1280, 12, 64, 1280, (4, 8, 16)),  # at the most, since small boxes ask for 1707
        (640, 8, 20, 1280, (4, 8)),
        (4000, 160, 900, 384, (4, 8, 16)),
        (640, 64, 500, 320, (8, 16, 32)),
        (300, 4, 10, 608, (4, 8)),  # twice its size
    ],
)
def test_sizes_follow_from_the_boxes(side, small, large, size, strides):
    found = Statistics(100, side, ("a",), small, large)
    assert (found.size, found.strides, found.crop) == (size, strides, min(size, 384))
    assert [Statistics(n, side, ("a",), small, large).max_iters for n in (8, 100, 10**6)] == [1200, 2400, 24_000]


def test_validation_data_of_other_classes_are_refused(tmp_path, capsys):
    write_data(tmp_path)
    document = json.loads((tmp_path / "val.json").read_text())
    document["categories"][0]["name"] = "hat"
    (tmp_path / "val.json").write_text(json.dumps(document))
    assert main([str(tmp_path), "--out", str(tmp_path / "mine")]) == 1
    assert "val.json" in (said := capsys.readouterr().err) and "helmet" in said
    (tmp_path / "train.json").write_text("{}")
    assert main([str(tmp_path), "--out", str(tmp_path / "mine")]) == 1
    assert "images" in capsys.readouterr().err and not (tmp_path / "mine").exists()
