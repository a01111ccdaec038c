"""The engine on real tiny models, and on a table of logits where equality can be exact."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from twodice.errors import ContractError, RequestError
from twodice.generation.engine import Engine
from twodice.generation.requests import Completion, Request
from twodice.sampling.params import SamplingParams

from .conftest import byte_tokenizer, tiny_gpt2, tiny_llama

MIXED = [
    Request("the first", SamplingParams(top_k=20, seed=1), max_tokens=9, n=2),
    Request("x", SamplingParams(temperature=0), max_tokens=20, ignore_end=True),
    Request("a much longer prompt than these", SamplingParams(top_p=0.8, seed=3), max_tokens=5),
    Request("the first", SamplingParams(temperature=1.5, min_p=0.05, seed=4), max_tokens=14),
    Request("wörld", SamplingParams(repetition_penalty=1.3, seed=2**64 - 1), max_tokens=17),
]


class Table(nn.Module):
    """A "model" whose logits are a function of last token and position: the same bits for any batch."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.table = nn.Parameter(3 * torch.randn(257, 257, generator=generator))
        config = tiny_gpt2().config
        self.config, self.device = config, torch.device("cpu")
        self.eval()

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **_: Any) -> Any:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        logits = self.table[input_ids].roll(1, -1) + (position_ids[..., None] % 5) * self.table[0]
        return SimpleNamespace(logits=logits)


def exact_engine(**options: Any) -> Engine:
    return Engine(Table(), byte_tokenizer(), **options)


def assert_model_agrees(engine: Engine, request: Request, made: Completion) -> None:
    """The log-probabilities are those of one forward over the whole sequence, no cache, no padding."""
    prompt = engine.encode(request.prompt)
    ids = torch.tensor([[*prompt, *made.tokens]])
    with torch.no_grad():
        logits = engine.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    expected = logits.log_softmax(-1).gather(1, torch.tensor(made.tokens)[:, None])[:, 0]
    torch.testing.assert_close(
        torch.tensor(made.logprobs, dtype=torch.float64), expected, rtol=1e-4, atol=1e-4
    )


def flat(requests: list[Request]) -> list[Request]:
    return [request for request in requests for _ in range(request.n)]


def test_logprobs_are_those_of_the_model_in_a_padded_batch_that_shrinks(engine: Engine) -> None:
    made = engine.generate(MIXED)
    for request, one in zip(flat(MIXED), made, strict=True):
        assert len(one.tokens) <= request.max_tokens
        assert_model_agrees(engine, request, one)


def test_a_request_has_the_same_tokens_alone_and_in_a_batch(engine: Engine) -> None:
    together = engine.generate(MIXED)
    alone = [one for request in MIXED for one in engine.generate([request])]
    assert [one.tokens for one in together] == [one.tokens for one in alone]


def test_greedy_equals_transformers(engine: Engine) -> None:
    ids = engine.encode("greedy poles")
    made = engine.generate([Request(ids, SamplingParams(temperature=0), max_tokens=30, ignore_end=True)])[0]
    peer = engine.model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), do_sample=False,
        max_new_tokens=30, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert made.tokens == tuple(peer[0, len(ids) :].tolist())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [None, 4])
def test_masks_are_right_for_other_attentions_and_sliding_windows(attention: str, window: int | None) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        config = MistralConfig(
            vocab_size=257, max_position_embeddings=64, hidden_size=32, intermediate_size=64,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
            sliding_window=window,
            eos_token_id=256, bos_token_id=256, attn_implementation=attention,
        )  # fmt: skip
        engine = Engine(MistralForCausalLM(config).eval(), byte_tokenizer())
    for request, one in zip(flat(MIXED), engine.generate(MIXED), strict=True):
        assert_model_agrees(engine, request, one)


def test_a_model_without_position_ids_is_served_in_batches_of_one_length() -> None:
    engine = Engine(tiny_gpt2(), byte_tokenizer())
    expected = [one.tokens for one in engine.generate(MIXED)]
    engine._can_pad = False
    assert [one.tokens for one in engine.generate(MIXED)] == expected


