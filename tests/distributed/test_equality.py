"""Two gloo ranks train as one process with the same global batch does, in every mode."""

from __future__ import annotations

import json

import pytest
import torch

from tests.distributed.ranks import Trained, train, train_in_ranks
from tests.distributed.settings import ITERATIONS, write_data

CASES = [
    dict(attention=attention, with_cp=with_cp)
    for attention in ("softmax", "linear", "castling")
    for with_cp in (False, True)
]
TOLERANCE = dict(rtol=1e-4, atol=2e-6)
"""Additions in another order, in float32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return write_data(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def in_ranks(folder) -> list[list[Trained]]:
    """An unused parameter would end the ranks in the second iteration: DDP does not look for them here."""
    return train_in_ranks(folder, CASES, ranks=2)


@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case["attention"])
def test_loss_and_weights_are_those_of_one_process(folder, in_ranks, case):
    alone = train(folder, ranks=1, **case)
    together = in_ranks[0][CASES.index(case)]
    assert len(together.losses) == ITERATIONS
    torch.testing.assert_close(torch.tensor(together.losses), torch.tensor(alone.losses), rtol=1e-5, atol=0)
    assert together.weights.keys() == alone.weights.keys()
    for name, weight in alone.weights.items():
        torch.testing.assert_close(together.weights[name], weight, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_modes_differ_and_training_moves_the_weights(in_ranks):
    """The negative control of the comparison above: it can tell castling from linear attention."""
    _, linear, castling = in_ranks[0][::2]
    name = "backbone.blocks.0.attn.qkv.weight"
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(castling.weights[name], linear.weights[name], **TOLERANCE)
    assert all(case.losses[0] - case.losses[-1] > 1e-2 for case in in_ranks[0])


def test_activation_checkpointing_changes_nothing(in_ranks):
    for plain, recomputed in zip(in_ranks[0][::2], in_ranks[0][1::2], strict=True):
        assert plain.losses == recomputed.losses
        for name, weight in plain.weights.items():
            torch.testing.assert_close(recomputed.weights[name], weight, rtol=0, atol=0)


def test_the_masks_occupancy_is_the_mean_over_ranks(in_ranks, folder):
    """Read from what the first rank logged, against what each rank's own mask kept."""
    (scalars,) = folder.glob("work-2-castling-False/*/vis_data/scalars.json")
    rows = [json.loads(line) for line in scalars.read_text().splitlines()]
    logged = [[row[f"mask/kept_fraction/blocks.{i}"] for i in range(2)] for row in rows if "mask/threshold" in row]
    first, second = (torch.tensor(rank[4].kept_by_rank) for rank in in_ranks)
    assert (first - second).abs().max() > 1e-4, "two batches that keep the same cannot tell"
    torch.testing.assert_close(torch.tensor(logged), (first + second) / 2)
    assert first[0].min() > 0 and first[-1].max() == 0, "active at first, empty at the end"
    assert in_ranks[0][4].mask["layers"]["blocks.1"] == {"kept_fraction": 0.0, "kept_mass": 0.0}
