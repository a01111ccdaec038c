"""`sample`: from logits and settings to tokens, and the policy for rows that cannot be served.

The file knows seeds, coordinates and policies; settings become programs in ``twodice.sampling.chain``, and
the chain itself is in ``twodice.kernels.sampling``.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from twodice.errors import ConfigError, RequestError, ShapeError, nearest
from twodice.kernels import sampling as kernel
from twodice.kernels.sampling_settings import MAX_VOCABULARY, NEEDS, Draw, Past, Sampled, Settings, Status
from twodice.sampling.arrays import FLOATS, integers_of, readable, returned, tensor_of
from twodice.sampling.chain import Packed, keys_of, pack, settings_of
from twodice.sampling.fields import FIELDS, shown, whole
from twodice.sampling.params import SamplingParams

SEED_BITS = 53  # of a seed that we make: it survives JSON, whose numbers are float64
History = tuple[Any, Any, Any] | tuple[Any, Any]


def coordinate(value: Any, rows: int, name: str) -> int | Tensor:
    """An integer as it is, one a row as (R,) int64 on the CPU; bounds are checked here, on the host."""
    number = value if type(value) is int else whole(value)
    if number is not None:
        if not 0 <= number < 2**32:
            raise RequestError(f"{name} must be in [0, 2^32); got {shown(number)}")
        return number
    must = f"an integer or one a row, ({rows},) integers"
    if value is None or isinstance(value, str):
        raise ShapeError(f"{name} must be {must}, in [0, 2^32); got {value!r}: give the number")
    found = integers_of(name, value, must)
    if found.shape != (rows,):
        raise ShapeError(f"{name} must be {must}; got shape {tuple(found.shape)}")
    if rows and (int(found.min()) < 0 or int(found.max()) >= 2**32):
        raise RequestError(f"{name} must be in [0, 2^32); got {int(found.min())} to {int(found.max())}")
    return found


def _past(value: History, rows: int, vocabulary: int) -> Past:
    if not isinstance(value, tuple | list) or len(value) not in (2, 3):
        raise ShapeError(f"history must be (ids, offsets, prompt_lengths); got {type(value).__name__}")
    ids, offsets = (
        integers_of(f"the {name} of history", value[i]) for i, name in enumerate(("ids", "offsets"))
    )
    if ids.ndim != 1 or offsets.shape != (rows + 1,):
        raise ShapeError(
            f"history must be (ids (n,), offsets ({rows + 1},), prompt_lengths ({rows},)); "
            f"got ids {tuple(ids.shape)} and offsets {tuple(offsets.shape)}: of a list of ids a row, `rows`, "
            "ids is sum(rows, []) and offsets [0, *itertools.accumulate(map(len, rows))]"
        )
    prompts = None
    if len(value) == 3 and value[2] is not None:
        prompts = integers_of("the prompt_lengths of history", value[2])
    if prompts is not None and prompts.shape != (rows,):
        raise ShapeError(f"the prompt_lengths of history must be ({rows},); got {tuple(prompts.shape)}")
    past = Past(ids, offsets, prompts)
    if not kernel.history_fits(past, vocabulary):
        raise _misfit(past, vocabulary)
    return past


def _misfit(past: Past, vocabulary: int) -> ShapeError | RequestError:
    """What is wrong with a history whose shapes are right."""
    lengths, count = past.offsets.diff(), len(past.ids)
    if past.offsets[0] != 0 or past.offsets[-1] != count or bool((lengths < 0).any()):
        return ShapeError(
            f"the offsets of history must rise from 0 to {count}; got {past.offsets.tolist()[:8]} ..."
        )
    if count and (past.ids.min() < 0 or past.ids.max() >= vocabulary):
        return RequestError(
            f"the ids of history must be in [0, {vocabulary}); got {past.ids.min()} to {past.ids.max()}"
        )
    assert past.prompts is not None
    row = int(((past.prompts < 0) | (past.prompts > lengths)).to(torch.int8).argmax())
    return ShapeError(
        f"the prompt_lengths of history must be ({len(lengths)},), each in [0, tokens of its row]; "
        f"row {row} has {int(past.prompts[row])} of {int(lengths[row])} tokens"
    )


def history_of(value: History | None, settings: Settings, rows: int, vocabulary: int) -> Past | None:
    """The past where a stage reads it; a wrong history is wrong whether or not it is used."""
    past = None if value is None else _past(value, rows, vocabulary)
    if settings.reads_history and past is None:
        raise RequestError(
            "penalties, n-grams, DRY and min_tokens need history=(ids, offsets, prompt_lengths); got None"
        )
    if settings.reads_prompts and past is not None and past.prompts is None:
        raise RequestError(
            "presence_penalty, frequency_penalty, min_tokens and sglang's repetition_penalty count the text "
            "without its prompt: history "
            "must be (ids, offsets, prompt_lengths); got no prompt_lengths"
        )
    return past if settings.reads_history else None


_WORDS_OF_32 = (torch.int32, torch.uint32, torch.int64, torch.uint64)
_PACKED = {
    1: 'np.packbits(np.pad(allowed, (0, -len(allowed) % 32)), bitorder="little").view(np.int32)',
    2: 'np.packbits(np.pad(allowed, ((0, 0), (0, -allowed.shape[1] % 32))), axis=1, bitorder="little")'
    ".view(np.int32)",
}
"""How a (vocabulary,) or (rows, vocabulary) array of truths becomes a mask, for the error."""


def mask_of(
    value: Any, lead: tuple[int, ...], vocabulary: int, device: torch.device, name: str = "allowed_mask"
) -> Tensor | None:
    """The packed mask, (*lead, ceil(V / 32)) int32 with a contiguous last axis, on the logits' device.

    A list holds the mask of each row, as engines keep one for each request, or None for a row that is free.
    """
    if value is None:
        return None
    shape = (*lead, (vocabulary + 31) // 32)
    words = f"{name} must be {shape} int32, word id // 32 with bit id % 32 for each id"
    words_of_one = (
        isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(x, int) for x in value)
    )
    if lead and isinstance(value, list | tuple) and not words_of_one:
        if len(value) != lead[0]:
            raise ShapeError(f"{words}; got a {type(value).__name__} of {len(value)}")
        free = torch.full(shape[1:], -1, dtype=torch.int32)
        host = free.device
        masks = [
            mask_of(one, lead[1:], vocabulary, host, f"row {i} of {name}") for i, one in enumerate(value)
        ]
        rows = [free if mask is None else mask for mask in masks]
        return torch.stack(rows).to(device) if rows else torch.empty(shape, dtype=torch.int32, device=device)
    found = tensor_of(name, value)
    if lead in ((), (1,)) and found.shape in ((1, *shape), shape[1:]):  # one row, with or without its axis
        found = found.reshape(shape)
    if found.shape != shape or found.dtype not in _WORDS_OF_32:
        how = ""
        if found.dtype == torch.bool and found.ndim in _PACKED:
            how = f": of truths `allowed` {_PACKED[found.ndim]} makes it"
        elif found.ndim and found.shape[-1] < shape[-1] and found.element_size() == 8 and not lead:
            how = ": .view(np.int32) splits words of 64 bits; ids go to SamplingParams(allowed_tokens=...)"
        elif found.ndim and found.shape[-1] < shape[-1] and found.element_size() == 8:
            how = ": .view(np.int32) splits words of 64 bits"
        elif found.shape[:-1] == lead and found.dtype in _WORDS_OF_32:
            how = f" for a vocabulary of {vocabulary}: give it words of 0 for padded logits, or cut it"
        raise ShapeError(f"{words}; got {tuple(found.shape)} of {found.dtype}{how}")
    if found.dtype in (torch.int64, torch.uint64):  # as lists come: the words may be signed or not
        found = integers_of(name, found, "words of 32 bits")
        if bool(((found < -(2**31)) | (found >= 2**32)).any()):
            raise ShapeError(
                f"{name} must be words of 32 bits, in [-2^31, 2^32); "
                f"got {int(found.min())} to {int(found.max())}: put bit id % 32 into word id // 32"
            )
        found = torch.where(found < 2**31, found, found - 2**32).to(torch.int32)
    found = found.view(torch.int32).to(device)  # grammar engines fill it on the CPU, logits may be elsewhere
    return found if found.stride(-1) == 1 or shape[-1] == 1 else found.contiguous()


def state_of(value: Any, rows: int, settings: Settings) -> Tensor | None:
    """Mirostat's state, (R,) float64 on the CPU, NaN where a row has none."""
    if value is None:
        return None
    if isinstance(value, Sampled):
        raise ShapeError(f"state must be one number a row, ({rows},); got a Sampled: give its .state")
    if isinstance(value, list | tuple):  # of an engine that holds the state of each row
        value = [np.nan if one is None else one for one in value]
    found = tensor_of("state", value, exact=True)
    if found.dtype == torch.bool or found.dtype.is_complex:
        raise ShapeError(f"state must be one number a row, ({rows},); got {found.dtype}")
    found = found.detach().to("cpu", torch.float64).resolve_neg()  # the kernels read memory
    if found.shape != (rows,):
        raise ShapeError(f"state must be one number a row, ({rows},); got shape {tuple(found.shape)}")
    values = found.numpy()
    if np.isinf(values).any():
        raise RequestError(
            f"state must be finite, or NaN to start anew; got {found.tolist()[:8]}: give back Sampled.state"
        )
    idle = ~(np.isnan(values) | settings.moves)
    if idle.any():
        row = int(idle.argmax())
        raise RequestError(
            f"state is mirostat's, and row {row} sets no mirostat_tau; got {values[row]} there: set "
            "it, or give NaN there, or None where no row has mirostat"
        )
    return found.contiguous()


