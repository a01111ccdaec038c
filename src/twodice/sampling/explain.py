"""How one token came to be drawn: what each edit moved, what each stage left, and the odds in the end.

Every figure comes from `twodice.sampling.sample` (edits: from the kernels' own) on the same logits, with the
settings switched on one by one in the row's own order: nothing of the chain is written a second time here.
The file knows no model and no terminal.

Letters: V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from twodice.errors import ConfigError, RequestError, ShapeError
from twodice.kernels.sampling_edit import edit
from twodice.kernels.sampling_reference import dynamic_temperature
from twodice.kernels.sampling_settings import Sampled
from twodice.sampling.arrays import tensor_of
from twodice.sampling.chain import pack
from twodice.sampling.explanation import Edit, Explanation, Named, Stage
from twodice.sampling.fields import FIELDS, is_off, whole
from twodice.sampling.params import SamplingParams
from twodice.sampling.profiles import SWITCH
from twodice.sampling.sample import History, history_of, mask_of, raise_on_bad, sample, state_of

EDITS = ("logit_bias", "allowed_tokens", "banned_tokens", "min_tokens", "repetition_penalty",
         "frequency_penalty", "presence_penalty", "no_repeat_ngram_size", "dry_multiplier")  # fmt: skip
"""The settings of stages 2 and 3, in the order in which the contract has them act."""

_LEAST_SHARE = 0.9  # of the vocabulary that a tokenizer must fill; models pad theirs by less


def edited(
    logits: Tensor, params: SamplingParams, *, history: History | None = None, allowed_mask: Any = None
) -> Tensor:
    """(R, V) logits as stages 2 and 3 leave them, float32, or float64 where they came so."""
    rows, vocabulary = logits.shape
    settings = pack(params).settings
    past = history_of(history, settings, rows, vocabulary)
    wide = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
    return edit(wide, settings, past, mask_of(allowed_mask, (rows,), vocabulary, wide.device))


def _only(params: SamplingParams, on: Iterable[str]) -> SamplingParams:
    """The settings with those alone in force whose switches are in `on`; seed, order and profile stay."""
    switches, off = set(on), {}
    for name, field in FIELDS.items():
        is_part = switches & set(field.needs or (name,))
        if not is_part and name not in ("seed", "order", "profile"):
            off[name] = 1.0 if name == "temperature" else None
    return dataclasses.replace(params, **off)  # type: ignore[arg-type]


def _said(params: SamplingParams, switch: str) -> str:
    value = getattr(params, switch)
    if isinstance(value, tuple):
        return f"{switch}: {len(value)} ids"
    return f"{switch}={value}"


def _text_of(tokenizer: Any, vocabulary: int) -> Callable[[int], str]:
    if tokenizer is None:
        return lambda token: ""
    if not hasattr(tokenizer, "decode"):
        if not callable(tokenizer):
            raise ConfigError(
                "tokenizer must have decode(ids), or be a function from an id to its text; "
                f"got {type(tokenizer).__name__}"
            )
        return tokenizer  # type: ignore[no-any-return]
    options: dict[str, Any] = {}
    if hasattr(tokenizer, "get_vocab_size"):  # of the package tokenizers, which leaves special tokens out
        size, options = tokenizer.get_vocab_size(), {"skip_special_tokens": False}
    elif hasattr(tokenizer, "__len__"):
        size = len(tokenizer)
    else:
        raise ConfigError(
            "a tokenizer with decode(ids) must tell its size by len(); "
            f"got {type(tokenizer).__name__}: give a function from an id to its text"
        )
    if not _LEAST_SHARE * vocabulary <= size <= vocabulary:
        raise RequestError(
            f"the tokenizer must have the vocabulary of the logits, {vocabulary} tokens (a tenth may be "
            f"padding); got one of {size}: take the tokenizer of the model that made the logits"
        )
    return lambda token: tokenizer.decode([token], **options) if token < size else ""


def explain(
    logits: Any,
    params: SamplingParams,
    tokenizer: Any = None,
    *,
    position: int = 0,
    history: History | None = None,
    completion: int = 0,
    allowed_mask: Any = None,
    state: Any = None,
    top: int = 5,
) -> Explanation:
    """Draw the token of one row as `sample` does, and say how it came about.

    Parameters
    ----------
    logits : (V,) or (1, V) float tensor
    params, position, history, completion, allowed_mask, state
        As for `sample`; `state` also as a number.
    tokenizer : optional
        One of transformers or tokenizers, or a function from a token's id to its text.
    top : int
        How many tokens to name where a list could be long, at least 0.

    Returns
    -------
    Explanation

    Raises
    ------
    ConfigError
        If `params` is not one `SamplingParams`, `tokenizer` is none, or another argument is none that can be
        meant.
    ShapeError
        As for `sample`; and if there is more than one row.
    RequestError
        As for `sample`; and if the tokenizer is of another vocabulary.

    Notes
    -----
    *Randomness*: the same coordinates as the draw that is explained, hence the same token. Costs one draw for
    each stage that is on, and three.
    """
    logits = tensor_of("logits", logits).detach()
    row = logits[None] if logits.ndim == 1 else logits
    if row.ndim != 2 or row.shape[0] != 1:
        raise ShapeError(f"explain takes one row, (V,) or (1, V); got {tuple(logits.shape)}: take one row")
    if not isinstance(params, SamplingParams):
        raise ConfigError(f"explain takes one SamplingParams; got {type(params).__name__}")
    for name, one in (("position", position), ("completion", completion), ("top", top)):
        if whole(one) is None:
            raise ConfigError(f"{name} must be an integer, for there is one row; got {one!r}")
    position, completion, top = int(position), int(completion), int(top)
    if top < 0:
        raise ConfigError(f"top must be at least 0; got {top}")
    if state is not None:
        state = tensor_of("state", state, exact=True)
        state = state_of(state[None] if state.ndim == 0 else state, 1, pack(params).settings)

    def draw(settings: SamplingParams, *need: str, mask: Any = None) -> Sampled:
        return sample(
            row, settings, position, history=history, completion=completion, allowed_mask=mask,
            state=state if "mirostat" in settings.stages else None, need=need, on_bad_row="flag",
        )  # fmt: skip

    full = draw(params, "logprob", "raw_logprob", "rank", "kept", "kept_mass", "entropy", mask=allowed_mask)
    raise_on_bad(full.status, "no token is drawn from another row, so there is nothing to explain")
    params = dataclasses.replace(params, seed=full.seeds[0])
    text_of = _text_of(tokenizer, row.shape[1])
    belief = torch.softmax(row[0].double(), 0)

    def named(ids: Tensor) -> tuple[Named, ...]:
        return tuple((int(i), text_of(int(i)), float(belief[i])) for i in ids)

    on = [name for name in EDITS if not is_off(name, getattr(params, name))]
    edits = _edits(row, params, on, history, allowed_mask, text_of, named, belief, top)
    stages: list[Stage] = []
    temperature = 1.0
    given = draw(_only(params, on), "kept", "kept_mass", "entropy", mask=allowed_mask)
    edited_entropy = _number(given.entropy)
    for stage in params.stages:
        on += [SWITCH[stage]] if stage != "temperature" else ["temperature", "dynatemp_range"]
        left = draw(_only(params, on), "kept", "kept_mass", "entropy", mask=allowed_mask)
        before, after = _ids(given), _ids(left)
        if stage == "temperature":
            temperature = _temperature(params, given)
        if stage != "temperature" or params.greedy or len(after) < len(before):
            gone = before[~torch.isin(before, after)]
            stages.append(
                Stage(_said(params, SWITCH[stage]), len(after), _number(left.kept_mass), temperature,
                      _number(given.entropy), _number(left.entropy), len(gone), named(gone[:top]))
            )  # fmt: skip
        given = left
    token = int(full.tokens[0])
    return Explanation(
        position=position,
        completion=completion,
        seed=full.seeds[0],
        token=token,
        text=text_of(token),
        believed=named(torch.sort(row[0], descending=True, stable=True).indices[:top]),
        edits=edits,
        order=params.stages,
        stages=tuple(stages),
        temperature=temperature,
        probability=math.exp(_number(full.raw_logprob)),
        odds=math.exp(_number(full.logprob)),
        rank=int(_number(full.rank)),
        kept=len(_ids(full)),
        kept_mass=_number(full.kept_mass),
        model_entropy=_number(draw(_only(params, ()), "entropy").entropy),
        edited_entropy=edited_entropy,
        entropy=_number(full.entropy),
        state=None if full.state is None else _known(state),
        next_state=_known(full.state),
    )


def _number(values: Tensor | None) -> float:
    assert values is not None, "it was asked for"
    return float(values[0])


def _known(state: Any) -> float | None:
    """Mirostat's mu, None where it is absent or a new start."""
    value = math.nan if state is None else float(torch.as_tensor(state)[0])
    return None if math.isnan(value) else value


