"""Speculative decoding: many positions of a text verified at once, and the text that plain decoding gives.

A draft proposes tokens; the target model gives logits behind each of them in one pass. The token of a
position is a function of (logits, seed, position, completion, token id), so the target's own draw can be made
at every position at once. The draft is right as far as it equals these draws. The file knows rows, positions
and pasts; how one token is drawn is in ``twodice.sampling.sample``.

Letters: R rows, D drafted tokens at most, V vocabulary, j a place in the draft.

References
----------
Leviathan, Kalman and Matias 2023, "Fast inference from transformers via speculative decoding"; Chen et al.
2023, "Accelerating large language model decoding with speculative sampling": a drafted token is accepted
with probability min(1, p / q), and a rejected one is drawn again from what is left of p. That keeps the
distribution of the text; which text it is depends on the draft. Here the text itself is the same whatever
the draft was, and the draft's probabilities need not be known. A draft model that draws with the same seed
and positions uses the same noise, so it agrees often: with probability at least (1 - TV) / (1 + TV), TV the
total variation distance of the two distributions, where rejection reaches 1 - TV (Daliri, Musco and Suresh
2024, "Coupling without communication and drafter-invariant speculative decoding").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from twodice.errors import ConfigError, RequestError, ShapeError
from twodice.kernels.sampling_settings import Past, Sampled, told
from twodice.sampling.arrays import FLOATS, integers_of, readable, returned, tensor_of
from twodice.sampling.chain import Packed, each_row, pack
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import (
    History,
    checked_policy,
    coordinate,
    history_of,
    mask_of,
    needs_of,
    raise_on_bad,
    sample,
    state_of,
)


@dataclass(slots=True)
class Verified:
    """What became of R drafts; tensors are on the device of the logits.

    Attributes
    ----------
    accepted : (R,) int64 tensor
        Drafted tokens that are right, from the first on.
    next_tokens : (R,) int64 tensor
        The target's own token behind them; -1 where `status` is not OK.
    tokens : (R, D + 1) int64 tensor
        What is new in each text: the accepted tokens, the next token, then -1.
    status : (R,) int32 tensor
        `Status` of the row from which the next token was drawn.
    seeds : tuple of int
        The seed of each row.
    state : (R,) float64 tensor
        Mirostat's state behind the next token, as in `Sampled`.
    fields : dict of str to (R, D + 1) tensor
        Each field that was asked for, for the tokens at the same place; NaN (rank: -1) behind them.
    """

    accepted: Tensor
    next_tokens: Tensor
    tokens: Tensor
    status: Tensor
    seeds: tuple[int, ...]
    state: Tensor | None
    fields: dict[str, Tensor]

    def __repr__(self) -> str:
        return told(self)


def _at(values: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    return values[rows.to(values.device), places.to(values.device)]


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of `verify`, checked: everything that a draw at (row, place) needs."""

    logits: Tensor  # (R, D + 1, V)
    draft: Tensor  # (R, D) int64 on the CPU, 0 where there is none
    lengths: Tensor  # (R,) drafted tokens
    params: tuple[SamplingParams, ...]
    packed: Packed
    position: Tensor  # (R,)
    completion: Tensor  # (R,)
    past: Past | None
    mask: Tensor | None  # (R, D + 1, words)
    need: tuple[str, ...]

    def draw(self, rows: Tensor, places: Tensor, state: Tensor | None) -> Sampled:
        """Draw at m pairs of row and place, each with the draft before its place as its past."""
        count, width, vocabulary = self.logits.shape
        if len(rows) == count * width:  # everything: no copy
            logits = self.logits.reshape(count * width, vocabulary)
        else:
            logits = _at(self.logits, rows, places)
        mask = None if self.mask is None else _at(self.mask, rows, places)
        one = len(set(self.params)) == 1
        return sample(
            logits,
            self.params[0] if one else tuple(self.params[row] for row in rows.tolist()),
            self.position[rows] + places,
            history=self._history(rows, places),
            completion=self.completion[rows],
            allowed_mask=mask,
            state=state,
            need=self.need,
            on_bad_row="flag",
        )

    def _history(self, rows: Tensor, places: Tensor) -> History | None:
        """The past of each row with the draft up to each place behind it."""
        if self.past is None:
            return None
        own = self.past.offsets.diff()[rows]
        lengths = own + places
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int64)
        offsets[1:] = lengths.cumsum(0)
        pair = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        within = torch.arange(int(offsets[-1])) - offsets[pair]
        drafted = within - own[pair]
        ids = torch.empty_like(within)
        old = drafted < 0
        ids[old] = self.past.ids[self.past.offsets[rows[pair[old]]] + within[old]]
        ids[~old] = self.draft[rows[pair[~old]], drafted[~old]]
        if self.past.prompts is None:
            return ids, offsets
        return ids, offsets, self.past.prompts[rows]


