"""`verify`: whatever the draft was, the text is that of plain decoding; and a draft with our noise agrees."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import sampling_rows

from twodice.errors import ConfigError, RequestError, ShapeError
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample
from twodice.sampling.speculative import Verified, verify

FIELDS = ("rank", "logprob", "raw_logprob")


def past_of(texts: list[list[int]], prompts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    offsets = torch.tensor([0] + [len(text) for text in texts]).cumsum(0)
    ids = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    return ids, offsets, torch.tensor(prompts)


def plainly(
    logits: torch.Tensor, params: Any, text: list[int], prompt: int, completion: int, state: float,
    mask: torch.Tensor | None, table: torch.Tensor,
) -> dict[str, list[float]]:  # fmt: skip
    """One row token by token: logits[0] first, then a row of `table` that the token drawn picks."""
    found: dict[str, list[float]] = {name: [] for name in ("tokens", "status", "state", *FIELDS)}
    text, row, mu = list(text), logits, torch.tensor([state], dtype=torch.float64)
    while len(found["tokens"]) < 5:
        drawn = sample(
            row[None], params, len(text), history=past_of([text], [prompt]), completion=completion,
            state=mu if "mirostat" in params.stages else None, need=FIELDS, on_bad_row="flag",
            allowed_mask=None if mask is None else mask[None],
        )  # fmt: skip
        mu = mu if drawn.state is None else drawn.state
        for name in ("tokens", "status", *FIELDS):
            found[name].append(getattr(drawn, name)[0].item())
        found["state"].append(float(mu))
        if found["status"][-1]:
            break
        text.append(int(drawn.tokens))
        row = table[int(drawn.tokens) % len(table)]
    return found


def compare(number: int) -> int:
    """Drafts that are right for 0 to 4 tokens, of unlike lengths, over adversarial rows and settings."""
    rows, vocabulary = 8, (7, 40, 129)[number % 3]
    generator = np.random.default_rng((number, 17))
    table = sampling_rows.batch(number, 12, vocabulary)
    settings = sampling_rows.settings(number, rows, vocabulary)
    ids, offsets, prompts = sampling_rows.history(number, rows, vocabulary)
    mask = sampling_rows.mask(number, rows, vocabulary)
    start = sampling_rows.state(number, settings, vocabulary)
    texts = [ids[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())]
    draft = torch.full((rows, 4), -1)
    logits = torch.zeros(rows, 5, vocabulary, dtype=table.dtype)
    plain = []
    for i in range(rows):
        logits[i, 0] = table[i]
        mu = float("nan") if start is None else float(start[i])
        plain.append(
            plainly(table[i], settings[i], texts[i], int(prompts[i]), i % 3, mu,
                    None if mask is None else mask[i], table))  # fmt: skip
        length, right = generator.integers(0, 5), generator.integers(0, 5)
        for j in range(length):
            tokens = plain[i]["tokens"]
            is_right = j < min(right, len(tokens)) and tokens[j] >= 0
            draft[i, j] = int(tokens[j]) if is_right else int(generator.integers(vocabulary))
            logits[i, j + 1] = table[int(draft[i, j]) % 12]
    found = verify(
        logits, draft, settings, torch.tensor([len(text) for text in texts]),
        history=past_of(texts, prompts.tolist()), completion=torch.arange(rows) % 3, state=start,
        allowed_mask=None if mask is None else mask[:, None].expand(-1, 5, -1), need=FIELDS,
        on_bad_row="flag",
    )  # fmt: skip
    for i in range(rows):
        check_row(found, i, draft[i].tolist(), plain[i], settings[i])
    return int(found.accepted.sum())


def check_row(found: Verified, i: int, draft: list[int], plain: dict[str, list[float]], params: Any) -> None:
    tokens = plain["tokens"]
    right = 0
    while right < 4 and right < len(tokens) and draft[right] == tokens[right] and tokens[right] >= 0:
        right += 1
    assert int(found.accepted[i]) == right
    assert found.tokens[i].tolist() == [*tokens[: right + 1], *[-1] * (4 - right)]
    assert int(found.next_tokens[i]) == tokens[right] and int(found.status[i]) == plain["status"][right]
    if "mirostat" in params.stages:
        assert found.state is not None
        torch.testing.assert_close(
            float(found.state[i]), plain["state"][right], rtol=0, atol=0, equal_nan=True
        )
    assert found.fields["rank"][i].tolist() == [*plain["rank"][: right + 1], *[-1] * (4 - right)]
    for name in ("logprob", "raw_logprob"):
        wanted = torch.tensor([*plain[name][: right + 1], *[float("nan")] * (4 - right)], dtype=torch.float64)
        torch.testing.assert_close(found.fields[name][i], wanted, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_adversarial_rows_settings_and_drafts_give_the_text_of_plain_decoding() -> None:
    assert sum(compare(number) for number in range(60)) > 300


def gpt2(seed: int, near: Any = None) -> Any:
    """A tiny GPT-2 in float64, so that the shape of a batch is far from deciding a token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=61, n_positions=64, n_embd=16, n_layer=2, n_head=2,
                            initializer_range=0.3, bos_token_id=0, eos_token_id=0)  # fmt: skip
        model = GPT2LMHeadModel(config).double().eval()
        if near is not None:
            for own, other in zip(model.parameters(), near.parameters(), strict=True):
                own.data = other.data + 0.1 * (own.data - other.data)
        return model


