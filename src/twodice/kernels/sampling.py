"""Token sampling: the packed settings, the readable twin, the native call, and the choice between the two.

The chain in numbered order (``docs/contracts/sampling.md``): 1 bad rows, 2 bias and allowed tokens, 3
repetition penalty, 4 temperature, 6 top-k, 7 top-p, 8 min-p, 11 draw; the numbers between are kept free for
stages to come. This file knows arrays and numbers, not `SamplingParams`, seeds or policies.

Letters: R rows, V vocabulary, z the logit less the row's maximum, divided by the temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twodice.kernels import dispatch
from twodice.random import noise

MAX_VOCABULARY = 1 << 20  # masses are at most 2^42 each, so their sum stays below 2^63


class Status(IntEnum):
    """What became of a row."""

    OK = 0
    NAN = 1
    INFINITE = 2
    EMPTY = 3


NEEDS = ("logprob", "raw_logprob", "temperature_logprob", "rank", "kept", "kept_mass", "entropy")

ROW = np.dtype(
    [
        ("temperature", "<f8"),
        ("top_p", "<f8"),  # 1 is off
        ("log_min_p", "<f8"),  # -inf is off
        ("top_k", "<i8"),  # 0 is off
        ("key", "<u8"),
        ("penalty", "<f4"),  # 1 is off
        ("has_allowed", "<i4"),
        ("bias_begin", "<i8"),
        ("bias_end", "<i8"),
        ("allowed_begin", "<i8"),
        ("allowed_end", "<i8"),
    ]
)


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of R rows, or of one that stands for all rows, packed for the kernels.

    `rows` is a structured array of `ROW`; the sparse parts lie behind each other in the flat arrays, sorted
    by id within a row.
    """

    rows: npt.NDArray[Any]
    bias_ids: npt.NDArray[np.int64]
    bias_values: npt.NDArray[np.float32]
    allowed_ids: npt.NDArray[np.int64]
    highest_id: int
    penalised: bool
    pointers: tuple[int, int, int, int] = field(default=(0, 0, 0, 0))

    @classmethod
    def pack(
        cls,
        rows: Sequence[tuple[Any, ...]],
        bias: Sequence[Sequence[tuple[int, float]]],
        allowed: Sequence[Sequence[int] | None],
    ) -> Settings:
        """Pack one ``(temperature, top_p, log_min_p, top_k, key, penalty)`` a row, with its sparse parts."""
        table = np.zeros(len(rows), ROW)
        bias_at = allowed_at = 0
        for i, (row, pairs, ids) in enumerate(zip(rows, bias, allowed, strict=True)):
            count = 0 if ids is None else len(ids)
            table[i] = (*row, ids is not None, bias_at, bias_at + len(pairs), allowed_at, allowed_at + count)
            bias_at += len(pairs)
            allowed_at += count
        bias_ids = np.array([t for pairs in bias for t, _ in pairs], np.int64)
        with np.errstate(over="ignore"):  # -1e300 bans like -inf
            bias_values = np.array([v for pairs in bias for _, v in pairs], np.float64).astype(np.float32)
        allowed_ids = np.array([t for ids in allowed for t in (ids or ())], np.int64)
        highest = max([int(a.max()) for a in (bias_ids, allowed_ids) if a.size], default=-1)
        pointers = tuple(a.ctypes.data for a in (table, bias_ids, bias_values, allowed_ids))
        penalised = bool((table["penalty"] != 1).any())
        return cls(table, bias_ids, bias_values, allowed_ids, highest, penalised, pointers)  # type: ignore[arg-type]


