"""A vocabulary that is split over machines: what each must send so that the token is that of the whole.

A shard holds the logits of the ids [begin, end). It sends logits as they came, of every id that could still
matter; `merge_shards` writes them into rows that are -inf elsewhere and calls `sample`. So whatever decides
is decided in one place by one rule, and all that is to be shown is that no id that was left out could have
mattered:

===================================== ====================================================================
first stage that drops tokens         a shard sends
===================================== ====================================================================
none                                  its highest logit, and the ids whose score z + g lies within 1e-9 of
                                      its best score: almost always two ids
temperature 0                         the ids that share its highest logit
top-k                                 its k highest logits, with the ties of the last
min-p                                 the ids that its own highest logit leaves
anything else, and dynatemp           every id that the edits leave: the stage reads a sum over all of them
===================================== ====================================================================

With "none", z is counted from the shard's highest logit and not from the row's: it is off by one number for
all ids of the shard, up to rounding. The row's highest token scores at least -3.8 and no noise is above 45.1,
so the ids that count lie within 49 of the top, where that rounding stays below 1e-13.

For "none" the kernel draws twice on the shard, the second time without the first winner. Where the two
scores are that near, about once in a billion rows, the scores of all ids are computed.

Letters: R rows, V vocabulary, n ids of a shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from twodice.errors import ConfigError, RequestError, ShapeError
from twodice.kernels.sampling import choose, gumbel
from twodice.kernels.sampling_edit import edit
from twodice.kernels.sampling_settings import MAX_VOCABULARY, Draw, Past, Rule, Sampled, Settings, Stage
from twodice.sampling.arrays import FLOATS, tensor_of
from twodice.sampling.chain import each_row, pack
from twodice.sampling.fields import whole
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import History, coordinate, history_of, ids_beyond, mask_of, needs_of, sample

MARGIN = 1e-9
"""Scores nearer than this are left to the merge, which counts z from the top of the whole row."""
_SUMS = {"raw_logprob", "temperature_logprob", "temperature_entropy", "kept_mass"}
"""What is counted over everything that lives, whatever the filters leave."""
_KEPT = {"rank", "kept", "logprob", "entropy"}
"""What is counted over the kept set: all of the row where there is no filter."""


@dataclass(frozen=True, slots=True)
class ShardCandidates:
    """What one shard sends: row i has the logits ``logits[offsets[i]:offsets[i + 1]]`` of ids ``ids[...]``.

    Plain tensors on the CPU and numbers: any transport that carries Python objects or arrays will do.

    Attributes
    ----------
    begin, end, vocabulary : int
        The shard holds the ids [begin, end) of [0, vocabulary).
    offsets : (R + 1,) int64 tensor
    ids : (m,) int64 tensor
        Ids of the whole vocabulary, rising within a row.
    logits : (m,) float32 or float64 tensor
        As they came, before every stage.
    need : tuple of str
        The fields that may be asked of the merge.
    call : bytes
        A digest of the settings, positions and completions that decided what is sent. A merge of others would
        draw from what these left, and nothing would show it.
    """

    begin: int
    end: int
    vocabulary: int
    offsets: Tensor
    ids: Tensor
    logits: Tensor
    need: tuple[str, ...]
    call: bytes


@lru_cache(maxsize=4096)
def _told(params: SamplingParams) -> bytes:
    return repr(params).encode()  # what is set, alike in every process, as hash() is not


def _call(
    each: Sequence[SamplingParams],
    position: int | Tensor,
    completion: int | Tensor,
    past: Past | None,
    mask: Tensor | None,
) -> bytes:
    """The digest of a call: settings and coordinates of each row, the history where one is read, the mask."""
    found = hashlib.blake2b(b"\n".join(map(_told, each)), digest_size=8)
    rows = len(each)
    ones = [torch.full((rows,), at) if isinstance(at, int) else at for at in (position, completion)]
    ones += [] if past is None else [past.ids, past.offsets]
    ones += [] if past is None or past.prompts is None else [past.prompts]
    for one in [*ones, *([] if mask is None else [mask.contiguous()])]:
        found.update(repr(one.shape).encode())
        found.update(one.numpy().tobytes())
    return found.digest()


def shard_candidates(
    logits: Any,
    params: SamplingParams | Sequence[SamplingParams],
    position: int | Tensor | Sequence[int],
    *,
    begin: int,
    vocabulary: int,
    history: History | None = None,
    completion: int | Tensor | Sequence[int] = 0,
    allowed_mask: Any = None,
    need: Iterable[str] = (),
) -> ShardCandidates:
    """Choose what a shard must send for `merge_shards`.

    Parameters
    ----------
    logits : (R, n) float tensor or array
        Of the ids ``begin`` to ``begin + n - 1``.
    params, position, history, completion, allowed_mask
        As for `sample`, of the whole vocabulary and the same on every shard.
    begin, vocabulary : int
        Where the shard begins, and how many ids there are in all.
    need : names of `Sampled` fields
        What the merge will be asked for. Log-probabilities of the model and of the temperature, their
        entropy and the kept mass are sums over the whole row, so each of these makes every shard send all it
        has; the other fields do so where no stage drops tokens.

    Returns
    -------
    ShardCandidates

    Raises
    ------
    ConfigError, ShapeError, RequestError
        As for `sample`; and where a row has no seed, which every shard must know.

    Notes
    -----
    *Randomness*: that of `sample`, and no other: noise is a function of (seed, position, completion, token
    id), so every shard knows that of its own ids. The largest of the shards' winners is the winner of the
    whole (Gumbel 1954; Maddison, Tarlow and Minka 2014).
    """
    shard = tensor_of("logits", logits).detach()
    if shard.ndim != 2 or shard.dtype not in FLOATS:
        raise ShapeError(
            f"logits must be (rows, ids of the shard) floats of 16, 32 or 64 bits; got {tuple(shard.shape)} "
            f"of {shard.dtype}"
        )
    rows, n = shard.shape
    for name, number in (("begin", begin), ("vocabulary", vocabulary)):
        if whole(number) is None:
            raise ShapeError(f"{name} must be an integer; got {number!r}")
    begin, vocabulary = int(begin), int(vocabulary)
    if not 0 < vocabulary <= MAX_VOCABULARY or not 0 <= begin <= vocabulary - n:
        raise ShapeError(
            f"a shard must lie in the vocabulary, which is at most 2^20; got ids {begin} to {begin + n} of "
            f"{vocabulary}"
        )
    given = each_row(params, rows)
    asked = needs_of(need)
    packed = pack(given) if rows else pack(SamplingParams(seed=0))
    if not packed.all_seeded:
        raise RequestError(
            "each row of a shard must have a seed, or the shards draw different noise; got None: give one "
            "and the same seed to all shards"
        )
    settings = packed.settings
    if settings.highest_id >= vocabulary:
        raise ids_beyond(given, vocabulary)
    past = history_of(history, settings, rows, vocabulary)
    mask = mask_of(allowed_mask, (rows,), vocabulary, torch.device("cpu"))
    where, which = coordinate(position, rows, "position"), coordinate(completion, rows, "completion")
    raw = shard.to("cpu", torch.float64 if shard.dtype == torch.float64 else torch.float32)
    edited = _edited(raw, settings, past, mask, begin, vocabulary)
    counts = _what_counts(raw, edited, given, frozenset(asked), Draw(packed.keys, where, which), begin)
    offsets = torch.searchsorted(counts, torch.arange(rows + 1) * n)
    row = torch.repeat_interleave(torch.arange(rows), offsets.diff())
    column = counts - row * n
    return ShardCandidates(
        begin,
        begin + n,
        vocabulary,
        offsets,
        column + begin,
        raw[row, column],
        asked,
        _call(given, where, which, past, mask),
    )


def _edited(
    raw: Tensor, settings: Settings, past: Past | None, mask: Tensor | None, begin: int, vocabulary: int
) -> Tensor:
    """Stages 2 and 3 on the shard. They name ids of the whole, so they run in a row of the whole."""
    if not settings.ids.size and past is None and mask is None:
        return raw
    whole = raw.new_full((raw.shape[0], vocabulary), -torch.inf)
    whole[:, begin : begin + raw.shape[1]] = raw
    mask = None if mask is None else mask.cpu()
    return edit(whole, settings, past, mask)[:, begin : begin + raw.shape[1]]


@lru_cache(maxsize=4096)
def _first_filter(params: SamplingParams, asked: frozenset[str]) -> dict[str, Any]:
    """The row of settings (see `Settings.pack`) that leaves what a shard sends; none where that is all."""
    row = pack(params).settings.rows[0]
    stages = [Stage(code) for code in row["stages"] if code]
    if asked & _SUMS or (Stage.TOP_P in stages and row["rules"] & Rule.JOINT):
        return {}
    temperature = {"temperature": 1.0}
    for stage in stages:
        if stage == Stage.GREEDY:  # all of its ties, of which the merge takes one
            return {"stages": (Stage.MIN_P,), "log_min_p": 0.0}
        if stage == Stage.TOP_K:
            return {"stages": (Stage.TOP_K,), "top_k": int(row["top_k"]), "rules": int(Rule.TIES_AT_K)}
        if stage == Stage.MIN_P:  # the row's top is not below ours, so its z is not above ours
            return {
                "stages": (Stage.TEMPERATURE, Stage.MIN_P),
                "log_min_p": float(row["log_min_p"]),
                **temperature,
            }
        if stage != Stage.TEMPERATURE:
            return {}
        temperature = {"temperature": float(row["temperature"])}
    return {} if asked & _KEPT else {"stages": (Stage.TEMPERATURE,), **temperature}


def _what_counts(
    raw: Tensor,
    edited: Tensor,
    given: Sequence[SamplingParams],
    asked: frozenset[str],
    draw: Draw,
    begin: int,
) -> Tensor:
    """Places, row * n + column, of the (R, n) logits that may matter, rising; rows of one kind at once."""
    rows, n = raw.shape
    filters = [_first_filter(one, asked) for one in given]
    kinds: dict[tuple[Stage, ...], list[int]] = {}
    for i, one in enumerate(filters):
        kinds.setdefault(one.get("stages", ()), []).append(i)
    places = [torch.empty(0, dtype=torch.int64)]
    for stages, some in kinds.items() if n else ():
        at = torch.tensor(some)

        def pick(x: Tensor, at: Tensor = at) -> Tensor:
            return x if len(at) == rows else x[at]

        x = pick(edited)
        if not stages:
            living = pick(raw) if "raw_logprob" in asked else x
            places.append((living > -torch.inf).reshape(-1).nonzero()[:, 0])
            if len(at) < rows:
                places[-1] += (at - torch.arange(len(at)))[places[-1] // n] * n
            continue
        if stages == (Stage.TEMPERATURE,):
            temperature = torch.tensor([filters[i]["temperature"] for i in some], dtype=torch.float64)
            own = Draw(pick(draw.keys), *_coordinates(draw, pick))
            row, column = _scores_that_count(x, temperature[:, None], own, begin)
        else:
            row, column = _kept(x, tuple(tuple(filters[i].items()) for i in some))
        places.append(at[row] * n + column)
    for x in (raw,) if edited is raw else (raw, edited):
        # A row that cannot be served says so in the merge too; the maximum is NaN where one logit is.
        bad = (~(x.amax(1) < torch.inf)).nonzero()[:, 0] if n else places[0]
        row, column = (~(x[bad] < torch.inf)).nonzero().unbind(1)
        places.append(bad[row] * n + column)
    found = [one for one in places if len(one)]
    # What lives is found in order and once; the rest is short.
    return found[0] if len(found) == 1 and kinds.keys() == {()} else torch.cat(places).unique()


def _coordinates(draw: Draw, pick: Any) -> tuple[int | Tensor, int | Tensor]:
    position, completion = (
        one if isinstance(one, int) else pick(one).contiguous() for one in (draw.position, draw.completion)
    )
    return position, completion


def _kept(x: Tensor, filters: tuple[tuple[tuple[str, Any], ...], ...]) -> tuple[Tensor, Tensor]:
    """Rows and columns of what the filters keep, by the kernel."""
    settings = _settings(filters[:1] if filters == filters[:1] * len(filters) else filters)
    chosen, _ = choose(x, settings, Draw(torch.zeros(1, dtype=torch.int64), 0, 0), need=("kept",))
    assert chosen.kept is not None
    offsets, column = chosen.kept
    return torch.repeat_interleave(torch.arange(len(x)), offsets.diff()), column


@lru_cache(maxsize=256)
def _settings(filters: tuple[tuple[tuple[str, Any], ...], ...]) -> Settings:
    return Settings.pack([dict(one) for one in filters])


def _z(x: Tensor, top: Tensor, temperature: Tensor) -> Tensor:
    # In float64, operation by operation as the chain does it.
    return (x.to(torch.float64) - top.to(torch.float64)) / temperature


def _scores_that_count(x: Tensor, temperature: Tensor, draw: Draw, begin: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the highest logit of each row, and of the ids whose score is near the best: by two
    draws, and by all noise where these are near.

    The second draw counts z from another top if the first winner was the top: it can name an id whose score
    is 1e-13 below the true second, which is within the margin all the same.
    """
    rows, n = x.shape
    settings = _settings(
        tuple((("stages", (Stage.TEMPERATURE,)), ("temperature", one)) for one in temperature[:, 0].tolist())
    )
    wide = x.new_full((rows, begin + n), -torch.inf)  # noise belongs to the id, so ids keep their places
    wide[:, begin:] = x
    first = choose(wide, settings, draw)[0].tokens
    at = (first >= 0).nonzero()[:, 0]  # not so where a row is empty or cannot be served
    wide[at, first[at]] = -torch.inf
    second = choose(wide, settings, draw)[0].tokens
    top = x.argmax(1, keepdim=True)
    alive = (x.gather(1, top)[:, 0] > -torch.inf).nonzero()[:, 0]
    row, column = [alive, at], [top[alive, 0], first[at] - begin]

    def scores(rows: Tensor, ids: Tensor) -> Tensor:
        z = _z(x[rows[:, None], ids - begin], x.gather(1, top)[rows], temperature[rows])
        position, completion = _coordinates(draw, lambda one: one[rows, None])
        return z + gumbel(ids, position, completion, draw.keys[rows, None])

    at = (second >= 0).nonzero()[:, 0]
    found = scores(at, torch.stack([first, second], 1)[at])
    for one in at[~(found[:, 0] - found[:, 1] > 2 * MARGIN)][:, None]:
        found = scores(one, torch.arange(begin, begin + n)[None])
        column.append((found[0] >= found.max() - MARGIN).nonzero()[:, 0])
        row.append(one.expand(len(column[-1])))
    return torch.cat(row), torch.cat(column)