def _seed_rows(packed: Packed, rows: int) -> tuple[tuple[int, ...], Tensor]:
    """Seeds and keys of all rows; a row without a seed gets a fresh one from the operating system."""
    given = packed.seeds * rows if len(packed.seeds) == 1 else packed.seeds
    if packed.all_seeded:
        return given, packed.keys  # type: ignore[return-value]  # none is None
    new = memoryview(os.urandom(8 * rows)).cast("Q")
    made = tuple([n >> (64 - SEED_BITS) if s is None else s for s, n in zip(given, new, strict=True)])
    return made, keys_of(made)


def checked_policy(on_bad_row: Any) -> None:
    """What becomes of rows that cannot be served: "raise", "flag", or None for the device's default."""
    if on_bad_row not in (None, "raise", "flag"):
        raise ConfigError(f"on_bad_row must be 'raise' or 'flag'; got {on_bad_row!r}")


def ids_beyond(params: SamplingParams | Sequence[SamplingParams], vocabulary: int) -> RequestError:
    """The error for settings with token ids of a larger vocabulary: which field of which row, which ids."""
    for i, one in enumerate((params,) if isinstance(params, SamplingParams) else params):
        for name, field in FIELDS.items():
            value = getattr(one, name)
            if value is None or field.kind not in ("ids", "bias"):
                continue
            ids = [entry[0] for entry in value] if field.kind == "bias" else value
            if beyond := [token for token in ids if token >= vocabulary]:
                row = "" if isinstance(params, SamplingParams) else f" of row {i}"
                return RequestError(
                    f"the token ids of settings must be in [0, {vocabulary}), the vocabulary of the logits; "
                    f"got {name}{row} with {beyond[0]}: are they of another tokenizer?"
                )
    raise AssertionError("called with ids that the vocabulary has")


