"""The zoo counts every COCO model twice and says what it cannot count; peers are text."""

from __future__ import annotations

from pathlib import Path

import pytest

from castling_det.analysis.model_zoo import (
    PEERS,
    ModelZoo,
    ZooModel,
    measure_zoo,
    peers_markdown,
    read_zoo,
    write_zoo,
    zoo_markdown,
    zoo_models,
)
from castling_det.config import load_config
from castling_det.report.complexity import detector_complexity

CONFIGS = Path(__file__).parents[2] / "configs"
NAME = "gfl_castling-vit-nano"


@pytest.fixture(scope="module")
def zoo():
    (path,) = [path for path in zoo_models(CONFIGS) if path.stem.startswith(NAME)]
    return measure_zoo([path], created_by="test")


def test_numbers_are_those_of_the_two_configs(zoo):
    (model,) = zoo.models
    for attention, gmacs in (("softmax", model.gmacs_softmax), ("linear", model.gmacs_linear)):
        config = load_config(CONFIGS / "castling_vit" / f"{NAME}_{attention}_8xb16-100e_coco.py")
        assert gmacs == detector_complexity(config, model.shape).gmacs
    assert model.family == "castling_vit" and model.recipe == "8xb16-100e_coco"
    assert model.gmacs_linear < model.gmacs_softmax


def test_every_coco_model_is_listed():
    names = {path.stem.partition("_softmax_")[0] for path in zoo_models(CONFIGS)}
    assert {NAME, "picodet_castling-levit-128s"} <= names
    assert all("tree" not in path.stem for path in zoo_models(CONFIGS))


def test_what_cannot_be_counted_is_said(zoo, tmp_path):
    broken = ZooModel("f", "m", "r", (1, 1), None, None, None, reason="no closed form of X")
    both = ModelZoo("test", (*zoo.models, broken))
    write_zoo(tmp_path / "zoo.json", both)
    assert read_zoo(tmp_path / "zoo.json") == both
    text = zoo_markdown(both)
    assert "- `m` is not counted: no closed form of X" in text
    assert text.count(f"| {NAME}") == 2 and text.count("| m ") == 2


def test_windows_have_a_row_of_their_own():
    assert {path.name for path in zoo_models(CONFIGS)}.isdisjoint(CONFIGS.rglob("*softmax-window*"))
    text = zoo_markdown(ModelZoo("test", (ZooModel("f", "m", "r", (1, 1), 1, 3e0, 1e0, 2e0),)))
    rows = [[cell.strip() for cell in line.split("|")[3:6:2]] for line in text.splitlines()[2:]]
    assert rows == [["softmax", "3.00"], ["softmax, windows", "2.00"], ["linear", "1.00"]]


def test_peers_have_a_source():
    assert all(len(peer) == 5 and "," in peer[-1] for peer in PEERS)
    assert len(peers_markdown().splitlines()) == len(PEERS) + 2


def test_the_committed_zoo_counts_every_model():
    zoo = read_zoo(CONFIGS.parent / "results" / "model_zoo.json")
    assert {model.name for model in zoo.models} == {path.stem.partition("_softmax_")[0] for path in zoo_models(CONFIGS)}
    assert not [model.name for model in zoo.models if model.gmacs_softmax is None or model.reason is not None]