def behind(model: Any, text: list[int], count: int) -> torch.Tensor:
    """Logits behind the last `count` tokens, (count, V)."""
    with torch.no_grad():
        return model(torch.tensor([text])).logits[0, -count:]


class Speculator:
    """R texts that grow by drafts of unlike lengths; a draft is made by a model, or at random."""

    def __init__(self, target: Any, draft: Any, params: list[SamplingParams], prompts: list[list[int]]):
        self.target, self.draft, self.params = target, draft, params
        self.prompts = [len(prompt) for prompt in prompts]
        self.texts = [list(prompt) for prompt in prompts]
        self.state = torch.full((len(prompts),), torch.nan, dtype=torch.float64)
        self.offered = self.accepted = 0

    def propose(self, i: int, length: int) -> list[int]:
        text = list(self.texts[i])
        if self.draft is None:
            return [(31 * len(text) + 7 * j) % 61 for j in range(length)]
        for _ in range(length):
            drawn = sample(behind(self.draft, text, 1), self.params[i], len(text),
                           history=past_of([text], self.prompts[i : i + 1]),
                           state=self.state[i : i + 1])  # fmt: skip
            text.append(int(drawn.tokens))
        return text[len(self.texts[i]) :]

    def step(self, longest: int = 4) -> None:
        rows = len(self.texts)
        drafts = [self.propose(i, (i + len(self.texts[i])) % (longest + 1)) for i in range(rows)]
        logits = torch.zeros(rows, longest + 1, 61, dtype=torch.float64)
        padded = torch.full((rows, longest), -1)
        for i, draft in enumerate(drafts):
            logits[i, : len(draft) + 1] = behind(self.target, self.texts[i] + draft, len(draft) + 1)
            padded[i, : len(draft)] = torch.tensor(draft, dtype=torch.int64)
        found = verify(logits, padded, self.params, torch.tensor([len(text) for text in self.texts]),
                       history=past_of(self.texts, self.prompts), state=self.state)  # fmt: skip
        for i, draft in enumerate(drafts):
            self.texts[i] += [token for token in found.tokens[i].tolist() if token >= 0]
            self.offered += len(draft)
        self.accepted += int(found.accepted.sum())
        self.state = self.state if found.state is None else found.state


CHAINS = [
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_p=0.9, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2),
    SamplingParams(seed=3, dry_multiplier=0.8, dry_allowed_length=1, no_repeat_ngram_size=2, top_k=9),
    SamplingParams(seed=4, mirostat_tau=3.0, mirostat_eta=0.5),
    SamplingParams(seed=5, temperature=0.0, no_repeat_ngram_size=3),
    SamplingParams(seed=6, temperature=2.0, min_tokens=9, stop_tokens=range(30)),
]
PROMPTS = [[5, 6], [1, 2, 3, 1, 2], [8], [9, 9, 9], [10, 11, 12], [13]]


