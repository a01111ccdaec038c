"""What is asked of the engine and what it gives back: requests and completions.

Plain values, checked at birth; knows no model and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from twodice.errors import RequestError
from twodice.sampling.explanation import Explanation
from twodice.sampling.params import SamplingParams

FinishReason = Literal["end", "stop", "length"]


@dataclass(frozen=True)
class Request:
    """A prompt to be continued `n` times.

    Parameters
    ----------
    prompt
        Text, or token ids. An empty prompt starts from the model's own begin- or end-of-text token.
    params
        How tokens are drawn. Without a seed one is made, used for all `n`, and reported.
    max_tokens
        At most so many new tokens, at least 1. Fewer where the model's context ends.
    stop
        Strings at the first of which the text ends (without it). Matched literally, also across tokens.
    n
        Number of completions, at least 1. Completion i is the same for every n > i.
    ignore_end
        Go on after an end-of-text token, for texts of one length.
    explain
        How many of the model's most probable tokens to record at each step; 0 records nothing.

    Raises
    ------
    RequestError
        If a number is out of its range, a stop string is empty, or the prompt is not text or token ids.
    """

    prompt: str | Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 64
    stop: Sequence[str] = ()
    n: int = 1
    ignore_end: bool = False
    explain: int = 0

    def __post_init__(self) -> None:
        for name, low in (("max_tokens", 1), ("n", 1), ("explain", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise RequestError(f"{name} must be an integer of at least {low}; got {value!r}")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"each stop must be a string of at least one character; got {text!r}")
        if not isinstance(self.prompt, str):
            ids = tuple(self.prompt)
            if not all(hasattr(token, "__index__") and not isinstance(token, bool) for token in ids):
                raise RequestError(f"prompt must be text or token ids; got {self.prompt!r}")
            object.__setattr__(self, "prompt", tuple(token.__index__() for token in ids))


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt.

    Attributes
    ----------
    text
        What follows the prompt; without the stop string and without special tokens. Bytes that are no valid
        UTF-8 stand as U+FFFD.
    tokens
        Every token drawn, an end-of-text token and those of a stop string included.
    seed
        With it (and the same settings, prompt and `completion`) the text can be had again.
    completion
        Which of the n completions of the request: 0 to n - 1. A coordinate of the noise.
    finish_reason
        "end": the model ended the text. "stop": a stop string came. "length": `max_tokens`, or the context is
        full.
    logprobs
        The model's own log-probability of each token, before any stage [nats].
    prompt_tokens
        Length of the prompt [tokens].
    records
        One `Explanation` a token where the request asked to `explain`, else empty.
    """

    text: str
    tokens: tuple[int, ...]
    seed: int
    completion: int
    finish_reason: FinishReason
    logprobs: tuple[float, ...]
    prompt_tokens: int
    records: tuple[Explanation, ...] = ()
