"""A vocabulary split in two against the whole row: what each machine does, and what the merge adds.

What a shard must do anyway is one pass over its half; what it sends is counted in ids. The whole row is what
one machine does that has all logits.

Run: python -m benchmarks.shards
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.sidebyside import Row, alternate, table
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample
from twodice.sampling.shards import merge_shards, shard_candidates

V = 151_936
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "top-k": {"top_k": 50},
    "min-p": {"min_p": 0.05},
    "top-k + top-p": {"top_k": 50, "top_p": 0.95},
    "top-p (sends all)": {"top_p": 0.95},
}


def measure(rows: int) -> list[Row]:
    """One line a setting: the first half, the merge of both, the whole row."""
    x = torch.randn(64, V, generator=torch.Generator().manual_seed(0)) * 2
    found = []
    for name, setting in SETTINGS.items():
        params = SamplingParams(temperature=0.8, seed=1, **setting)

        def half(batch: Any, begin: int, params: SamplingParams = params) -> Any:
            part = batch[0][:, begin : begin + V // 2]
            return shard_candidates(part, params, batch[1], begin=begin, vocabulary=V)

        batches = [(y, i, [half((y, i), 0), half((y, i), V // 2)]) for i, y in enumerate(x.split(rows))]
        us = alternate(
            {
                "half": lambda batch, half=half: half(batch, V // 2 * (batch[1] % 2)),
                "merge": lambda batch, params=params: merge_shards(batch[2], params, batch[1]),
                "whole": lambda batch, params=params: sample(batch[0], params, batch[1]),
            },
            batches,
            rounds=9,
        )
        sent = len(batches[0][2][0].ids) // rows
        found.append(Row(f"{rows} x {V} {name}, {sent} ids a row", us, 1))
    return found


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    table("Two shards against the whole", [*measure(1), *measure(8)], "whole", ["half", "merge"])


if __name__ == "__main__":
    main()