@dataclass(slots=True)
class Sampled:
    """What is returned for R rows; a field that was not asked for is None.

    Attributes
    ----------
    tokens : (R,) int64 tensor
        The token of each row; -1 where `status` is not OK.
    status : (R,) int32 tensor
        `Status`: 0 OK, 1 NAN, 2 INFINITE (+inf among the logits), 3 EMPTY (nothing left to draw).
    seeds : tuple of int
        The seed of each row, given or made; with it the row can be had again. (Empty from the kernels, which
        know keys.)
    logprob : (R,) float64 tensor, nats
        Log-probability of the token after the whole chain.
    raw_logprob : (R,) float64 tensor, nats
        The model's own: under the softmax of the logits as they came.
    temperature_logprob : (R,) float64 tensor, nats
        After bias, penalty and temperature, before any filter.
    rank : (R,) int64 tensor
        Tokens that stand before it in order of logit (after bias and penalty), then id: 0 is the most
        probable.
    kept : (offsets, ids)
        Row i kept ``ids[offsets[i]:offsets[i + 1]]``, in order of rank.
    kept_mass : (R,) float64 tensor
        What the filters left of the distribution after temperature, in (0, 1].
    entropy : (R,) float64 tensor, nats
        Of the final distribution, from which the token was drawn.
    """

    tokens: Tensor
    status: Tensor
    seeds: tuple[int, ...] = ()
    logprob: Tensor | None = None
    raw_logprob: Tensor | None = None
    temperature_logprob: Tensor | None = None
    rank: Tensor | None = None
    kept: tuple[Tensor, Tensor] | None = None
    kept_mass: Tensor | None = None
    entropy: Tensor | None = None


def _column(settings: Settings, name: str, rows: int, device: torch.device) -> Tensor:
    values = settings.rows[name]
    if values.dtype == np.uint64:
        values = values.view(np.int64)
    return torch.from_numpy(values.copy()).to(device).expand(rows).reshape(rows, 1)


def _bad_rows(x: Tensor) -> Tensor:
    status = torch.full((x.shape[0],), int(Status.OK), dtype=torch.int64, device=x.device)
    status[(x == torch.inf).any(1)] = int(Status.INFINITE)
    status[x.isnan().any(1)] = int(Status.NAN)
    return status


def _edit(x: Tensor, settings: Settings, history: tuple[Tensor, Tensor] | None) -> Tensor:
    """Stages 2 and 3: bias, allowed tokens, penalty; float32 arithmetic (float64 for float64 logits)."""
    x = x.clone()
    count = len(settings.rows)
    for i in range(x.shape[0]):
        row = settings.rows[i if count > 1 else 0]
        at = slice(int(row["bias_begin"]), int(row["bias_end"]))
        ids = torch.from_numpy(settings.bias_ids[at]).to(x.device)
        x[i, ids] += torch.from_numpy(settings.bias_values[at]).to(x.device)
        if row["has_allowed"]:
            ids = torch.from_numpy(settings.allowed_ids[int(row["allowed_begin"]) : int(row["allowed_end"])])
            only = torch.full_like(x[i], -torch.inf)
            only[ids] = x[i, ids]
            x[i] = only
        penalty = float(row["penalty"])
        if penalty != 1 and history is not None:
            tokens, offsets = history
            ids = tokens[int(offsets[i]) : int(offsets[i + 1])].unique()
            old = x[i, ids]
            # A tensor and not a number: by a number CUDA multiplies with the reciprocal, which rounds twice.
            factor = torch.tensor(penalty, dtype=x.dtype, device=x.device)
            x[i, ids] = torch.where(old > 0, old / factor, old * factor)
    return x


