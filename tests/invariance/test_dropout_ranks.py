"""Masks, losses and gradients of one step are the same on 1, 2 and 4 ranks, data-parallel and sharded.

Ranks are processes that speak by gloo; FSDP2 is ``torch.distributed.fsdp.fully_shard`` on the CPU.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.support.rank_runs import CASES
from tests.support.tiny_models import ROWS

WORLDS = (1, 2, 4)
Found = dict[tuple[int, int], dict[str, torch.Tensor]]
Slots = Callable[[int, int, int, int], list[int]]  # (micro, world, rank, rows) -> slots


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What every rank of every run gave, by (number of ranks, rank)."""
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.rank_runs", str(folder)],
        capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        (world, rank): load_file(folder / f"{world}-{rank}.safetensors")
        for world in WORLDS
        for rank in range(world)
    }


def slots_of(micro: int, world: int, rank: int, rows: int) -> list[int]:
    return [(micro * world + rank) * rows + row for row in range(rows)]


def gathered(found: Found, case: str, world: int, slots: Slots = slots_of) -> dict[str, torch.Tensor]:
    """The masks of a case by site, its rows in the order of their slots; what a recomputation saw must agree
    with its forward.
    """
    micros = CASES[case][3]
    rows = ROWS // world // micros
    masks: dict[str, dict[int, torch.Tensor]] = {}
    for rank in range(world):
        calls: dict[str, list[torch.Tensor]] = {}
        for name, mask in found[world, rank].items():
            if name.startswith(f"{case}|mask|"):
                calls.setdefault(name.split("|")[2], []).append(mask)
        for site, seen in calls.items():
            again = len(seen) // micros
            for micro in range(micros):
                mask = seen[micro * again]
                assert all(torch.equal(mask, other) for other in seen[micro * again : (micro + 1) * again])
                if site.endswith("#weight"):  # one mask for all rows
                    assert torch.equal(masks.setdefault(site, {}).setdefault(0, mask), mask)
                else:
                    masks.setdefault(site, {}).update(
                        zip(slots(micro, world, rank, rows), mask.split(1), strict=True)
                    )
    return {site: torch.cat([by[slot] for slot in sorted(by)]) for site, by in masks.items()}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_masks_are_the_same_on_any_number_of_ranks(found: Found, case: str, world: int) -> None:
    alone, shared = gathered(found, case, 1), gathered(found, case, world)
    assert alone.keys() == shared.keys() and len(alone) >= (3 if "whole" in case else 30)
    for site, mask in alone.items():
        assert torch.equal(shared[site], mask), site
        assert not mask.all() or mask.ndim < 3 or "#layer" in site or "#head" in site, f"{site} drops nothing"


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_same_on_any_number_of_ranks(
    found: Found, case: str, world: int
) -> None:
    """To the order of summation: 2e-5 of float32 sums of some thousand terms."""
    alone = {k: v for k, v in found[1, 0].items() if k.startswith(f"{case}|") and "|mask|" not in k}
    for rank in range(world):
        for name, value in alone.items():
            torch.testing.assert_close(found[world, rank][name], value, rtol=2e-5, atol=2e-6, msg=name)


def test_checkpointing_sharding_and_micro_batches_are_one_step(found: Found) -> None:
    """Cases of one family and plan, which differ in how it was run, agree with each other."""
    for family in ("gpt2", "llama"):
        cases = [case for case in CASES if case.startswith(family) and "whole" not in case]
        assert len(cases) == 3
        first = gathered(found, cases[0], 1)
        for case in cases[1:]:
            other = gathered(found, case, 4)
            assert all(torch.equal(first[site], other[site]) for site in first)
            for name, value in found[1, 0].items():
                if name.startswith(f"{cases[0]}|grad|"):
                    same = found[4, 0][name.replace(cases[0], case)]
                    torch.testing.assert_close(same, value, rtol=2e-5, atol=2e-6)


def test_rows_numbered_within_the_rank_would_be_found_out(found: Found) -> None:
    """Saboteur: each rank's rows counted from 0, the trap that others fall into. Rank 1 has none of
    the masks that rank 0 has.
    """

    def own(micro: int, world: int, rank: int, rows: int) -> list[int]:
        return slots_of(micro, world, 0, rows)

    alone, last = gathered(found, "gpt2 ddp", 1), gathered(found, "gpt2 ddp", 2, own)
    many = [s for s in alone if s.endswith(("#residual", "#activation", "#attention", "#skip", "#output"))]
    assert len(many) == 13
    for site in many:
        assert not torch.equal(last[site], alone[site][: ROWS // 2]), site


def test_ranks_agree_on_layers_that_are_left_out_and_give_them_zero_gradients(found: Found) -> None:
    """At a rate of a half, one of two layers is left out in this step."""
    for case in ("gpt2 ddp whole layers", "llama fsdp2 whole layers"):
        for world in WORLDS:
            for rank in range(world):
                grads = {
                    name: grad
                    for name, grad in found[world, rank].items()
                    if name.startswith(f"{case}|grad|") and (".h." in name or ".layers." in name)
                }
                out = {n.split(".")[2] for n, grad in grads.items() if not grad.any()}
                stays = {n.split(".")[2] for n, grad in grads.items() if grad.any()}
                assert len(out) == len(stays) == 1 and not out & stays, (case, world, rank)
