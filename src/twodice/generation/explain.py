"""How one token came to be drawn: what the model believed, and what each stage left.

Every figure comes from `twodice.sampling.sample` on the same logits, with the stages switched on one by one:
nothing of the chain is written a second time here. Knows no model and no tokenizer.

Letters: V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from twodice.generation.requests import Stage, TokenRecord
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample

#: The stages that filter, in their order, and the values that switch each off.
FILTERS = {"top_k": (None, 0, -1), "top_p": (None, 1.0), "min_p": (None, 0.0)}


def explain(
    logits: Tensor,
    params: SamplingParams,
    position: int,
    *,
    completion: int,
    history: Sequence[int],
    prompt_length: int,
    top: int,
    text_of: Callable[[int], str],
) -> TokenRecord:
    """Draw the token of one row again and record how it came about.

    Parameters
    ----------
    logits : (V,) float tensor
        As the model gave them.
    params, position, completion
        As in the draw; `params` with its seed.
    history
        Token ids of the sequence so far, the prompt first.
    prompt_length
        Of which so many are the prompt.
    top
        How many of the most probable tokens to record.
    text_of
        Makes a token's text.

    Notes
    -----
    *Randomness*: the same coordinates as the draw that is explained, hence the same token.
    """
    past = (torch.tensor(list(history)), torch.tensor([0, len(history)]), torch.tensor([prompt_length]))

    def draw(settings: SamplingParams, *need: str) -> Any:
        return sample(logits[None], settings, position, history=past, completion=completion, need=need)

    full = draw(params, "logprob", "raw_logprob", "rank")
    token = int(full.tokens[0])
    probabilities = torch.softmax(logits.double(), dim=0)
    believed = torch.topk(probabilities, min(top, probabilities.numel()))
    stages = []
    if not params.greedy:
        settings = dataclasses.replace(params, top_k=None, top_p=None, min_p=None)
        for name, off in FILTERS.items():
            value = getattr(params, name)
            if value in off:
                continue
            settings = dataclasses.replace(settings, **{name: value})  # type: ignore[arg-type]
            left = draw(settings, "kept", "kept_mass")
            stages.append(Stage(f"{name}={value}", left.kept[1].numel(), float(left.kept_mass[0])))
    return TokenRecord(
        position=position,
        token=token,
        text=text_of(token),
        believed=tuple(
            (i, text_of(i), value)
            for i, value in zip(believed.indices.tolist(), believed.values.tolist(), strict=True)
        ),
        stages=tuple(stages),
        probability=math.exp(float(full.raw_logprob[0])),
        odds=math.exp(float(full.logprob[0])),
        rank=int(full.rank[0]),
    )