def test_for_equal_logits_tokens_depend_on_nothing_else() -> None:
    """Exact: any neighbours, any order, any number of rows at a time, alone or not."""
    requests = [
        Request(f"prompt {i}"[: 1 + i % 9], SamplingParams(top_k=1 + i, temperature=0.5 + i / 20, seed=i % 4),
                max_tokens=1 + 7 * i % 23, n=1 + i % 3, ignore_end=i % 2 == 0)
        for i in range(17)
    ]  # fmt: skip
    alone = [[one.tokens for one in exact_engine().generate([request])] for request in requests]
    for rows in (1, 3, 64):
        engine = exact_engine(max_rows=rows)
        flat_tokens = [one.tokens for one in engine.generate(requests)]
        assert flat_tokens == [tokens for same in alone for tokens in same]
        backwards = [one.tokens for one in engine.generate(requests[::-1])]
        assert backwards == [tokens for same in alone[::-1] for tokens in same]


def test_the_first_completions_do_not_depend_on_n() -> None:
    engine = exact_engine()

    def tokens(n: int) -> list[tuple[int, ...]]:
        made = engine.generate([Request("p", SamplingParams(seed=5), max_tokens=12, n=n)])
        assert [one.completion for one in made] == list(range(n))
        return [one.tokens for one in made]

    assert tokens(5)[:1] == tokens(1) and tokens(5)[:3] == tokens(3)
    assert len(set(tokens(5))) == 5


def test_a_seed_is_made_reported_and_gives_the_same_text_again() -> None:
    engine = exact_engine()
    first, second = (engine.generate([Request("p", max_tokens=20)])[0] for _ in range(2))
    assert first.seed != second.seed
    again = engine.generate([Request("p", SamplingParams(seed=first.seed), max_tokens=20)])[0]
    assert again == first


def test_position_counts_the_prompt() -> None:
    """Continuing a text from its middle draws the same tokens as drawing it in one go."""
    engine = exact_engine()
    whole = engine.generate([Request((1, 2, 3), SamplingParams(seed=9), max_tokens=12, ignore_end=True)])[
        0
    ].tokens
    rest = engine.generate(
        [Request((1, 2, 3, *whole[:5]), SamplingParams(seed=9), max_tokens=7, ignore_end=True)]
    )
    assert rest[0].tokens == whole[5:]


def test_the_penalty_sees_prompt_and_text() -> None:
    """With a forbidding penalty and positive logits no token comes twice, nor one of the prompt."""
    engine = exact_engine()
    engine.model.table.data.abs_()
    params = SamplingParams(temperature=0, repetition_penalty=1e6)
    requests = [
        Request((7, 8, 9), params, max_tokens=30, ignore_end=True),
        Request((1,), SamplingParams(seed=1)),
    ]
    made = engine.generate(requests)[0].tokens
    assert len({7, 8, 9, *made}) == 33


def test_an_end_of_text_token_ends_the_text_and_is_not_in_it() -> None:
    engine = exact_engine()
    biased = SamplingParams(temperature=0, logit_bias={256: 1e4})
    made = engine.generate([Request("p", biased), Request("p", biased, max_tokens=3, ignore_end=True)])
    assert (made[0].tokens, made[0].text, made[0].finish_reason) == ((256,), "", "end")
    assert (made[1].tokens, made[1].text, made[1].finish_reason) == ((256,) * 3, "", "length")


def test_the_context_ends_a_text_and_a_prompt_that_fills_it_is_refused(engine: Engine) -> None:
    made = engine.generate([Request([5] * 60, SamplingParams(seed=1), max_tokens=50, ignore_end=True)])[0]
    assert (len(made.tokens), made.finish_reason) == (4, "length")
    with pytest.raises(RequestError, match=r"room for one token in the model's context of 64 .* 64 tokens"):
        engine.generate([Request([5] * 64)])


