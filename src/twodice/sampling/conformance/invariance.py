"""What must not move a token: other rows, its place, the size of the batch, the next call, other tokens'
logits.

Each is exact: one token that moves rejects. Only a sampler that offers seeds can be held to it.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from twodice.random.keys import Key
from twodice.random.permutation import permute
from twodice.sampling.conformance.cells import Bench, Cell
from twodice.sampling.conformance.claims import claimed
from twodice.sampling.conformance.rows import SEED, normal
from twodice.sampling.conformance.sampler import Rows

ROWS, SIZE = 256, 100
COUPLED_ROWS = 2_048
KINDS: tuple[Mapping[str, Any], ...] = (
    {},
    {"top_k": 7},
    {"top_p": 0.9, "temperature": 1.5},
    {"min_p": 0.05},
    {"temperature": 0.7, "top_k": 30, "top_p": 0.95},
)
OTHER: tuple[Mapping[str, Any], ...] = ({"top_k": 2}, {"temperature": 3.0})


def _order(name: str, count: int) -> npt.NDArray[np.int64]:
    return np.asarray(permute(Key(0).child("conformance", name), np.arange(count), count), np.int64)


def _batch(count: int = ROWS) -> tuple[torch.Tensor, Rows]:
    """Rows that share nothing: unlike logits, settings, seeds and positions."""
    base = normal(SIZE, 1.5, "batch")
    logits = torch.from_numpy(np.stack([np.roll(base, 7 * r) for r in range(count)]))
    numbers = np.arange(count)
    return logits, Rows(KINDS, 3 * numbers + 1, SEED + 11 * numbers, numbers % len(KINDS))


def _moved(part: str, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], words: str) -> Cell:
    moved = np.flatnonzero(first != second)
    found = f"{words}: no token moved"
    if len(moved):
        at = moved[0]
        found = (
            f"{words}: {len(moved):,} of {len(first):,} tokens moved; "
            f"the first from {first[at]} to {second[at]}"
        )
    return Cell(part, part, "never", 0.0 if len(moved) else 1.0, found, len(first))


def repeat(bench: Bench) -> list[Cell]:
    """The same call gives the same tokens."""
    logits, rows = _batch()
    first, second = (bench.sampler.draw(logits.clone(), rows, "repeat") for _ in range(2))
    return [_moved("repeat", first, second, "the same call again")]


def batch_size(bench: Bench) -> list[Cell]:
    """Alone, by sevens and in one batch."""
    logits, rows = _batch()
    whole = bench.sampler.draw(logits.clone(), rows, "batch-size")
    cells = []
    for size, words in ((1, "each row alone"), (7, "seven rows a call")):
        split = [
            bench.sampler.draw(logits[at : at + size].clone(), rows[at : at + size], "batch-size")
            for at in range(0, ROWS, size)
        ]
        cells.append(_moved("batch-size", whole, np.concatenate(split), words))
    return cells


def place(bench: Bench) -> list[Cell]:
    """The same rows in another order."""
    logits, rows = _batch()
    order = _order("place", ROWS)
    moved = bench.sampler.draw(logits[torch.from_numpy(order)], rows.take(order), "place")
    return [
        _moved(
            "place", bench.sampler.draw(logits.clone(), rows, "place")[order], moved, "rows in another order"
        )
    ]


def neighbours(bench: Bench) -> list[Cell]:
    """Every other row gets other logits, settings, seed and position; those between must keep their
    tokens.
    """
    logits, rows = _batch()
    base = bench.sampler.draw(logits.clone(), rows, "neighbours")
    numbers = np.arange(ROWS)
    cells = []
    for stay, words in ((0, "odd rows changed"), (1, "even rows changed")):
        other = numbers % 2 != stay
        assert rows.seeds is not None
        changed = Rows(
            (*rows.kinds, *OTHER),
            np.where(other, 9_000 + numbers, rows.positions),
            np.where(other, SEED - 1 - numbers, rows.seeds),
            np.where(other, len(rows.kinds) + numbers // 2 % 2, rows.which),
        )
        mixed = torch.where(torch.from_numpy(other)[:, None], 3 * logits.flip(1), logits)
        after = bench.sampler.draw(mixed, changed, "neighbours")
        cells.append(_moved("neighbours", base[~other], after[~other], words))
    return cells


def coupling(bench: Bench) -> list[Cell]:
    """The noise belongs to the token id: logits raised or lowered, a filter, and padding move only what
    they must.
    """
    count = COUPLED_ROWS
    logits = torch.from_numpy(np.tile(normal(SIZE, 1.0, "coupling"), (count, 1)))
    rows = Rows([{}], np.arange(count), np.full(count, SEED))
    base = bench.sampler.draw(logits.clone(), rows, "coupling")
    each = np.arange(count)
    # A token other than the one drawn, a keyed one in each row.
    other = (base + 1 + np.resize(_order("other", SIZE - 1), count)) % SIZE

    def changed(by: float) -> npt.NDArray[np.int64]:
        x = logits.clone()
        x[torch.from_numpy(each), torch.from_numpy(other)] += by
        return bench.sampler.draw(x, rows, "coupling")

    raised = changed(1.5)
    padded = torch.nn.functional.pad(logits, (0, 37), value=-torch.inf)
    half = {"top_k": SIZE // 2}
    kept = np.isin(base, claimed(logits[0].numpy(), {**rows.kinds[0], **half}, bench.rules).ids)
    filtered = bench.sampler.draw(logits.clone(), Rows([half], rows.positions, rows.seeds), "coupling")
    return [
        _moved("coupling", np.where(raised == other, raised, base), raised, "another token raised"),
        _moved("coupling", base, changed(-1.5), "another token lowered"),
        _moved("coupling", base[kept], filtered[kept], "a filter that keeps the token"),
        _moved("coupling", base, bench.sampler.draw(padded, rows, "coupling"), "vocabulary padded with -inf"),
    ]
