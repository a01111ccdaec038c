"""Our chain inside transformers' ``generate``: a logits processor that leaves one token a row to draw.

The only file here that imports transformers at its top; it is imported when it is used. It knows prompts,
padding and completions; the chain itself is `sample`.

Letters: R rows of ``generate``, P prompts, n completions of a prompt (R = P n), T tokens of a row with its
padding, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

from twodice.errors import ConfigError, ContractError, RequestError, ShapeError
from twodice.sampling.arrays import tensor_of
from twodice.sampling.chain import settings_of
from twodice.sampling.fields import whole
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import SEED_BITS, History, sample


class Processor(LogitsProcessor):
    """Draws by `sample` and lets ``generate`` see nothing else; made by `processor`, which says how.

    Attributes
    ----------
    seeds : tuple of int
        The seed of each prompt of the text in the making, given or made; with it the text can be had again.
    status : (R,) int32 tensor, or None before the first call
        The first `Status` of each row that was not OK, with ``on_bad_row="flag"``.
    """

    supports_continuous_batching = False  # rows come and go there, and settings are per row of one batch

    def __init__(
        self,
        params: SamplingParams | tuple[SamplingParams, ...],
        n: int | None,
        attention_mask: Tensor | None,
        pad_token_id: int | None,
        on_bad_row: Literal["raise", "flag"],
    ) -> None:
        self.params, self.n = params, n
        self.attention_mask, self.pad_token_id, self.on_bad_row = attention_mask, pad_token_id, on_bad_row
        self.reset()

    def reset(self) -> None:
        """Forget the text in the making, its made-up seeds and mirostat's state."""
        self.seeds: tuple[int, ...] = ()
        self.status: Tensor | None = None
        self._rows: tuple[SamplingParams, ...] = ()
        self._last: Tensor | None = None  # (R, T) ids of the last call
        self._prompt: Tensor | None = None  # the ids of the first
        self._padding = self._completion = torch.empty(0, dtype=torch.int64)  # (R,) each
        self._state: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._goes_on(input_ids) and not self._taken_back(input_ids):
            self._begin(input_ids, scores.shape[1])
        self._last = input_ids.clone()
        drawn = sample(
            scores,
            self._rows,
            input_ids.shape[1] - self._padding,
            history=self._history(input_ids),
            completion=self._completion,
            state=self._state,
            on_bad_row=self.on_bad_row,
        )
        self._state = drawn.state
        tokens = drawn.tokens
        if self.on_bad_row == "flag":
            assert self.status is not None and self.pad_token_id is not None, "checked when we began"
            self.status = torch.where(self.status == 0, drawn.status.cpu(), self.status)
            tokens = torch.where(tokens < 0, self.pad_token_id, tokens)
        # 0 and -inf pass unchanged through whatever processor follows: temperature, penalties, every filter.
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, tokens.to(scores.device)[:, None], 0.0)

    def _goes_on(self, ids: Tensor) -> bool:
        last = self._last
        return last is not None and ids.shape[1] == last.shape[1] + 1 and torch.equal(ids[:, :-1], last)

    def _taken_back(self, ids: Tensor) -> bool:
        """Whether this is the text in the making with tokens of a draft taken back, as assistants do."""
        last, prompt = self._last, self._prompt
        if last is None or prompt is None or len(ids) != len(last):
            return False
        width, first = ids.shape[1], prompt.shape[1]
        if not first < width <= last.shape[1] + 1 or not torch.equal(ids[:, :first], prompt):
            return False
        if width > last.shape[1]:
            if len(ids) == 1:
                return False
            raise ContractError(
                "a processor serves rows that stay where they are; got the prompts of the text in the making "
                "with the rows behind them moved, as num_beams above 1 does: leave it at 1 (or reset() "
                "before a new text)"
            )
        if not torch.equal(ids[:, :-1], last[:, : width - 1]):
            return False
        if self._state is not None:
            raise ContractError(
                "mirostat's state goes forward only; got a text of which tokens were taken back, as assisted "
                "generation does: leave out the assistant or mirostat_tau (or reset() before a new text)"
            )
        return True

    def _begin(self, ids: Tensor, vocabulary: int) -> None:
        """A new text: what depends on its prompts, once."""
        if ids.shape[1] == 0:
            raise RequestError(
                "the ids of the prompts must be there, the position of a token counts them; got none, as "
                "generate(inputs_embeds=...) without ids has: give input_ids beside it"
            )
        if self.pad_token_id is not None and self.pad_token_id >= vocabulary:
            raise RequestError(
                f"pad_token_id must be in [0, {vocabulary}), the vocabulary of the logits; got "
                f"{self.pad_token_id}, which no prompt has: give the id that pads them, or attention_mask"
            )
        if self.attention_mask is not None and self._prompt is not None:
            if not torch.equal(ids, self._prompt):
                raise ContractError(
                    "a processor with an attention_mask serves the prompts of that mask only; got other "
                    "prompts, or a generation that moves rows (beams): make one for each call"
                )
        self.reset()
        rows = ids.shape[0]
        self._padding = self._left_padding(ids)
        n = self._completions(ids)
        each = (self.params,) * (rows // n) if isinstance(self.params, SamplingParams) else self.params
        seeded = [
            dataclasses.replace(p, seed=secrets.randbits(SEED_BITS)) if p.seed is None else p for p in each
        ]
        self._rows = tuple(p for p in seeded for _ in range(n))
        self.seeds = tuple(p.seed for p in seeded if p.seed is not None)
        self._completion = torch.arange(rows) % n
        self._prompt = ids.clone()
        self.status = torch.zeros(rows, dtype=torch.int32)

    def _left_padding(self, ids: Tensor) -> Tensor:
        """How many columns on the left of each row are no tokens, (R,) int64."""
        rows, width = ids.shape
        if self.attention_mask is not None:
            real = self.attention_mask != 0
            if real.shape[1] != width or rows % max(real.shape[0], 1):
                raise ShapeError(
                    f"attention_mask must be that of the prompts, (prompts, {width}) for {rows} rows; "
                    f"got {tuple(real.shape)}"
                )
            real = real.repeat_interleave(rows // real.shape[0], 0)
        elif self.pad_token_id is not None:
            real = (ids != self.pad_token_id).cpu().cummax(1).values
        else:
            return torch.zeros(rows, dtype=torch.int64)
        return width - real.sum(1)

    def _completions(self, ids: Tensor) -> int:
        """How many rows in succession are completions of one prompt."""
        rows = ids.shape[0]
        prompts = None
        if not isinstance(self.params, SamplingParams):
            prompts = len(self.params)
        elif self.attention_mask is not None:
            prompts = self.attention_mask.shape[0]
        if self.n is not None:
            if rows % self.n or prompts not in (None, rows // self.n):
                told = "" if prompts is None else f" and {prompts} prompts"
                raise ShapeError(
                    f"n must be num_return_sequences, how many rows each prompt has; got n={self.n}{told} "
                    f"for {rows} rows: give generate num_return_sequences={self.n}, or another n here"
                )
            n = self.n
        elif prompts is not None:
            if prompts == 0 or rows % prompts:
                raise ShapeError(
                    f"params and attention_mask must have one row for each prompt; got {prompts} of them "
                    f"for {rows} rows"
                )
            n = rows // prompts
        else:
            self._refuse_twins(ids)
            return 1
        groups = ids.reshape(rows // n, n, -1)
        if not bool((groups == groups[:, :1]).all()):
            raise ShapeError(
                f"each {n} rows in succession must have one prompt, as num_return_sequences={n} makes them; "
                "got different ones"
            )
        return n

    def _refuse_twins(self, ids: Tensor) -> None:
        """One seed for all and two equal prompts in succession: they would have one noise and one text."""
        assert isinstance(self.params, SamplingParams)
        if self.params.seed is None or self.params.greedy or len(ids) < 2:
            return
        twins = (ids[1:] == ids[:-1]).all(1)
        if bool(twins.any()):
            first = int(twins.nonzero()[0])
            raise RequestError(
                f"rows {first} and {first + 1} have one prompt and one seed, so they would have one text; "
                "give n=num_return_sequences, params of other seeds, or n=1 if this is meant"
            )

    def _history(self, ids: Tensor) -> History | None:
        if not any(p.needs_history for p in self._rows):
            return None
        assert self._prompt is not None, "begun"
        width, prompt = ids.shape[1], self._prompt.shape[1]
        ids = ids.cpu()
        offsets = torch.zeros(len(ids) + 1, dtype=torch.int64)
        offsets[1:] = (width - self._padding).cumsum(0)
        return ids[torch.arange(width) >= self._padding[:, None]], offsets, prompt - self._padding


def processor(
    params: SamplingParams | Sequence[SamplingParams],
    *,
    n: int | None = None,
    attention_mask: Any = None,
    pad_token_id: int | None = None,
    on_bad_row: Literal["raise", "flag"] = "raise",
) -> Processor:
    """Make ``model.generate(..., logits_processor=[twodice.processor(params)])`` draw by `sample`.

    The processor draws the token and hands on 0 for it and -inf for all others, so that ``generate`` takes it
    with ``do_sample`` true or false, and nothing that follows in its list can change it. What its generation
    config puts *before* processors of the caller (repetition penalty, bad words, ...) acts on the logits that
    we are given; leave these unset and give them here.

    Parameters
    ----------
    params : SamplingParams, or one a prompt
        How tokens are drawn.
    n : int, optional
        ``num_return_sequences``: rows i n to i n + n - 1 are the completions 0 to n - 1 of prompt i. Not
        needed where `params` is a sequence or `attention_mask` is given, which tell the number of prompts.
    attention_mask : (P, T) tensor, optional
        The mask that ``generate`` is given with the prompts. Prompts that are padded on the left draw the
        tokens that they draw alone only if it is known where they begin.
    pad_token_id : int, optional
        In [0, V). In place of a mask: leading columns with this id are padding. With ``on_bad_row="flag"``:
        the token that a bad row gets.
    on_bad_row : "raise" or "flag"
        For rows with NaN, with +inf, or with nothing left. "flag" gives them `pad_token_id`, which must be
        there, and notes it in `Processor.status`.

    Returns
    -------
    Processor

    Raises
    ------
    ConfigError
        If an argument is none that can be meant.
    ShapeError
        If `attention_mask` is no mask of padding on the left; in ``generate``: if its rows do not fit
        `params`, `n` or `attention_mask`.
    RequestError
        In ``generate``: if there are no ids, `pad_token_id` is not in the vocabulary, two rows would be the
        same text without having asked for it, or (policy "raise") a row cannot be served.
    ContractError
        In ``generate``: if a processor with a mask is given other prompts, rows move, or tokens are taken
        back under mirostat.

    Notes
    -----
    *Randomness*: a token is a function of (logits, seed, position, completion, token id), as in `sample`; the
    position is the number of real tokens before it, so that neither padding nor neighbours enter. Prompts
    without a seed get one each, see `Processor.seeds`.

    A processor goes on with a text for as long as each call brings the ids of the last and one token more, or
    these with tokens taken back behind the prompt, as assisted generation does (an assistant, prompt lookup):
    it gives the text of plain generation, and mirostat, whose state cannot go back, is an error there.
    Anything else begins a new text (with new seeds where none were given, and mirostat from its start);
    `Processor.reset` does so where a new prompt is a part of the last text. Beams move rows and are an error.
    ``generate`` does not tell a processor of them, and those of one prompt look like its completions: where
    rows do not move, as with temperature 0, ``num_beams`` above 1 is no error and changes nothing. A row that
    has ended is drawn on by ``generate`` until all have: where a row's settings can leave it nothing behind
    its end token (few `allowed_tokens` and no n-gram twice), only "flag" lets the others go on.
    """
    if not isinstance(params, SamplingParams):
        params = settings_of(params, "prompt")
        if not params:
            raise ConfigError("params must hold one SamplingParams for each prompt; got none")
    for name, value, low in (("n", n, 1), ("pad_token_id", pad_token_id, 0)):
        number = whole(value)
        if value is not None and (number is None or number < low):
            raise ConfigError(f"{name} must be an integer of at least {low}; got {value!r}")
    if on_bad_row not in ("raise", "flag"):
        raise ConfigError(f"on_bad_row must be 'raise' or 'flag'; got {on_bad_row!r}")
    if on_bad_row == "flag" and pad_token_id is None:
        raise ConfigError("on_bad_row='flag' gives bad rows pad_token_id; got none: give it, or 'raise'")
    if attention_mask is not None:
        attention_mask = tensor_of("attention_mask", attention_mask).cpu()
        if attention_mask.ndim != 2 or len(attention_mask) == 0:
            raise ShapeError(f"attention_mask must be (prompts, tokens); got {tuple(attention_mask.shape)}")
        if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
            raise ShapeError(
                "attention_mask must be 1 at tokens and 0 at padding; got other numbers: give the "
                "tokenizer's mask, not what is added to scores"
            )
        real = attention_mask.to(torch.int8)
        if bool((real[:, 1:] < real[:, :-1]).any()):
            raise ShapeError(
                "attention_mask must have its zeros on the left of each row, as generation needs them; set "
                "tokenizer.padding_side = 'left'"
            )
    return Processor(params, whole(n), attention_mask, whole(pad_token_id), on_bad_row)