def merge_shards(
    parts: Sequence[ShardCandidates],
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
    """Draw from a vocabulary of which each part was held by a shard; equal to `sample` on the whole.

    Parameters
    ----------
    parts : sequence of ShardCandidates
        One of every shard, in any order; together they must cover the vocabulary.
    params, position, history, completion, allowed_mask, state, on_bad_row
        As for `sample`, and as given to the shards.
    need : names of `Sampled` fields
        Of those that the shards were told of.

    Returns
    -------
    Sampled
        On the CPU. Tokens, statuses, ranks, kept sets and states are those of `sample` on the whole row; the
        other numbers agree to the order of summation.

    Raises
    ------
    ShapeError
        As for `sample`; and if the parts leave ids out, overlap, or differ in rows, vocabulary or type.
    ConfigError
        As for `sample`; and if a field is needed that a shard was not told of.
    RequestError
        As for `sample`; and if settings, coordinates, history or mask are not those of the shards.

    Notes
    -----
    *Randomness*: see `shard_candidates`. Every machine that merges the same parts has the same token, so
    the token itself need not be sent.
    """
    every = tuple(parts) if isinstance(parts, Iterable) else (parts,)
    for part in every:
        if not isinstance(part, ShardCandidates):
            raise ShapeError(f"parts must be what shard_candidates returned; got {type(part).__name__}")
    ordered = sorted(every, key=lambda part: (part.begin, part.end))
    asked = needs_of(need)
    if not ordered:
        raise ShapeError("parts must be one of every shard; got none")
    rows, vocabulary = len(ordered[0].offsets) - 1, ordered[0].vocabulary
    seams = [0, *(part.end for part in ordered)]
    if [part.begin for part in ordered] != seams[:-1] or seams[-1] != vocabulary:
        spans = ", ".join(f"[{part.begin}, {part.end})" for part in ordered)
        raise ShapeError(f"parts must cover the ids [0, {vocabulary}) once each; got {spans}")
    for part in ordered:
        if len(part.offsets) != rows + 1 or part.vocabulary != vocabulary:
            raise ShapeError(
                f"parts must be of the same rows and vocabulary; got {rows} rows of {vocabulary} ids and "
                f"{len(part.offsets) - 1} rows of {part.vocabulary} ids"
            )
        if part.logits.dtype != ordered[0].logits.dtype:
            raise ShapeError(
                f"parts must have logits of one type; got {ordered[0].logits.dtype} and {part.logits.dtype}"
            )
        missing = [name for name in asked if name not in part.need]
        if missing:
            raise ConfigError(
                f"{missing[0]} needs what the shards did not send; give need=({missing[0]!r},) to "
                "shard_candidates too"
            )
    given = each_row(params, rows)
    where, which = coordinate(position, rows, "position"), coordinate(completion, rows, "completion")
    settings = pack(given).settings if rows else pack(SamplingParams()).settings
    past = history_of(history, settings, rows, vocabulary)
    mask = mask_of(allowed_mask, (rows,), vocabulary, torch.device("cpu"))
    call = _call(given, where, which, past, mask)
    if any(part.call != call for part in ordered):
        raise RequestError(
            "params, position, completion, history and allowed_mask of a merge must be those that every "
            "shard was given; got others: what the shards left out was chosen by theirs"
        )
    whole = torch.full((rows, vocabulary), -torch.inf, dtype=ordered[0].logits.dtype)
    for part in ordered:
        row = torch.repeat_interleave(torch.arange(rows), part.offsets.diff())
        whole[row, part.ids] = part.logits
    return sample(
        whole,
        given,
        position,
        history=history,
        completion=completion,
        allowed_mask=allowed_mask,
        state=state,
        need=asked,
        on_bad_row=on_bad_row,
    )