def _ids(found: Sampled) -> Tensor:
    assert found.kept is not None, "it was asked for"
    return found.kept[1]


def _temperature(params: SamplingParams, given: Sampled) -> float:
    """The temperature in force behind its stage, from what that stage was given."""
    if is_off("dynatemp_range", params.dynatemp_range):
        return params.temperature
    numbers = (params.temperature, params.value("dynatemp_range"), params.value("dynatemp_exponent"),
               len(_ids(given)), _number(given.entropy))  # fmt: skip
    return float(dynamic_temperature(*(torch.tensor([value], dtype=torch.float64) for value in numbers)))


def _edits(
    row: Tensor,
    params: SamplingParams,
    on: list[str],
    history: History | None,
    mask: Any,
    text_of: Callable[[int], str],
    named: Callable[[Tensor], tuple[Named, ...]],
    belief: Tensor,
    top: int,
) -> tuple[Edit, ...]:
    """Each edit that is on, by the difference that it makes to the logits behind those before it."""
    steps = [(name, _said(params, name)) for name in on]
    if mask is not None:  # it acts behind the bias
        steps.insert(int("logit_bias" in on), ("", "allowed_mask"))
    found, done = [], []
    before = edited(row, _only(params, ()))[0]
    is_masked = False
    for name, said in steps:
        done += [name] if name else []
        is_masked |= not name
        after = edited(row, _only(params, done), history=history, allowed_mask=mask if is_masked else None)[0]
        gone = ((after == -torch.inf) & (before > -torch.inf)).nonzero()[:, 0]
        moved = ((after != before) & (after > -torch.inf)).nonzero()[:, 0]
        change = (after[moved].double() - before[moved].double()).abs()
        largest = moved[torch.sort(change, descending=True, stable=True).indices]
        likely = gone[torch.sort(belief[gone], descending=True, stable=True).indices]
        found.append(
            Edit(
                said,
                tuple((int(i), text_of(int(i)), float(before[i]), float(after[i])) for i in largest),
                len(gone),
                named(likely[:top]),
            )
        )
        before = after
    return tuple(found)