@pytest.mark.parametrize("draft", ["good", "bad", "random"])
def test_gpt2_writes_the_text_of_plain_decoding_whatever_the_draft_is(draft: str) -> None:
    target = gpt2(0)
    run = Speculator(
        target, {"good": gpt2(1, near=target), "bad": gpt2(2), "random": None}[draft], CHAINS, PROMPTS
    )
    while min(len(text) for text in run.texts) < 26:
        run.step()
    for i, (params, prompt) in enumerate(zip(CHAINS, PROMPTS, strict=True)):
        text, state = list(prompt), None
        while len(text) < 26:
            drawn = sample(behind(target, text, 1), params, len(text), state=state,
                           history=past_of([text], [len(prompt)]))  # fmt: skip
            text.append(int(drawn.tokens))
            state = drawn.state
        assert run.texts[i][:26] == text
    stops = [j for j, token in enumerate(run.texts[5][1:]) if token in CHAINS[5].stop_tokens]
    assert min(stops) >= 9  # min_tokens counts the drafted ones too, and a stop token did come
    rate = run.accepted / run.offered
    assert rate > 0.4 if draft == "good" else rate < 0.3


def test_a_draft_with_our_noise_is_accepted_as_often_as_its_bound_says_and_independent_noise_is_not() -> None:
    """20,000 positions, p and q at a total variation of TV. Common noise agrees with probability from
    (1 - TV) / (1 + TV) to 1 - TV, independent noise with sum p q; each within 5 deviations (false alarm below
    1e-6 with a fixed seed; a rate that is off by 0.02 is found)."""
    draws, generator = 20_000, torch.Generator().manual_seed(7)
    target = torch.randn(200, generator=generator) * 1.5
    near = target + 0.2 * torch.randn(200, generator=generator)
    p, q = target.double().softmax(0), near.double().softmax(0)
    tv = float((p - q).abs().sum() / 2)
    where = torch.arange(draws)

    def rate(seed: int) -> float:
        draft = sample(near.expand(draws, -1), SamplingParams(seed=seed), where).tokens
        two = target.expand(draws, 2, -1)
        return float(verify(two, draft[:, None], SamplingParams(seed=8), where).accepted.double().mean())

    slack = 5 * (0.25 / draws) ** 0.5
    assert 0.05 < tv < 0.2
    common, independent = rate(8), rate(9)
    assert (1 - tv) / (1 + tv) - slack < common < 1 - tv + slack
    assert abs(independent - float((p * q).sum())) < slack
    assert independent < 0.2 < 0.7 < common


