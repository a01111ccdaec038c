"""Our chain inside vLLM: a logits processor of its V1 engine that leaves one token a row to draw.

Name it, "twodice.sampling.vllm_plugin:VllmProcessor", when the engine starts: ``LLM(model,
logits_processors=[...])`` or ``vllm serve --logits-processors``. A request that has
``extra_args={"twodice": {...}}`` is then drawn by `sample`. The file knows the interface of vLLM's
batch-level processors and imports vLLM only for its base class; the chain itself is `sample`.

Letters: R rows (requests in the batch), V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twodice.errors import ConfigError
from twodice.kernels.sampling_settings import MAX_VOCABULARY, Status
from twodice.sampling.chain import pack
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import SEED_BITS, History, sample

try:
    from vllm.v1.sample.logits_processor import LogitsProcessor as _Base
except ModuleNotFoundError:  # without vLLM the class is still there, for tests and for reading
    _Base = object

ARGUMENT = "twodice"
"""The name in ``extra_args`` (``vllm_xargs`` of a request over HTTP)."""


def _read(request: Any) -> SamplingParams | None:
    """Our settings of a vLLM request, or None where it has none."""
    given = (request.extra_args or {}).get(ARGUMENT)
    if given is None:
        return None
    if isinstance(given, str):  # arguments over HTTP are flat: a mapping comes as its JSON text
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ConfigError(f"extra_args[{ARGUMENT!r}] must be a mapping or JSON text; {error}") from None
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"extra_args[{ARGUMENT!r}] must map names of settings to values; got {given!r}: {{}} draws from "
            "the model's own distribution"
        )
    params = SamplingParams.parse(given)
    highest = pack(params).settings.highest_id
    if highest >= MAX_VOCABULARY:
        raise ConfigError(f"the token ids of settings must be below {MAX_VOCABULARY}; got {highest}")
    return params


@dataclass(slots=True)
class _Request:
    """One request of the batch; `output` is vLLM's own list, which grows."""

    params: SamplingParams
    prompt: list[int]
    output: list[int]
    drawn_at: int = -1  # length of the output at the last draw
    before: float = math.nan  # mirostat's state before and after that draw
    after: float = math.nan

    @property
    def state(self) -> float:
        """What mirostat begins this draw with; a step whose token vLLM threw away is drawn again."""
        if len(self.output) == self.drawn_at:
            return self.before
        return self.after if len(self.output) == self.drawn_at + 1 else math.nan


class VllmProcessor(_Base):  # type: ignore[misc]
    """Draws the rows that ask for it by `sample`; vLLM's own sampler then finds one token in them.

    A request asks by ``extra_args={"twodice": settings}``, a mapping of `SamplingParams` names to values (or
    its JSON text). Its row becomes 0 at the token and -inf elsewhere, which vLLM's penalties, temperature and
    filters, greedy or not, leave as it is. Requests that do not ask are not touched. What vLLM does before
    (grammar, allowed ids, bad words, minimum length, logit bias) acts on the logits that we are given.

    Parameters
    ----------
    vllm_config, device, is_pin_memory
        As vLLM gives them to every processor; not used.

    Notes
    -----
    *Randomness*: a token is a function of (logits, seed, position, token id), the position counted with the
    prompt; not of the batch, the row, or a preemption. The seed is that in our settings, else the request's
    own ``seed``, to which vLLM adds i for the i-th of n completions, else a new one. A request with n > 1 and
    a seed in our settings is refused: its n texts would be one.

    A row that cannot be served (NaN, +inf, nothing left) is handed on as it came: an error here would end the
    engine, and a token would be made up. Mirostat starts anew where vLLM preempts a request.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._requests: dict[int, _Request] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse settings that cannot be meant (a ValueError), before the request enters the engine."""
        params = _read(sampling_params)
        if params is not None and params.seed is not None and sampling_params.n > 1:
            raise ConfigError(
                f"n={sampling_params.n} completions with one seed in extra_args[{ARGUMENT!r}] would be one "
                "text; give the seed as the request's own, to which vLLM adds the number of each completion"
            )

    def is_argmax_invariant(self) -> bool:
        """False: a draw is not the argmax, so we are asked for greedy requests too, and before penalties."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests of the batch: removed, then added, then moved."""
        if batch_update is None:
            return
        rows = self._requests
        for index in batch_update.removed:
            rows.pop(index, None)
        for index, request, prompt, output in batch_update.added:
            rows.pop(index, None)
            params = _read(request)
            if params is not None:
                if params.seed is None:
                    seed = request.seed if request.seed is not None else secrets.randbits(SEED_BITS)
                    params = dataclasses.replace(params, seed=seed)
                rows[index] = _Request(params, prompt if prompt is not None else [], output)
        for a, b, direction in batch_update.moved:
            first, second = rows.pop(a, None), rows.pop(b, None)
            if first is not None:
                rows[b] = first
            if second is not None and direction.name == "SWAP":
                rows[a] = second

    def apply(self, logits: Tensor) -> Tensor:
        """Put 0 at the token and -inf elsewhere in the rows that ask for it; (R, V), changed in place."""
        if not self._requests:
            return logits
        rows = sorted(self._requests)
        live = [self._requests[i] for i in rows]
        at = torch.tensor(rows, device=logits.device)
        found = sample(
            _wide(logits[at], max(pack(one.params).settings.highest_id for one in live)),
            tuple(one.params for one in live),
            torch.tensor([len(one.prompt) + len(one.output) for one in live]),
            history=_history(live, logits.shape[1]),
            state=torch.tensor([one.state for one in live], dtype=torch.float64),
            on_bad_row="flag",
        )
        if found.state is not None:
            for one, after in zip(live, found.state.tolist(), strict=True):
                one.before, one.after, one.drawn_at = one.state, after, len(one.output)
        good = found.status.to(logits.device) == int(Status.OK)
        at, tokens = at[good], found.tokens.to(logits.device)[good]
        logits[at] = -torch.inf
        logits[at, tokens] = 0.0
        return logits


def _wide(logits: Tensor, highest_id: int) -> Tensor:
    """Columns of -inf up to the highest id that a setting names: they change no token, and no id that a user
    sends can end the engine."""
    missing = highest_id + 1 - logits.shape[1]
    return logits if missing <= 0 else torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)


def _history(live: list[_Request], vocabulary: int) -> History | None:
    if not any(one.params.needs_history for one in live):
        return None
    # What is no token of the model (a place for an image, an id still on its way) is not in the past.
    parts: list[list[list[int]]] = [
        [[id for id in ids if 0 <= id < vocabulary] for ids in (one.prompt, one.output)]
        if one.params.needs_history
        else [[], []]
        for one in live
    ]
    ids = [id for prompt, output in parts for id in prompt + output]
    offsets = torch.tensor([0] + [len(prompt) + len(output) for prompt, output in parts]).cumsum(0)
    return torch.tensor(ids, dtype=torch.int64), offsets, torch.tensor([len(prompt) for prompt, _ in parts])