def reference(
    logits: Tensor,
    settings: Settings,
    keys: Tensor,
    position: Tensor,
    completion: Tensor,
    history: tuple[Tensor, Tensor] | None = None,
    need: Sequence[str] = (),
    purpose: int = noise.PURPOSE_TOKEN,
) -> Sampled:
    """The chain in plain torch; every backend gives the same tokens, statuses, ranks and kept sets.

    Parameters
    ----------
    logits : (R, V) float tensor
        float16, bfloat16 and float32 are taken as float32, float64 stays.
    keys, position, completion : (R,) int64 tensors
    history : (ids, offsets), optional
        int64; row i has seen ``ids[offsets[i]:offsets[i + 1]]``.
    """
    rows, vocabulary = logits.shape
    device = logits.device
    raw = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
    # 1: rows that cannot be served
    status = _bad_rows(raw)
    # 2, 3: bias, allowed tokens, repetition penalty
    x = _edit(raw, settings, history)
    after = _bad_rows(x)  # a bias or a penalty can overflow
    status = torch.where(status == Status.OK, after, status)
    status[(status == Status.OK) & (x == -torch.inf).all(1)] = int(Status.EMPTY)
    ok = status == Status.OK
    x = torch.where(ok[:, None], x, 0.0)

    # The order of rank: value, then the lower id. It does not depend on the temperature.
    ordered, ids = torch.sort(x, dim=1, descending=True, stable=True)
    alive = ordered > -torch.inf
    # 4: temperature
    temperature = _column(settings, "temperature", rows, device)
    wide = ordered.to(torch.float64)
    greedy = temperature == 0
    z = (wide - wide[:, :1]) / torch.where(greedy, 1.0, temperature)
    kept = alive.clone()
    place = torch.arange(vocabulary, device=device).expand(rows, vocabulary)
    kept &= ~greedy | (place == 0)
    warmed = kept.clone()  # what temperature left: all that is alive, or the argmax
    # 6: top-k
    top_k = _column(settings, "top_k", rows, device)
    kept &= (top_k == 0) | (place < top_k)
    # 7: top-p over what top-k kept
    top_p = _column(settings, "top_p", rows, device)
    mass = torch.where(kept, noise.weights(z), 0)
    total = mass.sum(1, keepdim=True)
    wanted = torch.ceil(top_p * total.to(torch.float64)).to(torch.int64).clamp(min=1)
    wanted = torch.minimum(wanted, total)
    before = mass.cumsum(1) - mass
    kept &= (top_p >= 1) | (before < wanted)
    # 8: min-p
    kept &= z >= _column(settings, "log_min_p", rows, device)
    # 11: the draw
    g = noise.gumbel(ids, position[:, None], completion[:, None], purpose, keys[:, None])
    score = torch.where(kept, z + g, -torch.inf)
    best = score.max(1, keepdim=True).values
    winners = torch.where(kept & (score == best), ids, vocabulary)
    tokens = winners.min(1).values
    drawn = (ids == tokens[:, None]).to(torch.int64).argmax(1, keepdim=True)
    out = Sampled(torch.where(ok, tokens, -1), status.to(torch.int32))

    nan = torch.nan
    if "rank" in need:
        out.rank = torch.where(ok, drawn[:, 0], -1)
    if "kept" in need:
        kept_ok = kept & ok[:, None]
        offsets = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        offsets[1:] = kept_ok.sum(1).cumsum(0)
        out.kept = (offsets, ids[kept_ok])
    if {"logprob", "temperature_logprob", "kept_mass", "entropy"} & set(need):
        e = torch.exp(z)
        sum_kept = torch.where(kept, e, 0.0).sum(1)
        sum_warmed = torch.where(warmed, e, 0.0).sum(1)
        z_drawn = z.gather(1, drawn)[:, 0]
        if "logprob" in need:
            out.logprob = torch.where(ok, z_drawn - sum_kept.log(), nan)
        if "temperature_logprob" in need:
            out.temperature_logprob = torch.where(ok, z_drawn - sum_warmed.log(), nan)
        if "kept_mass" in need:
            out.kept_mass = torch.where(ok, sum_kept / sum_warmed, nan)
        if "entropy" in need:
            # H = log S - sum(e z) / S; the term of a token with e = 0 is 0 (its z may be -inf)
            ez = torch.where(kept & (e > 0), e * z, 0.0).sum(1)
            out.entropy = torch.where(ok, sum_kept.log() - ez / sum_kept, nan)
    if "raw_logprob" in need:
        wide_raw = raw.to(torch.float64)
        wide_raw = wide_raw - wide_raw.amax(1, keepdim=True)  # or log 2 is lost beside 3e38
        at = wide_raw.gather(1, tokens.clamp(0, vocabulary - 1)[:, None])[:, 0]
        out.raw_logprob = torch.where(ok, at - torch.logsumexp(wide_raw, 1), nan)
    return out


