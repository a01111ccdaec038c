"""Many requests to one model: prompts in, tokens drawn step by step for all of them at once, text out.

Holds the loop and what it must know of a model: its context, its end, whether prompts may be padded. Draws by
`twodice.sampling`; knows no file formats (`twodice.generation.load` does) and no terminal.

Letters: R rows (sequences), V vocabulary, T positions.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twodice.errors import ContractError, RequestError
from twodice.generation.cache import RowCache
from twodice.generation.requests import Completion, FinishReason, Request
from twodice.generation.text import Detokenizer, TextStream
from twodice.sampling.explain import explain
from twodice.sampling.explanation import Explanation
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import SEED_BITS, raise_on_bad, sample

#: Called with (index of the request, completion, piece of text) as soon as a piece is certain.
OnText = Callable[[int, int, str], None]


@dataclass
class _Sequence:
    """One completion in the making."""

    request_index: int
    request: Request
    params: SamplingParams
    completion: int
    prompt: tuple[int, ...]
    limit: int  # new tokens at most
    stream: TextStream
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    records: list[Explanation] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    reason: FinishReason | None = None
    state: float = math.nan  # mirostat's

    @property
    def position(self) -> int:
        """Where the next token stands in the sequence."""
        return len(self.prompt) + len(self.tokens)

    def take(self, token: int, is_end: bool) -> str:
        """Take the token that was drawn; return the text that is now certain."""
        self.tokens.append(token)
        piece = ""
        if is_end and not self.request.ignore_end:
            self.reason = "end"
        else:
            piece = self.stream.push(token)
            if self.stream.stopped:
                self.reason = "stop"
            elif len(self.tokens) >= self.limit:
                self.reason = "length"
        if self.reason is not None:
            piece += self.stream.finish()
        if piece:
            self.pieces.append(piece)
        return piece

    def result(self) -> Completion:
        assert self.reason is not None, "only a finished sequence has a result"
        assert self.params.seed is not None, "every sequence was given a seed"
        return Completion(
            text="".join(self.pieces),
            tokens=tuple(self.tokens),
            seed=self.params.seed,
            completion=self.completion,
            finish_reason=self.reason,
            logprobs=tuple(self.logprobs),
            prompt_tokens=len(self.prompt),
            records=tuple(self.records),
        )


class Engine:
    """Generates text from a causal language model of transformers.

    Parameters
    ----------
    model
        A causal language model of transformers in ``eval()``; any device.
    tokenizer
        Its tokenizer, as transformers loads it.
    defaults
        What a caller should use where it says nothing; `load` takes them from ``generation_config.json``.
    max_rows
        Sequences that are in the model at one time; more requests are served one batch after the other.

    Notes
    -----
    *Randomness*: a token is a function of (logits, seed, position in the sequence, completion, token id) and
    of nothing else: not of the batch, the row, the neighbours or the order of requests. The logits are the
    model's, and floating point sums in another order for another batch shape: alone and in a batch they agree
    to rounding, not to the bit. So a token can differ only where two candidates are equal to within that
    rounding. Rows that share one prompt share its logits to the bit.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, defaults: SamplingParams | None = None, max_rows: int = 64
    ) -> None:
        if max_rows < 1:
            raise RequestError(f"max_rows must be at least 1; got {max_rows}")
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.defaults = defaults if defaults is not None else SamplingParams()
        config = model.config.get_text_config(decoder=True)
        if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
            raise RequestError(
                f"the engine serves decoder models with a key/value cache; got {type(model).__name__}"
            )
        self.vocabulary: int = config.vocab_size
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.end_ids = _end_ids(model, tokenizer)
        self._detokenizer = Detokenizer(tokenizer)
        # A model that takes no position_ids cannot be told where a padded prompt begins: equal lengths only.
        self._can_pad = "position_ids" in inspect.signature(model.forward).parameters
        layer_types = set(getattr(config, "layer_types", None) or ())
        has_windows = (
            bool(layer_types - {"full_attention"}) or getattr(config, "sliding_window", None) is not None
        )
        # One ready mask for all layers where all attend alike; otherwise the model makes its own from the
        # flat one.
        self._takes_ready_mask = model.config._attn_implementation == "sdpa" and not has_windows

    @classmethod
    def load(cls, source: str | Path, *, device: str = "cpu", max_rows: int = 64) -> Engine:
        """Load a run folder, a folder in Hugging Face format, or ``hf:NAME`` from the hub.

        Only safetensors are read and no code that comes with a model is run; only ``hf:`` uses the network.

        Raises
        ------
        ConfigError
            If the folder is not there.
        CheckpointError
            If it holds no model, or its weights are not safetensors.
        """
        from twodice.generation.load import load

        loaded = load(source, device=device)
        return cls(loaded.model, loaded.tokenizer, defaults=loaded.defaults, max_rows=max_rows)

    def encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Token ids of a prompt as the engine will use them; an empty one becomes the begin- or end-of-text
        token.

        Raises
        ------
        RequestError
            If an id is no token of the model, or the prompt is empty and the tokenizer has neither token.
        """
        ids = tuple(self.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else tuple(prompt)
        if not ids:
            first = self.tokenizer.bos_token_id
            first = self.tokenizer.eos_token_id if first is None else first
            if first is None:
                raise RequestError(
                    "an empty prompt needs a begin- or end-of-text token to start from, and this tokenizer "
                    "has neither; give at least one character"
                )
            ids = (first,)
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise RequestError(
                f"prompt must hold token ids in [0, {self.vocabulary}); got {min(ids)} to {max(ids)}"
            )
        return ids

    def generate(self, requests: Sequence[Request], *, on_text: OnText | None = None) -> list[Completion]:
        """Continue every prompt and return the completions: those of the first request, then of the second,
        ...

        Parameters
        ----------
        requests
            Each with its own prompt, settings, limits and number of completions.
        on_text
            Called with (index of the request, completion, piece) while the text comes. The pieces of one
            completion joined are its `Completion.text`.

        Raises
        ------
        RequestError
            If a prompt does not fit the context with one token to spare, or the model returns NaN.
        ContractError
            If the model is in training mode.

        Notes
        -----
        *Randomness*: see the class. A request without a seed is given one (53 bits from the operating
        system), for all its completions; it is in `Completion.seed`.
        """
        if self.model.training:
            raise ContractError("generation needs a model in eval mode; call model.eval() first")
        sequences = [one for i, request in enumerate(requests) for one in self._open(i, request)]
        with torch.inference_mode():
            for batch in self._batches(sequences):
                _Batch(self, batch, on_text).run()
        return [sequence.result() for sequence in sequences]

    def _open(self, index: int, request: Request) -> list[_Sequence]:
        prompt = self.encode(request.prompt)
        room = request.max_tokens if self.context is None else self.context - len(prompt)
        if room < 1:
            raise RequestError(
                f"a prompt must leave room for one token in the model's context of {self.context} tokens; "
                f"got a prompt of {len(prompt)} tokens: shorten it"
            )
        params = request.params
        if params.seed is None:
            params = dataclasses.replace(params, seed=secrets.randbits(SEED_BITS))
        limit = min(room, request.max_tokens)
        return [
            _Sequence(
                index, request, params, i, prompt, limit, self._detokenizer.stream(prompt, request.stop)
            )
            for i in range(request.n)
        ]

    def _batches(self, sequences: list[_Sequence]) -> list[list[_Sequence]]:
        """Batches of at most `max_rows`, of prompts near in length (equal where none can be padded)."""
        batches: list[list[_Sequence]] = []
        for one in sorted(sequences, key=lambda one: len(one.prompt)):
            is_fit = (
                batches
                and len(batches[-1]) < self.max_rows
                and (self._can_pad or len(batches[-1][0].prompt) == len(one.prompt))
            )
            if is_fit:
                batches[-1].append(one)
            else:
                batches.append([one])
        return batches


class _Batch:
    """Some sequences from their prompts to their ends; a finished one leaves and its row is given up."""

    def __init__(self, engine: Engine, live: list[_Sequence], on_text: OnText | None) -> None:
        self.engine, self.live, self.on_text = engine, list(live), on_text
        self.model, self.device = engine.model, engine.model.device
        # All sequences end their prompts in column `width - 1`; shorter ones begin further right.
        self.width = max(len(one.prompt) for one in live)
        capacity = max(self.width + one.limit for one in live)
        self.cache = RowCache(len(live), capacity)
        starts = [self.width - len(one.prompt) for one in live]
        self.mask: Tensor | None = None
        if any(starts):
            columns = torch.arange(capacity)
            self.mask = (columns[None, :] >= torch.tensor(starts)[:, None]).to(self.device)

    def run(self) -> None:
        logits = self._prefill()
        self._take(logits)
        length = self.width
        while self.live:
            logits = self._step(length)
            length += 1
            self._take(logits)

    def _prefill(self) -> Tensor:
        """Logits (R, V) behind the prompts; each prompt is computed once, with others of its length."""
        by_length: dict[int, dict[tuple[int, ...], list[int]]] = {}
        for row, one in enumerate(self.live):
            by_length.setdefault(len(one.prompt), {}).setdefault(one.prompt, []).append(row)
        logits: Tensor | None = None
        for size, prompts in by_length.items():
            rows = [row for same in prompts.values() for row in same]
            sources = [i for i, same in enumerate(prompts.values()) for _ in same]
            self.cache.starting(rows, sources, self.width - size)
            found = self.model(
                input_ids=torch.tensor(list(prompts), device=self.device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            if logits is None:
                logits = found.new_empty((len(self.live), found.shape[-1]))
            logits[rows] = found[sources]
        assert logits is not None, "a batch has at least one prompt"
        return logits

    def _step(self, length: int) -> Tensor:
        """Logits (R, V) behind the token that each sequence took last, which goes into column `length`."""
        self.cache.continuing(length)
        inputs: dict[str, Any] = {}
        if self.engine._can_pad:
            positions = [[one.position - 1] for one in self.live]
            inputs["position_ids"] = torch.tensor(positions, device=self.device)
        if self.mask is not None:
            mask = self.mask[: len(self.live), : length + 1]
            inputs["attention_mask"] = mask[:, None, None, :] if self.engine._takes_ready_mask else mask
        found: Tensor = self.model(
            input_ids=torch.tensor([[one.tokens[-1]] for one in self.live], device=self.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        ).logits
        return found[:, -1]

    def _take(self, logits: Tensor) -> None:
        """Draw one token for every row, and let those that are finished go."""
        live = self.live
        drawn = sample(
            logits,
            tuple(one.params for one in live),
            torch.tensor([one.position for one in live]),
            history=_history(live),
            completion=torch.tensor([one.completion for one in live]),
            state=torch.tensor([one.state for one in live], dtype=torch.float64),
            need=("raw_logprob",),
            on_bad_row="flag",
        )
        assert drawn.raw_logprob is not None, "it was asked for"
        tokens, logprobs = drawn.tokens.tolist(), drawn.raw_logprob.tolist()
        if min(tokens) < 0:
            raise_on_bad(drawn.status, "forbid less, or load a model whose logits are numbers")
        states = [math.nan] * len(live) if drawn.state is None else drawn.state.tolist()
        for row, one in enumerate(live):
            if one.request.explain:
                record = explain(
                    logits[row],
                    one.params,
                    self.engine._detokenizer.text_of,
                    position=one.position,
                    history=_history([one]),
                    completion=one.completion,
                    state=one.state,
                    top=one.request.explain,
                )
                assert record.token == tokens[row], "a row explained alone draws what it drew in the batch"
                one.records.append(record)
            one.logprobs.append(logprobs[row])
            one.state = states[row]
            piece = one.take(tokens[row], tokens[row] in self.engine.end_ids)
            if piece and self.on_text is not None:
                self.on_text(one.request_index, one.completion, piece)
        for row in range(len(live) - 1, -1, -1):
            if live[row].reason is not None:
                self._remove(row)

    def _remove(self, row: int) -> None:
        last = len(self.live) - 1
        self.cache.remove(row)
        if self.mask is not None:
            self.mask[row] = self.mask[last]
        self.live[row] = self.live[last]
        self.live.pop()


def _history(live: list[_Sequence]) -> tuple[Tensor, Tensor, Tensor] | None:
    """The sequences so far for the stages that look at them, or None where no row has such a stage."""
    if not any(one.params.needs_history for one in live):
        return None
    ids = [token for one in live for token in (*one.prompt, *one.tokens)]
    offsets = torch.tensor([0] + [one.position for one in live]).cumsum(0)
    return torch.tensor(ids), offsets, torch.tensor([len(one.prompt) for one in live])


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: from generation config, config or tokenizer, the first that says."""
    for home in (getattr(model, "generation_config", None), model.config, tokenizer):
        found = getattr(home, "eos_token_id", None)
        if found is not None:
            return frozenset(found) if isinstance(found, list | tuple) else frozenset((found,))
    return frozenset()