def needs_of(need: Iterable[str]) -> tuple[str, ...]:
    """Names of `Sampled` fields; an unknown one is an error with the nearest."""
    found = tuple(need) if isinstance(need, Iterable) and not isinstance(need, str) else (need,)
    for name in found:
        if name not in NEEDS:
            raise ConfigError(
                f"need names fields of Sampled; got {name!r}{nearest(str(name), NEEDS)}; there are "
                f"{', '.join(NEEDS)}"
            )
    return found


def sample(
    logits: Any,
    params: SamplingParams | Sequence[SamplingParams],
    position: int | Tensor | Sequence[int],
    *,
    history: History | None = None,
    completion: int | Tensor | Sequence[int] = 0,
    allowed_mask: Any = None,
    state: Any = None,
    need: Iterable[str] = (),
    on_bad_row: Literal["raise", "flag"] | None = None,
) -> Sampled:
    """Draw one token a row.

    Parameters
    ----------
    logits : (R, V) float tensor or array, or (V,) for one row
        float32, bfloat16, float16 (taken as float32) or float64; any strides, any device. V at most 2^20. A
        tensor, a NumPy array, or anything with ``__dlpack__`` (JAX, CuPy, TensorFlow); what is returned is
        of the same kind. So may be every array below.
    params : SamplingParams, or one a row
        Rows with different settings cost no Python loop; the packing is cached.
    position : int or (R,) integers
        Place of the token to be drawn in its sequence, the prompt counted; in [0, 2^32).
    history : (ids, offsets, prompt_lengths), optional
        The sequences so far, one behind the other, row i in ``ids[offsets[i]:offsets[i + 1]]``; needed where
        a penalty, an n-gram size, DRY or min_tokens is set.
    completion : int or (R,) integers
        Which of n continuations of one request this is; in [0, 2^32).
    allowed_mask : (R, ceil(V / 32)) int32 tensor, optional
        Bit ``id % 32`` of word ``id // 32`` says whether the id may be drawn, as grammar engines pack it.
        uint32 too, and lists and 64-bit arrays whose numbers fit into 32 bits, signed or not; or a list of
        one mask a row, None for a row in which everything is allowed.
    state : (R,) float64 tensor, optional
        Mirostat's `Sampled.state` of the position before; None, or NaN in a row, starts anew. A row without
        mirostat has NaN there; a number in it is an error.
    need : names of `Sampled` fields
        What else to return. What is not asked for costs nothing.
    on_bad_row : "raise" or "flag"
        For rows with NaN, with +inf, or with nothing left. "raise" is the default on the CPU; "flag"
        elsewhere: token -1 and a status, never a made-up token.

    Returns
    -------
    Sampled

    Raises
    ------
    ConfigError
        If `params`, `need` or `on_bad_row` is none that can be meant.
    ShapeError
        If shapes or types do not fit.
    RequestError
        If a coordinate or a token id is out of bounds, a setting lacks the history that it reads, a state the
        setting that it belongs to, or (policy "raise") a row cannot be served.

    Notes
    -----
    *Randomness*: the token is the argmax of ``logit / temperature + Gumbel noise`` over what is kept, and the
    noise is a function of (seed, position, completion, token id): no other row, no row number, no device
    enters. Rows that share all of these share their noise. Gumbel-max: Maddison, Tarlow and Minka 2014;
    exactly the softmax distribution to 2^-64.
    """
    if not isinstance(logits, Tensor):
        found = sample(
            tensor_of("logits", logits),
            params,
            position,
            history=history,
            completion=completion,
            allowed_mask=allowed_mask,
            state=state,
            need=need,
            on_bad_row=on_bad_row,
        )
        return returned(found, logits)
    readable("logits", logits)
    if logits.ndim == 1:
        logits = logits[None]
    shape = logits.shape
    if len(shape) != 2 or shape[1] == 0 or logits.dtype not in FLOATS:
        raise ShapeError(
            "logits must be (rows, vocabulary) 16-, 32- or 64-bit floats; "
            f"got {tuple(logits.shape)} of {logits.dtype}"
        )
    if logits.requires_grad:  # a choice has no gradient
        logits = logits.detach()
    if logits.is_neg():  # a view that is still to be negated: the kernels read memory
        logits = logits.resolve_neg()
    rows, vocabulary = shape
    if vocabulary > MAX_VOCABULARY:
        raise ShapeError(f"the vocabulary must be at most 2^20; got {vocabulary}")
    if not isinstance(params, SamplingParams):
        params = settings_of(params)
        if len(params) != rows:
            raise ShapeError(f"params must be one SamplingParams or one a row, {rows}; got {len(params)}")
        if rows == 0:
            params = SamplingParams()
        elif rows == 1:
            params = params[0]
    if type(need) is not tuple or need:
        need = needs_of(need)
    checked_policy(on_bad_row)
    packed = pack(params)
    if packed.settings.highest_id >= vocabulary:
        raise ids_beyond(params, vocabulary)
    past = history_of(history, packed.settings, rows, vocabulary)
    seeds, keys = _seed_rows(packed, rows)
    draw = Draw(keys, coordinate(position, rows, "position"), coordinate(completion, rows, "completion"))
    mask = None if allowed_mask is None else mask_of(allowed_mask, (rows,), vocabulary, logits.device)
    start = None if state is None else state_of(state, rows, packed.settings)
    chosen, bad = kernel.choose(logits, packed.settings, draw, past, mask, start, need)
    if bad != 0 and (on_bad_row or ("raise" if logits.is_cpu else "flag")) == "raise":
        raise_on_bad(chosen.status)
    chosen.seeds = seeds
    return chosen


_WORDS = {
    Status.NAN: "NaN among its logits",
    Status.INFINITE: "+inf among its logits (as they came, or after bias and penalties)",
    Status.EMPTY: "no token left to draw: its logits are -inf, as they came or by what the settings and the "
    "mask forbid (bias, allowed and banned tokens, min_tokens, n-grams)",
}


def raise_on_bad(status: Tensor, repair: str = "on_bad_row='flag' marks such rows instead") -> None:
    """Policy "raise" on the (R,) statuses of rows: an error that names the first that cannot be served."""
    if not bool(status.any()):
        return
    bad = status.nonzero()[:, 0].tolist()
    first = Status(int(status[bad[0]]))
    more = f" (and {len(bad) - 1} more rows: {bad[1:9]})" if len(bad) > 1 else ""
    raise RequestError(
        f"each row must have finite logits or -inf, and one to draw; row {bad[0]} has {_WORDS[first]}{more}; "
        f"{repair}"
    )
