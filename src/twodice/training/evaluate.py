"""The losses on fixed windows of train, validation A and validation B, in eval() mode: nats per token, bits
per byte.

Does not know the optimizer, nor when it is called. Letters: N windows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from twodice.text.store import TokenStore

SPLITS = ("train", "validation_a", "validation_b")
IGNORED = -100


class StopAsked(Exception):
    """Inside a loop: the process was asked to stop; what was begun is given up and nothing has changed."""


class FixedWindows:
    """The windows that every evaluation of a run looks at: the same for all seeds and all arms.

    They are spread evenly over each part of the text, so that no draw is needed to choose them.

    Parameters
    ----------
    store
        The tokens.
    context
        T, tokens that the model sees at once.
    windows
        Windows of each part at most; all of them where there are fewer.
    splits
        The parts that are looked at.
    """

    def __init__(self, store: TokenStore, context: int, windows: int, splits: Sequence[str] = SPLITS) -> None:
        self.inputs_NT: dict[str, torch.Tensor] = {}
        self.targets_NT: dict[str, torch.Tensor] = {}
        self.bytes: dict[str, int] = {}
        self.there: dict[str, int] = {}
        for name in splits:
            split = store.splits[name]
            there = split.num_windows(context)
            count = min(windows, there)
            self.there[name] = there
            chosen = np.arange(count, dtype=np.int64) * there // count
            tokens = torch.from_numpy(np.ascontiguousarray(split.windows(chosen, context)))
            self.inputs_NT[name], self.targets_NT[name] = split_window(
                tokens, split.loss_mask(chosen, context)
            )
            self.bytes[name] = int(np.sum(split.bytes_of_targets(chosen, context)))


def split_window(tokens_NS: torch.Tensor, mask_NT: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of windows of T + 1 tokens; targets outside the mask are set to `IGNORED`."""
    inputs, targets = tokens_NS[:, :-1].contiguous(), tokens_NS[:, 1:].contiguous()
    if mask_NT is not None:
        targets = targets.masked_fill(~torch.from_numpy(np.asarray(mask_NT, dtype=bool)), IGNORED)
    return inputs, targets


def nats(logits_NTV: torch.Tensor, targets_NT: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in nats over the targets that count, in float32 at least."""
    logits = logits_NTV.flatten(0, 1)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, targets_NT.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    windows: FixedWindows,
    *,
    rows: int,
    device: torch.device,
    arithmetic: Callable[[], AbstractContextManager[Any]],
    stop: Callable[[], bool],
) -> dict[str, float]:
    """Measure the three losses and leave the model in the mode in which it was.

    Returns
    -------
    dict
        ``<split>_nats_per_token`` and ``<split>_bits_per_byte`` for each part of `windows`. Bits per byte are
        those of the targets that count, over the bytes that these stand for.

    Raises
    ------
    StopAsked
        `stop` became true between two batches.

    Randomness
    ----------
    None.
    """
    was_training = model.training
    model.eval()
    found: dict[str, float] = {}
    try:
        for name, targets in windows.targets_NT.items():
            total, count = 0.0, 0
            for begin in range(0, len(targets), rows):
                if stop():
                    raise StopAsked
                batch = targets[begin : begin + rows]
                inputs = windows.inputs_NT[name][begin : begin + rows].to(device)
                with arithmetic():
                    logits = model(input_ids=inputs, use_cache=False).logits
                total += float(nats(logits, batch.to(device)))
                count += int((batch != IGNORED).sum())
            found[f"{name}_nats_per_token"] = total / max(1, count)
            found[f"{name}_bits_per_byte"] = total / math.log(2) / max(1, windows.bytes[name])
    finally:
        model.train(was_training)
    return found