_TYPES = {torch.float32: (0, 4), torch.bfloat16: (1, 2), torch.float16: (2, 2), torch.float64: (3, 8)}
_WORTH_A_THREAD = 131072  # values; below, a second thread costs more than it saves
_BITS = {name: 1 << i for i, name in enumerate(
    ("logprob", "raw_logprob", "temperature_logprob", "rank", "kept", "kept_mass", "entropy")
)}  # fmt: skip
_FLOATS = ("logprob", "raw_logprob", "temperature_logprob", "kept_mass", "entropy")


def _address(array: npt.NDArray[Any]) -> int:
    return array.__array_interface__["data"][0]  # type: ignore[no-any-return]


def native(
    logits: Tensor,
    settings: Settings,
    keys: npt.NDArray[np.uint64],
    position: int | Tensor,
    completion: int | Tensor,
    history: tuple[Tensor, Tensor] | None = None,
    need: Sequence[str] = (),
    threads: int | None = None,
) -> tuple[Sampled, int]:
    """The same chain in C++, without Python's lock, rows on threads; returns also the number of bad rows.

    Arguments as for `reference`, on the CPU and checked by the caller; `keys` has one entry a row, or one for
    all.
    """
    rows, vocabulary = logits.shape
    row_stride, column_stride = logits.stride()
    kind, size = _TYPES[logits.dtype]
    if threads is None:  # one row has one thread; asking torch for its number costs microseconds
        threads = torch.get_num_threads() if rows * vocabulary > _WORTH_A_THREAD and rows > 1 else 1
    at, one_at = (0, position) if isinstance(position, int) else (position.data_ptr(), 0)
    which, one_which = (0, completion) if isinstance(completion, int) else (completion.data_ptr(), 0)
    bits = 0
    for name in need:
        bits |= _BITS[name]
    ranked = "rank" in need
    tokens = torch.empty(rows, dtype=torch.int64)
    rank = torch.empty(rows, dtype=torch.int64) if ranked else None
    status = torch.empty(rows, dtype=torch.int32)
    with_floats = bits & ~(_BITS["rank"] | _BITS["kept"])
    floats = torch.empty((len(_FLOATS), rows), dtype=torch.float64) if with_floats else None
    offsets = torch.empty(rows + 1, dtype=torch.int64) if "kept" in need else None
    found = dispatch.native.sample(
        logits.data_ptr(),
        kind,
        rows,
        vocabulary,
        row_stride * size,
        column_stride,
        settings.pointers,
        len(settings.rows),
        _address(keys),
        len(keys),
        at,
        one_at,
        which,
        one_which,
        0 if history is None else history[0].data_ptr(),
        0 if history is None else history[1].data_ptr(),
        bits,
        tokens.data_ptr(),
        0 if rank is None else rank.data_ptr(),
        status.data_ptr(),
        0 if floats is None else floats.data_ptr(),
        0 if offsets is None else offsets.data_ptr(),
        threads,
    )
    out = Sampled(tokens, status)
    out.rank = rank
    if floats is not None:
        for name, values in zip(_FLOATS, floats, strict=True):
            if name in need:
                setattr(out, name, values)
    if offsets is None:
        return out, found
    bad, flat = found
    out.kept = (offsets, torch.from_numpy(np.frombuffer(flat, np.int64).copy()))
    return out, bad


def choose(
    logits: Tensor,
    settings: Settings,
    keys: npt.NDArray[np.uint64],
    position: int | Tensor,
    completion: int | Tensor,
    history: tuple[Tensor, Tensor] | None,
    need: Sequence[str],
) -> tuple[Sampled, int | None]:
    """Run the fastest kernel that serves these logits; bad rows are None where nobody has counted."""
    if dispatch.native is not None and logits.device.type == "cpu" and logits.dtype in _TYPES:
        return native(logits, settings, keys, position, completion, history, need)
    dispatch.say_once_when_slow()
    device = logits.device
    moved = None if history is None else (history[0].to(device), history[1].to(device))
    key_tensor = torch.from_numpy(keys.view(np.int64)).to(device).expand(logits.shape[0])
    where = torch.as_tensor(position, device=device).expand(logits.shape[0])
    which = torch.as_tensor(completion, device=device).expand(logits.shape[0])
    return reference(logits, settings, key_tensor, where, which, moved, need), None
