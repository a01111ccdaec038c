"""Choosing tokens in Triton, for logits on a GPU: the tokens, statuses and ranks of ``sampling_reference``.

Served are programs of temperature, greedy, top-k, top-p and min-p in any order. All of these keep a prefix
of the rank order, and what top-k and min-p keep does not depend on the stages before, so a row's program
comes down to a *plan*: three cuts and what top-p counts its mass over. Plans go to the device in one
asynchronous copy; nothing waits for the device. Edits of single logits are those of the reference, before the
kernels; they do wait. This module imports triton: ``sampling`` loads it for the first logits on a GPU.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from twodice.kernels import sampling_triton_kernels as kernels
from twodice.kernels.philox_triton import INTERPRETED
from twodice.kernels.sampling_edit import bad_rows, edit
from twodice.kernels.sampling_settings import LISTS, Draw, Past, Rule, Sampled, Settings, Stage, Status

_SERVED = (0, Stage.TEMPERATURE, Stage.GREEDY, Stage.TOP_K, Stage.TOP_P, Stage.MIN_P)
_OTHER_ORDER = int(Rule.TIES_AT_K | Rule.HIGH_ID_FIRST | Rule.JOINT)
_NEEDS = ("rank",)
_SURVEYED = 4096  # logits that one program reads in `survey` and `weigh`


def not_served(logits: Tensor, settings: Settings, need: Sequence[str]) -> str | None:
    """Return why the kernels do not serve this, in words, or None where they do."""
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return str(logits.dtype)
    if other := [name for name in need if name not in _NEEDS]:
        return f"need={other[0]!r}"
    if not np.isin(settings.rows["stages"], _SERVED).all():
        return "a stage beyond temperature, top-k, top-p and min-p"
    if (settings.rows["rules"] & _OTHER_ORDER).any():
        return "the rules of another engine"
    return None


def sample_triton(
    logits: Tensor,
    settings: Settings,
    draw: Draw,
    past: Past | None = None,
    mask: Tensor | None = None,
    need: Sequence[str] = (),
    *,
    block: int = 256,
    tile: int = 1024,
    room: int = 1024,
) -> Sampled:
    """Choose a token a row; the arguments are those of ``kernels.sampling.choose``, with all that it serves.

    Parameters
    ----------
    block, tile, room : int
        Neighbouring ids of a block, ids of a tile of the last kernel, ids that a row's list of candidates has
        room for: powers of two, ``8 <= block <= tile``. They change speed only.
    """
    R, V = logits.shape
    device = logits.device
    told = None
    if _edits(settings, mask):
        raw = logits.to(torch.float32)
        told = bad_rows(raw)
        logits = edit(raw, settings, past, None if mask is None else mask.to(device))
    tokens = torch.empty(R, dtype=torch.int64, device=device)
    status = torch.empty(R, dtype=torch.int32, device=device)
    rank = torch.empty(R, dtype=torch.int64, device=device) if "rank" in need else None
    out = Sampled(tokens, status, rank=rank)
    if not R:
        return out
    blocks = triton.cdiv(V, block)
    table = plan(settings, draw, R, V, blocks)
    weighed = bool((table[:, kernels.FLAGS] & kernels.WEIGHED).any())
    plans = torch.from_numpy(table)
    if not INTERPRETED:
        plans = plans.pin_memory().to(device, non_blocking=True)
    maxima, pools = torch.empty((2, R, blocks), dtype=torch.int32, device=device)
    tops = torch.full((R,), -(1 << 31), dtype=torch.int32, device=device)
    lists = torch.empty((R, room), dtype=torch.int32, device=device)
    bounds = torch.empty((R, blocks) if weighed else (0, 0), dtype=torch.float32, device=device)
    masses = torch.empty(bounds.shape, dtype=torch.int64, device=device)
    per_program = max(_SURVEYED // block, 1)
    grid = (R, triton.cdiv(blocks, per_program))
    # A fused multiply-add would give other bits.
    options = {"BLOCK": block, "BY_BITS": INTERPRETED, "enable_fp_fusion": False}
    where = (logits, *logits.stride(), V)
    with torch.cuda.device_of(logits):
        kernels.survey_kernel[grid](*where, maxima, tops, BLOCKS=per_program, **options)
        if weighed:
            kernels.weigh_kernel[grid](
                *where, plans, tops, bounds, masses, BLOCKS=per_program, num_warps=8, **options
            )
        kernels.draw_kernel[(R,)](
            *where, plans, maxima, tops, bounds, masses, pools, lists, tokens, status, rank,
            BLOCKS=triton.next_power_of_2(blocks), TILE=tile, ROOM=room, num_warps=8, **options,
        )  # fmt: skip
    if told is not None:  # a ban may have hidden what was bad
        good = told == int(Status.OK)
        out.status = torch.where(good, status, told.to(torch.int32))
        out.tokens = torch.where(good, tokens, -1)
        out.rank = None if rank is None else torch.where(good, rank, -1)
    return out


def plan(settings: Settings, draw: Draw, R: int, V: int, blocks: int) -> npt.NDArray[np.int64]:
    """What the kernels must know of each of R rows, (R, ``kernels.COLUMNS``)."""
    rows = settings.rows
    stages = rows["stages"]

    def place(stage: Stage) -> Any:
        found = stages == stage
        return np.where(found.any(1), found.argmax(1), stages.shape[1])

    off = stages.shape[1]
    warm, greedy = place(Stage.TEMPERATURE), place(Stage.GREEDY) < off
    top_k, top_p, min_p = place(Stage.TOP_K), place(Stage.TOP_P), place(Stage.MIN_P)
    k = np.where((top_k < off) & (rows["top_k"] < V), rows["top_k"], 0)
    with_p = top_p < off
    k_early = (k > 0) & (~with_p | (top_k < top_p))
    min_p_early = (min_p < off) & (~with_p | (min_p < top_p))
    listed = k_early & (k <= blocks)
    flags = (
        greedy * kernels.GREEDY
        | k_early * kernels.K_EARLY
        | min_p_early * kernels.MIN_P_EARLY
        | with_p * kernels.WITH_P
        | (~greedy & ~listed) * kernels.WEIGHED
    )
    temperature = np.where(warm < off, rows["temperature"], 1.0)
    floats = {
        kernels.TEMPERATURE: temperature,
        kernels.MIN_T: np.where(warm < min_p, temperature, 1.0),
        kernels.LOG_MIN_P: np.where(min_p < off, rows["log_min_p"], -np.inf),
        kernels.TOP_P_T: np.where((warm < top_p) | ~with_p, temperature, 1.0),
        kernels.TOP_P: rows["top_p"],
    }
    table = np.empty((R, kernels.COLUMNS), np.int64)
    table[:, kernels.KEY] = draw.keys.numpy()
    table[:, kernels.POSITION] = draw.position if isinstance(draw.position, int) else draw.position.numpy()
    table[:, kernels.COMPLETION] = (
        draw.completion if isinstance(draw.completion, int) else draw.completion.numpy()
    )
    table[:, kernels.FLAGS] = flags
    table[:, kernels.TOP_K] = k
    for column, values in floats.items():
        table[:, column] = np.ascontiguousarray(values, np.float64).view(np.int64)
    return table


def _edits(settings: Settings, mask: Tensor | None) -> bool:
    """Whether stages 2 and 3 may change a logit."""
    rows = settings.rows
    listed = any((rows[f"{name}_begin"] < rows[f"{name}_end"]).any() for name in LISTS)
    penalised = (rows["penalty"] != 1) | (rows["presence"] != 0) | (rows["frequency"] != 0)
    repeats = (rows["ngram"] > 0) | (rows["dry_multiplier"] > 0)
    return mask is not None or bool(listed) or bool((penalised | repeats).any())