def verify(
    logits: Any,
    draft_tokens: Any,
    params: SamplingParams | Sequence[SamplingParams],
    position: int | Tensor | Sequence[int],
    *,
    history: History | None = None,
    completion: int | Tensor | Sequence[int] = 0,
    allowed_mask: Any = None,
    state: Any = None,
    need: Iterable[str] = (),
    on_bad_row: Literal["raise", "flag"] | None = None,
) -> Verified:
    """Accept what is right of drafted tokens, and draw the next: the text is that of plain decoding.

    Parameters
    ----------
    logits : (R, D + 1, V) float tensor or array
        Of the target model: ``logits[:, 0]`` behind the text so far, ``logits[:, j]`` behind j drafted
        tokens.
    draft_tokens : (R, D) integers
        What the draft proposes; a shorter draft ends in -1, or is the shorter one, or None, of a list.
        Where it came from does not matter.
    params, position, history, completion, state, need, on_bad_row
        As for `sample`: a seed in every row, the position of ``draft_tokens[:, 0]``, the history without the
        draft (each place sees the drafted tokens before it too). Rows with a `state` are drawn place by
        place, for it moves with every token. ``kept`` cannot be had. A bad row counts only where the text
        comes to it: what is behind a wrong token does not.
    allowed_mask : (R, D + 1, ceil(V / 32)) int32 tensor, optional
        As for `sample`, one for each place: a grammar that has gone on through the draft.

    Returns
    -------
    Verified
        ``tokens`` may go on behind a stop token that was accepted: cut a text as in plain decoding.

    Raises
    ------
    ShapeError
        As for `sample`; and if a draft goes on behind -1.
    RequestError
        As for `sample`; and where a row has no seed, or a drafted token is out of bounds.
    ConfigError
        As for `sample`; and if ``kept`` is asked for.

    Notes
    -----
    *Randomness*: at each position the target's own draw, as `sample` makes it; no other randomness, and
    none that depends on the draft. Equal to plain decoding token for token wherever the logits are equal to
    the bit. Draft with `sample`, the same seed, positions and completions: the noise is then shared, and two
    near distributions agree far more often than two independent draws would. Leviathan et al. 2023; Chen et
    al. 2023; by common noise and not by rejection: Daliri, Musco and Suresh 2024.

    Examples
    --------
    >>> import torch
    >>> from twodice import SamplingParams, sample, verify
    >>> logits = torch.zeros(1, 3, 1000)
    >>> plain = [int(sample(logits[:, j], SamplingParams(seed=7), j).tokens) for j in range(3)]
    >>> found = verify(logits, [[plain[0], 5]], SamplingParams(seed=7), 0)
    >>> found.accepted.tolist(), found.tokens.tolist() == [[plain[0], plain[1], -1]]
    ([1], True)
    """
    if not isinstance(logits, Tensor):
        found = verify(
            tensor_of("logits", logits),
            draft_tokens,
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
    checked_policy(on_bad_row)
    call = _checked(
        readable("logits", logits), draft_tokens, params, position, history, completion, allowed_mask, need
    )
    rows, width = logits.shape[:2]
    start = state_of(state, rows, call.packed.settings)
    out = {"tokens": torch.full((rows, width), -1, dtype=torch.int64),
           "status": torch.zeros((rows, width), dtype=torch.int32)}  # fmt: skip
    for name in call.need:
        out[name] = (
            torch.full((rows, width), -1, dtype=torch.int64)
            if name == "rank"
            else torch.full((rows, width), torch.nan, dtype=torch.float64)
        )
    moves = torch.from_numpy(call.packed.settings.moves).expand(rows)
    reached = torch.arange(width) <= call.lengths[:, None]
    still = (reached & ~moves[:, None]).nonzero()
    _put(out, still[:, 0], still[:, 1], call, None)
    moved = _step_by_step(out, call, moves, start) if bool(moves.any()) else None

    right = (out["tokens"][:, :-1] == call.draft) & reached[:, 1:]
    accepted = right.to(torch.int64).cumprod(1).sum(1)
    every = torch.arange(rows)
    status = out["status"][every, accepted]
    policy = on_bad_row if on_bad_row is not None else ("raise" if logits.device.type == "cpu" else "flag")
    if policy == "raise":
        raise_on_bad(status)
    behind = torch.arange(width) > accepted[:, None]
    for values in out.values():
        values[behind] = -1 if not values.is_floating_point() else torch.nan
    at = logits.device
    return Verified(
        accepted.to(at),
        out["tokens"][every, accepted].to(at),
        out["tokens"].to(at),
        status.to(at),
        tuple(one.seed for one in call.params if one.seed is not None),
        None if moved is None else moved.to(at),
        {name: out[name].to(at) for name in call.need},
    )


def _padded(drafts: Sequence[Any], rows: int, most: int) -> Tensor:
    """(R, D) int64 of a list of drafts, None or shorter where one stopped early."""
    if len(drafts) != rows:
        raise ShapeError(f"draft_tokens must be one draft a row, {rows}; got {len(drafts)}")
    found = torch.full((rows, most), -1, dtype=torch.int64)
    for i, one in enumerate(drafts):
        ids = integers_of(f"row {i} of draft_tokens", [] if one is None else one)
        if ids.ndim != 1 or len(ids) > most:
            raise ShapeError(
                f"row {i} of draft_tokens must be at most {most} integers, one fewer than logits; "
                f"got shape {tuple(ids.shape)}"
            )
        found[i, : len(ids)] = ids
    return found


def _checked(
    logits: Tensor,
    draft_tokens: Any,
    params: SamplingParams | Sequence[SamplingParams],
    position: Any,
    history: History | None,
    completion: Any,
    allowed_mask: Any,
    need: Iterable[str],
) -> _Call:
    if logits.ndim != 3 or logits.shape[1] == 0 or logits.shape[2] == 0 or logits.dtype not in FLOATS:
        raise ShapeError(
            "logits must be (rows, drafted tokens + 1, vocabulary) 16-, 32- or 64-bit floats; "
            f"got {tuple(logits.shape)} of {logits.dtype}"
        )
    rows, width, vocabulary = logits.shape
    must = f"({rows}, {width - 1}) integers, one fewer a row than logits"
    if isinstance(draft_tokens, list | tuple):
        draft_tokens = _padded(draft_tokens, rows, width - 1)
    draft = integers_of("draft_tokens", draft_tokens, must)
    if draft.shape != (rows, width - 1):
        raise ShapeError(f"draft_tokens must be {must}; got shape {tuple(draft.shape)}")
    beyond = (draft < -1) | (draft >= vocabulary)
    if bool(beyond.any()):
        row = int(beyond.any(1).to(torch.int8).argmax())
        raise RequestError(
            f"draft_tokens must be in [0, {vocabulary}), or -1 behind the end; "
            f"row {row} has {int(draft[row][beyond[row]][0])}"
        )
    there = draft >= 0
    lengths = there.sum(1)
    behind = there & (torch.arange(width - 1) >= lengths[:, None])
    if bool(behind.any()):
        row = int(behind.any(1).to(torch.int8).argmax())
        raise ShapeError(
            f"a shorter draft must end in -1, with no token behind the first -1; row {row} is "
            f"{draft[row].tolist()}"
        )
    given = each_row(params, rows)
    packed = pack(given) if rows else pack(SamplingParams(seed=0))
    if not packed.all_seeded:
        raise RequestError(
            "verify needs a seed in every row, the one that the draft drew with; got None: give one"
        )
    asked = needs_of(need)
    if "kept" in asked:
        raise ConfigError("kept cannot be had from verify; drop it, or ask sample for it")

    def one_a_row(value: Any, name: str) -> Tensor:
        found = coordinate(value, rows, name)
        return torch.full((rows,), found, dtype=torch.int64) if isinstance(found, int) else found

    return _Call(
        logits,
        draft.clamp(min=0),
        lengths,
        given,
        packed,
        one_a_row(position, "position"),
        one_a_row(completion, "completion"),
        history_of(history, packed.settings, rows, vocabulary),
        mask_of(allowed_mask, (rows, width), vocabulary, logits.device),
        asked,
    )


def _put(
    out: dict[str, Tensor], rows: Tensor, places: Tensor, call: _Call, state: Tensor | None
) -> Tensor | None:
    """Draw at these places and write what came into `out`; return the states behind."""
    if not len(rows):
        return state
    drawn = call.draw(rows, places, state)
    for name, values in out.items():
        values[rows, places] = getattr(drawn, name).cpu()
    return None if drawn.state is None else drawn.state.cpu()


def _step_by_step(out: dict[str, Tensor], call: _Call, moves: Tensor, start: Tensor | None) -> Tensor:
    """Rows whose state moves with every token: one place after the other, as long as the draft is right."""
    state = torch.full((len(moves),), torch.nan, dtype=torch.float64) if start is None else start.clone()
    live = moves.nonzero()[:, 0]
    for place in range(call.logits.shape[1]):
        behind = _put(out, live, torch.full_like(live, place), call, state[live])
        if behind is not None:
            state[live] = behind
        if place == call.draft.shape[1]:
            break
        right = (call.lengths[live] > place) & (out["tokens"][live, place] == call.draft[live, place])
        live = live[right]
    return state
