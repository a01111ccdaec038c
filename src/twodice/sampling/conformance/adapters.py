"""Samplers that the kit knows by name: twodice's own, and that of transformers' ``generate``.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from twodice.sampling.conformance.sampler import Function, Rows
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample


def twodice(logits: Tensor, rows: Rows) -> Tensor:
    """Draw with `twodice.sample`; rows that share settings and seed cost one `SamplingParams`.

    Without seeds, each row of a call gets a fresh one from the operating system.
    """
    position = torch.from_numpy(rows.positions)
    seeds = rows.seeds
    if len(rows.kinds) == 1 and (seeds is None or (seeds == seeds[0]).all()):
        one = SamplingParams(**rows.kinds[0], seed=None if seeds is None else int(seeds[0]))
        return sample(logits, one, position).tokens
    each = [
        SamplingParams(**rows.kinds[kind], seed=seed)
        for kind, seed in zip(
            rows.which.tolist(), [None] * len(rows) if seeds is None else seeds.tolist(), strict=True
        )
    ]
    return sample(logits, each, position).tokens


twodice.offers = ("seeds", "coupled")  # type: ignore[attr-defined]


@cache
def _model_of_given_logits() -> Any:
    """A model whose next-token logits are what one sets: it lets ``generate`` itself do the sampling."""
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class Given(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
        config_class = PretrainedConfig
        given: Tensor

        def __init__(self) -> None:
            super().__init__(PretrainedConfig(vocab_size=2))
            self.anchor = torch.nn.Parameter(torch.zeros(1))  # generate asks a parameter for the device

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return CausalLMOutput(logits=self.given[:, None])

    return Given().eval()


def transformers(logits: Tensor, rows: Rows) -> Tensor:
    """Draw with transformers' ``generate``: its processors, softmax, and one draw from torch's global
    generator.

    It has one setting a call, so rows are grouped, and no seeds. Temperature 0, an error there, becomes its
    greedy.
    """
    from transformers import GenerationConfig

    model = _model_of_given_logits()
    tokens = torch.empty(len(rows), dtype=torch.int64)
    for kind, numbers in rows.groups():
        at = torch.from_numpy(numbers)
        model.given = logits if len(at) == len(rows) else logits[at]
        greedy = kind["temperature"] == 0
        config = GenerationConfig(
            do_sample=not greedy,
            max_new_tokens=1,
            use_cache=False,
            pad_token_id=1,  # unlike the prompt, which would be taken for padding
            **{
                name: value
                for name, value in {**kind, "top_k": kind["top_k"] or 0}.items()
                if not greedy and value is not None
            },
        )
        with torch.no_grad():
            made = model.generate(torch.zeros(len(at), 1, dtype=torch.int64), generation_config=config)
        tokens[at] = made[:, -1]
    return tokens


transformers.offers = ()  # type: ignore[attr-defined]

BUILT_IN: dict[str, Function] = {"twodice": twodice, "transformers": transformers}