@pytest.mark.parametrize("more", [{}, {"mirostat_tau": 3.0}])
def test_a_grammar_that_goes_on_through_the_draft_has_a_mask_for_each_place(more: dict[str, float]) -> None:
    params, x = SamplingParams(seed=3, **more), torch.zeros(1, 3, 64)
    mask = torch.zeros(1, 3, 2, dtype=torch.int32)
    mask[0, :, 0] = torch.tensor([0b11, 0b1100, 0b110000])  # ids 0 and 1, then 2 and 3, then 4 and 5
    draft: list[int] = []
    state = None
    for j in range(3):
        found = sample(x[:, j], params, j, allowed_mask=mask[:, j], state=state)
        draft.append(int(found.tokens))
        state = found.state
    verified = verify(x, [draft[:2]], params, 0, allowed_mask=mask)
    assert verified.tokens.tolist() == [draft] and [token // 2 for token in draft] == [0, 1, 2]


def test_a_state_that_was_a_list_in_between_loses_no_bit() -> None:
    params, x = SamplingParams(seed=3, mirostat_tau=2.0, mirostat_eta=0.0), torch.zeros(1, 1, 64)
    found = verify(x, [[]], params, 0, state=[6.1])
    assert found.state is not None and found.state.tolist() == [6.1]


def test_a_bad_row_counts_only_where_the_text_comes_to_it() -> None:
    logits = torch.zeros(1, 2, 10)
    logits[0, 1] = torch.nan
    params = SamplingParams(seed=0)
    first = int(sample(logits[:, 0], params, 0).tokens)
    wrong = verify(logits, [[(first + 1) % 10]], params, 0)
    assert wrong.tokens.tolist() == [[first, -1]] and wrong.status.tolist() == [0]
    with pytest.raises(RequestError, match="row 0 has NaN"):
        verify(logits, [[first]], params, 0)
    flagged = verify(logits, [[first]], params, 0, on_bad_row="flag")
    assert flagged.tokens.tolist() == [[first, -1]] and flagged.next_tokens.tolist() == [-1]
    assert flagged.status.tolist() == [1] and flagged.accepted.tolist() == [1]


def test_no_rows_and_no_drafts_are_served_and_arrays_come_back_as_arrays() -> None:
    params = SamplingParams(seed=0)
    assert verify(torch.zeros(0, 3, 8), torch.zeros(0, 2, dtype=torch.int64), params, 0).tokens.shape == (
        0,
        3,
    )
    x = np.random.default_rng(0).normal(size=(2, 1, 8))
    found = verify(x, np.zeros((2, 0), np.int64), params, np.array([4, 5]), need=("logprob",))
    assert isinstance(found.tokens, np.ndarray) and isinstance(found.fields["logprob"], np.ndarray)
    assert found.tokens[:, 0].tolist() == sample(x[:, 0], params, [4, 5]).tokens.tolist()


def test_drafts_of_unlike_lengths_may_come_as_lists() -> None:
    x = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(seed=i) for i in range(3)]
    for draft, whole in (
        ([[1, 2], None, [3]], [[1, 2], [-1, -1], [3, -1]]),
        ([[1], [], np.array([3])], [[1, -1], [-1, -1], [3, -1]]),  # whose longest is shorter too
        ([[], [], []], [[-1, -1]] * 3),
    ):
        found, padded = (verify(x, one, params, 0) for one in (draft, torch.tensor(whole)))
        assert found.tokens.equal(padded.tokens) and found.next_tokens.equal(padded.next_tokens)
    assert verify(x[:0], [], [], 0).tokens.shape == (0, 3)


def test_what_does_not_fit_is_an_error() -> None:
    x, params = torch.zeros(2, 3, 8), SamplingParams(seed=0)
    cases: list[tuple[Any, str, dict[str, Any]]] = [
        (ShapeError, r"\(2, 2\) integers", {"draft_tokens": torch.ones(2, 1, dtype=torch.int64)}),
        (ShapeError, "one draft a row, 2; got 1", {"draft_tokens": [[1, 2]]}),
        (ShapeError, r"row 1 of draft_tokens must be at most 2 .*\(3,\)", {"draft_tokens": [[1], [2, 2, 2]]}),
        (ShapeError, "row 0 of draft_tokens must be integers", {"draft_tokens": [[1.0, 2], [2, 1]]}),
        (ShapeError, r"\(2, 2\) integers.*complex", {"draft_tokens": torch.ones(2, 2) * 1j}),
        (ShapeError, r"floats; got \(2, 3, 8\) of torch.int64", {"logits": x.long()}),
        (RequestError, r"in \[0, 8\), or -1 behind the end; row 0 has 8", {"draft_tokens": [[1, 8], [2, 1]]}),
        (ShapeError, r"must end in -1.*row 0 is \[-1, 2\]", {"draft_tokens": [[-1, 2], [2, 1]]}),
        (ShapeError, "drafted tokens \\+ 1, vocabulary", {"logits": x[0]}),
        (RequestError, "needs a seed in every row", {"params": SamplingParams()}),
        (ShapeError, "one a row, 2; got 3", {"params": [params] * 3}),
        (ConfigError, "kept cannot be had", {"need": ("kept",)}),
        (
            ShapeError,
            r"must be \(2, 3, 1\) int32.*got \(2, 1\)",
            {"allowed_mask": torch.zeros(2, 1, dtype=torch.int32)},
        ),
        (ShapeError, "state must be one number a row", {"state": [0.0]}),
        (RequestError, "need history", {"params": SamplingParams(seed=0, repetition_penalty=2.0)}),
    ]
    for error, said, change in cases:
        given = {"logits": x, "draft_tokens": [[1, 2], [2, -1]], "params": params, "position": 0} | change
        with pytest.raises(error, match=said):
            verify(**given)
