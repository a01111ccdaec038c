"""Each stage that `benchmarks.sampling` has not, alone, against the peers that have it: one row, one thread.

The limit is one pass over the logits. transformers and llama.cpp's bindings take part where they have the
stage (the bindings where they are installed). Run: python -m benchmarks.stages
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.sampling import OF_TRANSFORMERS, llama_way, logits_of, ours, transformers_way
from benchmarks.sidebyside import Row, alternate, table
from twodice.sampling.params import SamplingParams

V = 151_936
STAGES: dict[str, dict[str, Any]] = {
    "typical": {"typical_p": 0.9},
    "top-h": {"top_h": 0.4},
    "top-n-sigma": {"top_n_sigma": 1.5},
    "epsilon": {"epsilon_cutoff": 1e-3},
    "eta": {"eta_cutoff": 1e-3},
    "XTC": {"xtc_probability": 1.0, "xtc_threshold": 0.1},
    "dynamic temperature": {"dynatemp_range": 0.3},
    "mirostat": {"mirostat_tau": 3.0},
    "top-p, then min-p": {"top_p": 0.95, "min_p": 0.02},
}
OF_LLAMA = ("top_n_sigma", "typical_p", "xtc_probability", "dynatemp_range", "mirostat_tau", "min_p")


def measure(kind: str) -> list[Row]:
    """One line a stage."""
    batches = list(logits_of(V, 1, kind, torch.float32).split(1))
    found = []
    for name, setting in STAGES.items():
        contenders: dict[str, Any] = {
            "ours": ours(SamplingParams(temperature=0.8, seed=1, **setting)),
            "max": lambda x: x.amax(1),
        }
        if set(setting) <= set(OF_TRANSFORMERS):
            contenders["transformers"] = transformers_way(setting)
        if set(setting) & set(OF_LLAMA) and (llama := llama_way(setting)) is not None:
            contenders["llama.cpp"] = llama
        found.append(Row(f"{V} {kind} {name}", alternate(contenders, batches, rounds=7), 1))
    return found


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    rows = [row for kind in ("peaked", "normal 1", "normal 3") for row in measure(kind)]
    table("One stage alone, one row", rows, "ours", ["max", "transformers", "llama.cpp"])


if __name__ == "__main__":
    main()
