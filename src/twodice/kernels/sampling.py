"""Choosing tokens: which kernel runs, and the call of the native one.

Three backends give the same tokens, statuses, ranks, kept sets and states: the reference
(``twodice.kernels.sampling_reference``), C++ on the CPU (``native/sampling.cpp``), Triton on a GPU. Log-
probabilities, masses and entropies agree to the order of summation. The file knows kernels and arrays; seeds,
names and policies are in ``twodice.sampling``.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twodice.kernels import dispatch, lent
from twodice.kernels.sampling_reference import reference
from twodice.kernels.sampling_settings import NEEDS, Draw, Past, Sampled, Settings
from twodice.random import noise

lent.lend()

_TYPES = {torch.float32: (0, 4), torch.bfloat16: (1, 2), torch.float16: (2, 2), torch.float64: (3, 8)}
_WORTH_A_THREAD = 131072  # values; below, a second thread costs more than it saves
_BITS = {name: 1 << i for i, name in enumerate(NEEDS)}
_NO_PAST = (0, 0, 0)
_FLOATS = tuple(name for name in NEEDS if name not in ("rank", "kept"))


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def native(
    logits: Tensor,
    settings: Settings,
    draw: Draw,
    past: Past | None = None,
    mask: Tensor | None = None,
    state: Tensor | None = None,
    need: Sequence[str] = (),
    threads: int | None = None,
) -> tuple[Sampled, int]:
    """The chain in C++, without Python's lock, rows on threads; returns also the number of bad rows.

    Arguments as for `reference`, on the CPU and checked by the caller: `past` contiguous, the last axis of
    `mask` too.
    """
    rows, vocabulary = logits.shape
    row_stride, column_stride = logits.stride()
    kind, size = _TYPES[logits.dtype]
    if threads is None:  # one row has one thread; asking torch for its number costs microseconds
        threads = torch.get_num_threads() if rows * vocabulary > _WORTH_A_THREAD and rows > 1 else 1
    position, completion, keys = draw.position, draw.completion, draw.keys
    at, one_at = (0, position) if isinstance(position, int) else (position.data_ptr(), 0)
    which, one_which = (0, completion) if isinstance(completion, int) else (completion.data_ptr(), 0)
    tokens = keys.new_empty(rows)  # int64 as they are, and sooner made than by torch.empty
    bits = 0
    rank = floats = offsets = moved = None
    if need:  # most calls of a text ask for nothing, and every microsecond of Python is a few per cent of one
        for name in need:
            bits |= _BITS[name]
        if "rank" in need:
            rank = torch.empty(rows, dtype=torch.int64)
        if bits & ~(_BITS["rank"] | _BITS["kept"]):
            floats = torch.empty((len(_FLOATS), rows), dtype=torch.float64)
        if "kept" in need:
            offsets = torch.empty(rows + 1, dtype=torch.int64)
    if settings.has_state:
        moved = torch.full((rows,), torch.nan, dtype=torch.float64) if state is None else state.clone()
    found = dispatch.native.sample(
        logits.data_ptr(),
        kind,
        rows,
        vocabulary,
        row_stride * size,
        column_stride,
        settings.pointers,
        len(settings.rows),
        keys.data_ptr(),
        keys.shape[0],
        at,
        one_at,
        which,
        one_which,
        _NO_PAST if past is None else (past.ids.data_ptr(), past.offsets.data_ptr(), _pointer(past.prompts)),
        0 if mask is None else mask.data_ptr(),
        0 if mask is None else mask.stride(0),
        0 if moved is None else moved.data_ptr(),
        bits,
        tokens.data_ptr(),
        0 if rank is None else rank.data_ptr(),
        0 if floats is None else floats.data_ptr(),
        0 if offsets is None else offsets.data_ptr(),
        threads,
    )
    out = Sampled(tokens, tokens, rank=rank, state=moved)
    del out.status  # not the tokens: as long as none is set, it is made where somebody reads it
    if floats is not None:
        for name, values in zip(_FLOATS, floats, strict=True):
            if name in need:
                setattr(out, name, values)
    if offsets is None:
        bad = found
    else:
        bad, flat = found
        ids = torch.frombuffer(flat, dtype=torch.int64) if flat else torch.empty(0, dtype=torch.int64)
        out.kept = (offsets, ids)
    if bad:  # a bad row has its negative status in the place of a token
        out.status = (-tokens).clamp_(min=0).to(torch.int32)
        tokens.clamp_(min=-1)
    return out, bad


def gumbel(ids: Tensor, position: int | Tensor, completion: int | Tensor, keys: Tensor) -> Tensor:
    """The Gumbel noise of tokens, float64; ids (int64), coordinates and bits of keys are broadcast."""
    if dispatch.native is None:
        return noise.gumbel(ids, position, completion, noise.PURPOSE_TOKEN, keys)
    ids, keys = torch.broadcast_tensors(ids, keys)
    place = torch.empty((*ids.shape, 4), dtype=torch.int64)
    for i, one in enumerate((ids, position, completion, noise.PURPOSE_TOKEN)):
        place[..., i] = one
    keys, uniforms = keys.contiguous(), torch.empty_like(place[..., 0])
    found = torch.empty(ids.shape, dtype=torch.float64)
    dispatch.native.gumbel_draws(
        place.data_ptr(), found.numel(), keys.data_ptr(), uniforms.data_ptr(), found.data_ptr()
    )
    return found


def history_fits(past: Past, vocabulary: int) -> bool:
    """Whether offsets rise from 0 to the number of ids, ids are in the vocabulary, prompts fit their rows."""
    rows, count = past.offsets.shape[0] - 1, past.ids.shape[0]
    if dispatch.native is not None:
        fits: bool = dispatch.native.history_fits(
            past.ids.data_ptr(),
            count,
            past.offsets.data_ptr(),
            _pointer(past.prompts),
            rows,
            vocabulary,
        )
        return fits
    lengths = past.offsets.diff()
    wrong = (past.ids < 0).any() | (past.ids >= vocabulary).any() | (lengths < 0).any()
    if past.prompts is not None:
        wrong |= ((past.prompts < 0) | (past.prompts > lengths)).any()
    return not wrong and bool(past.offsets[0] == 0) and int(past.offsets[-1]) == count


def choose(
    logits: Tensor,
    settings: Settings,
    draw: Draw,
    past: Past | None = None,
    mask: Tensor | None = None,
    state: Tensor | None = None,
    need: Sequence[str] = (),
) -> tuple[Sampled, int | None]:
    """Run the fastest kernel that serves these logits; bad rows are None where nobody has counted."""
    if logits.is_cpu and dispatch.native is not None and logits.dtype in _TYPES:
        return native(logits, settings, draw, past, mask, state, need)
    if logits.is_cuda and dispatch.triton_is_there():
        from twodice.kernels import sampling_triton

        if sampling_triton.not_served(logits, settings, need) is None:
            return sampling_triton.sample_triton(logits, settings, draw, past, mask, need), None
    dispatch.say_once_when_slow()
    device, rows = logits.device, logits.shape[0]
    if past is not None:
        prompts = None if past.prompts is None else past.prompts.to(device)
        past = Past(past.ids.to(device), past.offsets.to(device), prompts)
    key_tensor = draw.keys.to(device).expand(rows)
    where = torch.as_tensor(draw.position, device=device).expand(rows)
    which = torch.as_tensor(draw.completion, device=device).expand(rows)
    mask = None if mask is None else mask.to(device)
    return reference(logits, settings, key_tensor, where, which, past, mask, state, need), None