def test_an_empty_prompt_starts_from_the_end_of_text_token() -> None:
    engine = exact_engine()
    made = engine.generate([Request("", SamplingParams(seed=1)), Request((256,), SamplingParams(seed=1))])
    assert made[0] == made[1] and made[0].prompt_tokens == 1
    engine.tokenizer.eos_token = None
    with pytest.raises(RequestError, match="empty prompt needs"):
        engine.generate([Request("")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": "a", "max_tokens": 0}, "max_tokens must be an integer of at least 1; got 0"),
        ({"prompt": "a", "n": True}, "n must be an integer of at least 1; got True"),
        ({"prompt": "a", "stop": ["x", ""]}, "at least one character; got ''"),
        ({"prompt": [1, 2.5]}, "prompt must be text or token ids"),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Request(**options)


def test_foreign_token_ids_and_training_mode_are_refused() -> None:
    engine = exact_engine()
    with pytest.raises(RequestError, match=r"token ids in \[0, 257\); got -1 to 300"):
        engine.generate([Request((3, 300, -1))])
    engine.model.train()
    with pytest.raises(ContractError, match=r"model\.eval\(\)"):
        engine.generate([Request("a")])


def test_no_requests_are_no_completions() -> None:
    assert exact_engine().generate([]) == []


def test_streamed_pieces_join_to_the_text(engine: Engine) -> None:
    pieces: dict[tuple[int, int], list[str]] = {}
    made = engine.generate(MIXED, on_text=lambda i, c, text: pieces.setdefault((i, c), []).append(text))
    places = [(i, c) for i, request in enumerate(MIXED) for c in range(request.n)]
    assert ["".join(pieces[place]) for place in places] == [one.text for one in made]
    decode = engine.tokenizer.decode
    assert [decode(one.tokens, skip_special_tokens=True) for one in made] == [one.text for one in made]


def test_a_stop_string_ends_the_text_across_tokens() -> None:
    engine = exact_engine()
    free = engine.generate(
        [Request("p", SamplingParams(seed=3, allowed_tokens=range(97, 107)), max_tokens=40)]
    )[0]
    for size in (1, 2, 5):
        stop = free.text[10 : 10 + size]
        at = free.text.index(stop)
        request = Request(
            "p", SamplingParams(seed=3, allowed_tokens=range(97, 107)), max_tokens=40, stop=[stop]
        )
        made = engine.generate([request])[0]
        assert (made.text, made.finish_reason) == (free.text[:at], "stop")
        assert made.tokens == free.tokens[: at + size]


def test_each_token_is_explained_by_what_was_drawn() -> None:
    engine = Engine(tiny_llama(), byte_tokenizer())
    params = SamplingParams(temperature=0.9, top_k=30, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=11)
    plain = engine.generate([Request("why", params, max_tokens=8), *MIXED])[0]
    made = engine.generate([Request("why", params, max_tokens=8, explain=4), *MIXED])[0]
    assert made.tokens == plain.tokens and plain.records == ()
    for at, record in enumerate(made.records):
        assert (record.position, record.token) == (3 + at, made.tokens[at])
        assert [stage.name for stage in record.stages] == ["top_k=30", "top_p=0.9", "min_p=0.02"]
        kept, mass = [s.kept for s in record.stages], [s.mass for s in record.stages]
        assert kept[0] == 30 and kept == sorted(kept, reverse=True) and mass == sorted(mass, reverse=True)
        assert 0 <= record.rank < kept[-1]
        assert record.probability == pytest.approx(torch.tensor(made.logprobs[at]).exp().item(), rel=1e-4)
        believed = [value for _, _, value in record.believed]
        assert len(believed) == 4 and believed == sorted(believed, reverse=True)
    alone = SamplingParams(top_k=1, seed=1)
    only = engine.generate([Request("why", alone, max_tokens=1, explain=1)])[0].records[0]
    assert (
        only.odds == 1.0
        and only.rank == 0
        and only.stages[0].mass == pytest.approx(only.probability, rel=1e-4)
    )


def test_a_row_with_nothing_left_is_told_in_words_that_a_request_has() -> None:
    everything = SamplingParams(banned_tokens=range(257), seed=1)
    with pytest.raises(RequestError, match=r"no token left.*forbid less") as caught:
        exact_engine().generate([Request("x", everything, max_tokens=2)])
    assert "on_bad_row" not in str(caught.value)
