"""The processor for vLLM, by vLLM's interface: a batch of its rules around it, not the engine itself."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import types
from typing import Any

import pytest
import torch
from tests.support.vllm_batch import BatchUpdate, MoveDirectionality, VllmParams, VllmRequest, run

from twodice.errors import ConfigError
from twodice.sampling import vllm_plugin
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample
from twodice.sampling.vllm_plugin import VllmProcessor

VOCABULARY = 40
SETTINGS: list[dict[str, Any] | None] = [
    {"seed": 1},
    {"seed": 1, "top_k": 5, "temperature": 0.7},
    None,
    {"seed": 3, "presence_penalty": 0.8, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"seed": 4, "mirostat_tau": 2.0, "mirostat_eta": 0.5},
    {"seed": 5, "temperature": 0.0},
    {"seed": 6, "min_tokens": 4, "stop_tokens": [1, 2, 3], "logit_bias": {"1": 9.0}},
    {"top_p": 0.9},
    {"seed": 8, "logit_bias": {VOCABULARY + 30: 5.0}, "xtc_probability": 0.5},
]


def logits_of(request: VllmRequest) -> torch.Tensor:
    """What a model would say: a function of the tokens so far."""
    seed = hash((tuple(request.prompt), tuple(request.output)))
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed % 2**31)) * 2


def alone(settings: dict[str, Any], prompt: list[int], length: int) -> list[int]:
    params, request, state = (
        SamplingParams.parse(settings),
        VllmRequest(VllmParams(), prompt, length),
        math.nan,
    )
    while len(request.output) < length:
        ids = torch.tensor(prompt + request.output)
        x = torch.nn.functional.pad(logits_of(request), (0, 60), value=-torch.inf)
        found = sample(
            x, params, len(ids), history=(ids, torch.tensor([0, len(ids)]), torch.tensor([len(prompt)])),
            state=torch.tensor([state], dtype=torch.float64),
        )  # fmt: skip
        request.output.append(int(found.tokens))
        state = math.nan if found.state is None else float(found.state)
    return request.output


def processor() -> VllmProcessor:
    return VllmProcessor(None, torch.device("cpu"), False)


@pytest.mark.parametrize("seed", range(3))
def test_each_request_gets_the_tokens_it_gets_alone_however_rows_come_go_and_move(seed: int) -> None:
    requests = []
    for i, settings in enumerate(SETTINGS * 2):
        # Whatever vLLM does after us, greedy or not, finds one token.
        own = VllmParams(
            {"twodice": json.dumps(settings) if i % 2 else settings} if settings is not None else None,
            seed=77 + i, temperature=[0.0, 1.0, 3.0][i % 3], top_k=[0, 1][i % 2], top_p=[1.0, 0.1][i % 2],
            min_p=0.5, repetition_penalty=1.7, presence_penalty=-1.5,
        )  # fmt: skip
        requests.append(VllmRequest(own, list(range(i % 5 + 1)), 3 + (i * seed) % 9))
    run(processor(), requests, logits_of, capacity=5, seed=seed)
    for i, (request, settings) in enumerate(zip(requests, SETTINGS * 2, strict=True)):
        if settings is not None:
            expected = alone({"seed": 77 + i} | settings, request.prompt, request.length)
            assert request.output == expected, settings


def test_rows_that_do_not_ask_are_not_touched_and_rows_that_do_have_one_token() -> None:
    requests = [
        VllmRequest(VllmParams({"twodice": s} if s is not None else None), [1, 2], 6) for s in SETTINGS
    ]

    def look(request: VllmRequest, before: torch.Tensor, after: torch.Tensor) -> None:
        if request.params.extra_args is None:
            assert torch.equal(before, after)
        else:
            assert after.sort(descending=True).values.tolist() == [0.0] + [-torch.inf] * (VOCABULARY - 1)

    run(processor(), requests, logits_of, capacity=4, seed=1, look=look)


def test_a_row_that_cannot_be_served_is_handed_on_as_it_came() -> None:
    ours = processor()
    asks = VllmParams({"twodice": {"seed": 1}})
    ours.update_state(BatchUpdate(2, [], [(0, asks, [1], []), (1, asks, None, [])], []))
    x = torch.zeros(2, 5)
    x[0, 2] = torch.nan
    out = ours.apply(x.clone())
    assert torch.equal(out[0].nan_to_num(7.0), x[0].nan_to_num(7.0))
    assert out[1].isfinite().sum() == 1


def test_mirostat_goes_on_with_the_text_and_draws_again_what_was_thrown_away() -> None:
    ours = processor()
    settings = {"seed": 4, "mirostat_tau": 2.0, "mirostat_eta": 1.0}
    output: list[int] = []
    asks = VllmParams({"twodice": settings})
    ours.update_state(BatchUpdate(1, [], [(0, asks, [1], output)], []))
    x = torch.linspace(0, -6, VOCABULARY)[None]

    def plain(state: float, position: int) -> tuple[int, float]:
        found = sample(
            x, SamplingParams.parse(settings), position, state=torch.tensor([state], dtype=torch.float64)
        )
        return int(found.tokens), float(found.state)

    def drawn() -> int:
        return int(ours.apply(x.clone()).argmax())

    first, mu = plain(math.nan, 1)
    assert drawn() == drawn() == first and ours._requests[0].after == mu, "thrown away, drawn again"
    output.append(first)
    second, mu_behind = plain(mu, 2)
    assert drawn() == drawn() == second and ours._requests[0].after == mu_behind != mu
    output += [second, 3]  # a token that we have not drawn: another text
    assert math.isnan(ours._requests[0].state)
    drawn()
    assert ours._requests[0].after == plain(math.nan, 4)[1]


def test_what_is_no_token_is_not_in_the_past_and_keeps_its_place() -> None:
    """-1 stands for a token on its way, an id beyond the vocabulary for a part of an image."""
    ours = processor()
    settings = {"seed": 4, "presence_penalty": 2.0, "repetition_penalty": 1.5}
    prompt, output = [1, VOCABULARY + 7, 2], [5, -1]
    asks = VllmParams({"twodice": settings})
    ours.update_state(BatchUpdate(1, [], [(0, asks, prompt, output)], []))
    x = torch.linspace(0, -1, VOCABULARY)[None]
    wanted = sample(x, SamplingParams.parse(settings), 5, history=([1, 2, 5], [0, 3], [2]))
    assert int(ours.apply(x.clone()).argmax()) == int(wanted.tokens)


def test_moves_follow_the_documented_rules() -> None:
    ours = processor()
    asks = [VllmParams({"twodice": {"seed": i}}) for i in range(4)]
    ours.update_state(BatchUpdate(4, [], [(i, asks[i], [1], []) for i in range(4)], []))
    one_way, swap = MoveDirectionality.UNIDIRECTIONAL, MoveDirectionality.SWAP

    def seeds() -> dict[int, int | None]:
        return {i: request.params.seed for i, request in sorted(ours._requests.items())}

    ours.update_state(None)
    ours.update_state(BatchUpdate(3, [1], [], [(3, 1, one_way)]))
    assert seeds() == {0: 0, 1: 3, 2: 2}
    ours.update_state(BatchUpdate(3, [], [], [(0, 2, swap), (2, 1, swap)]))
    assert seeds() == {0: 2, 1: 0, 2: 3}
    ours.update_state(BatchUpdate(2, [], [(1, VllmParams(), [1], [])], [(2, 0, one_way)]))
    assert seeds() == {0: 3}


def test_made_up_seeds_differ_and_the_seed_of_the_request_is_taken() -> None:
    ours = processor()
    free, own = VllmParams({"twodice": {}}), VllmParams({"twodice": {}}, seed=12)
    ours.update_state(BatchUpdate(3, [], [(0, free, [1], []), (1, free, [1], []), (2, own, [1], [])], []))
    first, second, third = (ours._requests[i].params.seed for i in range(3))
    assert first != second and third == 12


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (VllmParams({"twodice": {"topp": 0.9}}), "did you mean 'top_p'"),
        (VllmParams({"twodice": {"top_p": 7}}), r"top_p must be in \[0, 1\]; got 7"),
        (VllmParams({"twodice": "{top_p"}), "mapping or JSON text"),
        (VllmParams({"twodice": [1]}), "must map names of settings to values"),
        (VllmParams({"twodice": {"banned_tokens": [2**20]}}), "below 1048576"),
        (VllmParams({"twodice": {"seed": 3}}, n=4), "n=4 completions with one seed"),
        (VllmParams({"twodice": {"seed": 3}}, seed=3, n=4), "n=4 completions with one seed"),
    ],
)
def test_a_bad_request_is_refused_before_it_enters_the_engine(params: VllmParams, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VllmProcessor.validate_params(params)


def test_good_requests_pass() -> None:
    VllmProcessor.validate_params(VllmParams())
    VllmProcessor.validate_params(VllmParams({"other": 1}))
    VllmProcessor.validate_params(VllmParams({"twodice": {"top_p": 0.9}}, seed=3, n=4))
    assert processor().is_argmax_invariant() is False


def test_with_vllm_there_the_class_is_one_of_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM refuses a class that is no subclass of its own; this is a stand-in for that class alone."""

    class LogitsProcessor:
        pass

    there = types.ModuleType("vllm.v1.sample.logits_processor")
    there.LogitsProcessor = LogitsProcessor  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.v1", "vllm.v1.sample"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, there.__name__, there)
    spec = importlib.util.spec_from_file_location("plugin_beside_vllm", vllm_plugin.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert issubclass(module.VllmProcessor, LogitsProcessor)
