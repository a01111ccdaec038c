"""Adversarial logits and settings: ties, extremes, gaps, bad rows; all a function of a number."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from twodice.sampling.params import SamplingParams

KINDS = (
    "normal", "flat", "peaked", "ties", "all equal", "one finite", "all -inf", "nan", "+inf", "gaps",
    "subnormal", "mostly -inf", "huge", "signed zeros",
)  # fmt: skip
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def row(generator: np.random.Generator, kind: str, vocabulary: int) -> np.ndarray:
    """One row of logits, (vocabulary,) float64."""
    x = generator.normal(size=vocabulary)
    at = generator.integers(vocabulary)
    match kind:
        case "flat":
            x *= 1e-3
        case "peaked":
            x = x * 2 - 30
            x[at] = 0
        case "ties":
            x = np.round(x * 2) / 2
        case "all equal":
            x[:] = generator.choice([0.0, -7.5, 3.25])
        case "one finite":
            x[:] = -np.inf
            x[at] = generator.normal()
        case "all -inf":
            x[:] = -np.inf
        case "nan":
            x[at] = np.nan
        case "+inf":
            x[at] = np.inf
        case "gaps":
            x = generator.choice([0.0, -20.0, -30.0, -80.0], size=vocabulary) + generator.choice(
                [0.0, 1e-4], size=vocabulary
            )
        case "subnormal":
            x *= 1e-40
        case "mostly -inf":
            x[generator.random(vocabulary) < 0.9] = -np.inf
            x[at] = 0
        case "huge":
            x *= 3e4
        case "signed zeros":
            x = generator.choice([0.0, -0.0, -1.0], size=vocabulary)
    return x


def batch(number: int, rows: int, vocabulary: int) -> Tensor:
    """(rows, vocabulary) logits of one type, sometimes a strided view of a larger tensor."""
    generator = np.random.default_rng((number, vocabulary))
    kinds = generator.choice(KINDS, size=rows)
    x = np.stack([row(generator, kind, vocabulary) for kind in kinds]) if rows else np.zeros((0, vocabulary))
    dtype = TYPES[number % len(TYPES)]
    with np.errstate(over="ignore"):
        logits = torch.from_numpy(x).to(dtype)
    match number % 3:
        case 1:  # rows lie apart
            wide = torch.zeros(rows, vocabulary + 5, dtype=dtype)
            wide[:, 3 : 3 + vocabulary] = logits
            logits = wide[:, 3 : 3 + vocabulary]
        case 2:  # columns lie apart
            logits = logits.t().contiguous().t()
    return logits


def settings(number: int, rows: int, vocabulary: int) -> list[SamplingParams]:
    """One SamplingParams a row, many at the edges of their intervals."""
    generator = np.random.default_rng((number, vocabulary, 1))
    found = []
    for _ in range(rows):
        bias = allowed = None
        if generator.random() < 0.2:
            ids = generator.integers(vocabulary, size=min(vocabulary, 5))
            bias = {int(i): float(generator.choice([-np.inf, 5.0, -2.5, 0.1, 1e30])) for i in ids}
        if generator.random() < 0.2:
            allowed = [
                int(i) for i in generator.integers(vocabulary, size=generator.integers(1, vocabulary + 1))
            ]
        found.append(
            SamplingParams(
                temperature=float(generator.choice([0.0, 1e-6, 0.7, 1.0, 1.0, 1.3, 1e6, 1e-300])),
                top_k=[None, 0, -1, 1, 2, 5, 50, vocabulary, vocabulary + 1][generator.integers(9)],
                top_p=[None, 0.0, 0.1, 0.5, 0.95, 0.999999, 1.0][generator.integers(7)],
                min_p=[None, None, 0.0, 1e-9, 0.05, 0.5, 1.0][generator.integers(7)],
                repetition_penalty=[None, None, 1.0, 1.3, 0.5, 1e6][generator.integers(6)],
                logit_bias=bias,
                allowed_tokens=allowed,
                seed=int(generator.integers(2**62)),
            )
        )
    return found


def history(number: int, rows: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, offsets, prompt_lengths) of rows with 0 to 20 tokens, repeats among them."""
    generator = np.random.default_rng((number, vocabulary, 2))
    lengths = generator.integers(0, 21, size=rows)
    ids = torch.from_numpy(generator.integers(vocabulary, size=int(lengths.sum())))
    offsets = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int64))
    return ids, offsets, torch.zeros(rows, dtype=torch.int64)
