"""Each stage against its formula in plain Python, and what must hold on rows made to break it.

The formulas are written from the papers, in float64 with sums by `math.fsum` and nothing of the library's
code. They are compared where the decision is clear: a row in which a quantity lies within `MARGIN` of its
limit is passed over, and each test says how many must remain.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.sampling_rows import KINDS, row

from twodice.kernels.sampling_settings import NEEDS
from twodice.sampling.explain import edited
from twodice.sampling.fields import FIELDS
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample

MARGIN = 1e-7  # far above n 2^-43 and float64's own error, for the rows of this file
GOOD = [kind for kind in KINDS if kind not in ("all -inf", "nan", "+inf")]


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    weights = [math.exp((value - top) / temperature) for value in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def logs(x: Sequence[float]) -> list[float]:
    total = math.log(math.fsum(math.exp(v - x[0]) for v in x))
    return [v - x[0] - total for v in x]


def entropy(p: Sequence[float]) -> float:
    return -math.fsum(v * math.log(v) for v in p if v > 0)


class Unclear(Exception):
    """A quantity of this row is too near to its limit for two ways of rounding to agree."""


def above(value: float, limit: float) -> bool:
    if value != limit and abs(value - limit) <= MARGIN * max(1.0, abs(limit)):
        raise Unclear
    return value >= limit


# Each takes the logits of the row in rank order, -inf left out, and the value; returns the ranks kept.


def top_n_sigma(x: list[float], n: float) -> list[int]:
    mean = math.fsum(x) / len(x)
    sigma = math.sqrt(math.fsum((v - mean) ** 2 for v in x) / len(x))
    # Distances are fixed-point numbers of 20 binary digits, so sigma is known to some 1e-6.
    if any(0 < abs(v - (x[0] - n * sigma)) < 1e-4 for v in x[1:]) or x[0] - x[-1] > 1000:
        raise Unclear
    return [i for i, v in enumerate(x) if v >= x[0] - n * sigma or v == x[0]]


def top_k(x: list[float], k: int) -> list[int]:
    return list(range(len(x) if k in (0, -1) else min(k, len(x))))


def top_p(x: list[float], p: float) -> list[int]:
    q, kept = softmax(x), 0
    if p >= 1:
        return list(range(len(x)))
    while kept < 1 or not above(math.fsum(q[:kept]), p):
        kept += 1
    return list(range(kept))


def min_p(x: list[float], m: float) -> list[int]:
    return [i for i, v in enumerate(x) if m == 0 or above(v - x[0], math.log(m))]


def top_h(x: list[float], h: float) -> list[int]:
    parts = [-v * math.exp(v) for v in logs(x)]
    most, kept = h * math.fsum(parts), 1
    while kept < len(x) and h < 1:
        over = math.fsum(parts[: kept + 1]) - most
        if abs(over) < MARGIN:
            raise Unclear
        if over > 0:
            break
        kept += 1
    return list(range(len(x) if h >= 1 else kept))


def typical(x: list[float], p: float) -> list[int]:
    q = softmax(x)
    if p >= 1:
        return list(range(len(x)))
    far = [abs(-v - entropy(q)) for v in logs(x)]
    order = sorted(range(len(x)), key=lambda i: far[i])
    kept = 1
    while not above(math.fsum(q[i] for i in order[:kept]), p):
        kept += 1
    last = order[kept - 1]
    if any(abs(value - far[last]) < MARGIN and x[i] != x[last] for i, value in enumerate(far)):
        raise Unclear
    return [i for i, value in enumerate(far) if value < far[last] or x[i] == x[last]]


def epsilon(x: list[float], e: float) -> list[int]:
    return [i for i, v in enumerate(logs(x)) if e == 0 or i == 0 or above(v, math.log(e))]


def eta(x: list[float], e: float) -> list[int]:
    limit = min(e, math.sqrt(e) * math.exp(-entropy(softmax(x)))) if e > 0 else 0.0
    return epsilon(x, limit)


def xtc(x: list[float], threshold: float) -> list[int]:
    likely = [i for i, v in enumerate(softmax(x)) if above(v, threshold)]
    return [i for i in range(len(x)) if i not in likely[:-1]]


def mirostat(x: list[float], tau: float) -> list[int]:
    return [i for i, v in enumerate(logs(x)) if i == 0 or above(v, -2 * tau * math.log(2))]


STAGES: dict[str, tuple[Callable[[list[float], Any], list[int]], list[Any], dict[str, Any]]] = {
    "top_n_sigma": (top_n_sigma, [0.0, 0.5, 1.0, 1.7, 3.0, 1e6], {}),
    "top_k": (top_k, [0, -1, 1, 2, 6, 7, 8, 63, 64, 65, 2**40], {}),
    "top_p": (top_p, [0.0, 1e-9, 0.1, 0.5, 0.9, 0.999, 1.0], {}),
    "min_p": (min_p, [0.0, 1e-12, 0.01, 0.3, 1.0], {}),
    "top_h": (top_h, [0.0, 0.1, 0.4, 0.9, 1.0], {}),
    "typical_p": (typical, [0.0, 0.2, 0.6, 0.95, 1.0], {}),
    "epsilon_cutoff": (epsilon, [0.0, 1e-12, 1e-3, 0.1, 0.9], {}),
    "eta_cutoff": (eta, [0.0, 1e-12, 1e-3, 0.1, 0.9], {}),
    "xtc_threshold": (xtc, [1e-9, 0.01, 0.1, 0.3, 0.6, 1.0], {"xtc_probability": 1.0}),
    "mirostat_tau": (mirostat, [0.3, 1.0, 2.2, 9.0, 1000.0], {}),
}


def kept(x: torch.Tensor, **settings: Any) -> list[int]:
    found = sample(x, SamplingParams(seed=0, **settings), 0, need=("kept",)).kept
    assert found is not None
    return found[1].tolist()


def rows(vocabularies: Sequence[int] = (1, 2, 7, 64), times: int = 2) -> list[torch.Tensor]:
    generator = np.random.default_rng(8)
    made = [row(generator, kind, v) for v in vocabularies for kind in GOOD for _ in range(times)]
    types = (torch.float32, torch.bfloat16, torch.float64)
    with np.errstate(over="ignore"):
        return [torch.from_numpy(x).to(types[i % 3]) for i, x in enumerate(made)]


def compare(name: str, formula: Callable[[list[float], Any], list[int]], temperature: float) -> list[int]:
    """How many cases were compared, in how many of these something is cut, and in how many all agreed."""
    _, values, others = STAGES[name]
    compared = cut = agreed = 0
    for x in rows():
        alive = sorted((-value, i) for i, value in enumerate(x.double().tolist()) if value > -math.inf)
        ranked = [i for _, i in alive]
        scaled = [-value if name == "top_n_sigma" else -value / temperature for value, _ in alive]
        for value in values:
            try:
                wanted = [ranked[i] for i in formula(scaled, value)]
            except Unclear:
                continue
            agreed += kept(x, temperature=temperature, **{name: value}, **others) == wanted
            compared += 1
            cut += len(wanted) < len(ranked)
    return [compared, cut, agreed]


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("temperature", [1.0, 0.37])
def test_a_stage_keeps_what_its_formula_keeps(name: str, temperature: float) -> None:
    formula, values, _ = STAGES[name]
    compared, cut, agreed = compare(name, formula, temperature)
    assert agreed == compared and compared > 60 * len(values) and cut > 40


@pytest.mark.parametrize("name", STAGES)
def test_a_formula_that_is_off_by_one_token_would_be_found(name: str) -> None:
    def short(x: list[float], value: Any) -> list[int]:
        found = STAGES[name][0](x, value)
        return found[:-1] if 1 < len(found) < len(x) else found

    compared, _, agreed = compare(name, short, 1.0)
    assert compared - agreed > 10


TARGETS = {name: field.neutral for name, field in FIELDS.items() if field.neutral is not None}


@pytest.mark.parametrize("name", TARGETS)
def test_the_neutral_value_changes_not_a_bit(name: str) -> None:
    others: dict[str, Any] = {"stop_tokens": [1]} if name == "min_tokens" else {}
    others |= {"xtc_probability": 0.0} if name == "xtc_by_expectation" else {}
    neutral = SamplingParams(seed=5, **{name: TARGETS[name]}, **others)
    plain = SamplingParams(seed=5)
    for x in rows((7, 64), 1):
        one, other = (
            sample(x, params, 3, need=NEEDS, history=([0, 1], [0, 2], [1])) for params in (neutral, plain)
        )
        assert torch.equal(one.tokens, other.tokens) and one.state is None
        for field in NEEDS:
            a, b = getattr(one, field), getattr(other, field)
            for left, right in zip(
                a if field == "kept" else (a,), b if field == "kept" else (b,), strict=True
            ):
                assert torch.equal(left, right)


def test_temperature_keeps_the_order_and_its_ends_are_the_first_and_the_uniform() -> None:
    for x in rows():
        alive = int((x > -torch.inf).sum())
        first = int(x.double().argmax())
        assert kept(x, temperature=0) == [first]
        assert kept(x, temperature=1e6) == kept(x, temperature=1e-6) == kept(x)
        cold, hot = (
            sample(x, SamplingParams(temperature=t, seed=1), 0, need=("entropy", "rank")) for t in (1e-6, 1e6)
        )
        gaps = x.double().max() - x.double()
        if not bool(((gaps > 0) & (gaps < 1e-3)).any()):
            equal = int((gaps == 0).sum())
            assert float(cold.entropy) == pytest.approx(math.log(equal), abs=1e-9)
            assert int(cold.rank) < equal
        if float(gaps[gaps < torch.inf].max()) < 100:
            assert float(hot.entropy) == pytest.approx(math.log(alive), abs=1e-6)


def test_dynamic_temperature_is_its_formula() -> None:
    compared = 0
    for x in rows((2, 7, 64)):
        values = [v for v in x.double().tolist() if v > -math.inf]
        for spread, power in [(0.3, 1.0), (0.7, 2.0), (2.0, 0.5), (0.4, 0.0)]:
            share = entropy(softmax(values)) / math.log(len(values)) if len(values) > 1 else 0.0
            low, high = max(0.0, 0.9 - spread), 0.9 + spread
            t = low + (high - low) * share**power if len(values) > 1 else 0.9
            if t < 1e-3 or (share < 1e-9 and power > 0):
                continue
            params = SamplingParams(temperature=0.9, dynatemp_range=spread, dynatemp_exponent=power, seed=1)
            found = sample(x, params, 0, need=("entropy",))
            assert float(found.entropy) == pytest.approx(entropy(softmax(values, t)), rel=1e-6, abs=1e-7)
            compared += 1
    assert compared > 150


def test_the_gaps_of_the_tail_have_their_own_log_probability() -> None:
    for gap in (20.0, 30.0, 80.0):
        x = torch.tensor([[0.0, -gap]], dtype=torch.float64)
        forced = sample(x, SamplingParams(seed=0, banned_tokens=[0]), 0, need=("raw_logprob", "logprob"))
        assert float(forced.raw_logprob) == pytest.approx(-gap - math.log1p(math.exp(-gap)), rel=1e-14)
        assert float(forced.logprob) == 0 and kept(x) == [0, 1]
        assert kept(x, min_p=math.exp(-gap) * 0.999) == [0, 1] and kept(x, min_p=math.exp(-gap) * 1.001) == [
            0
        ]


@pytest.mark.parametrize("name", STAGES)
def test_a_large_vocabulary_and_rows_that_lie_apart_change_nothing(name: str) -> None:
    _, values, others = STAGES[name]
    generator = torch.Generator().manual_seed(1)
    small = torch.randn(3, 500, generator=generator) * 4
    wide = torch.full((3, 262_144), -torch.inf)
    wide[:, ::525][:, :500] = small
    apart = torch.empty(500, 6)[:, ::2].t().copy_(small)
    assert apart.stride(1) != 1
    settings = {name: values[2], **others}
    params = SamplingParams(seed=3, **settings)
    plain, stretched, strided = (
        sample(x, params, torch.arange(3), need=("kept", "rank", "entropy")) for x in (small, wide, apart)
    )
    assert torch.equal(plain.kept[0], stretched.kept[0])
    assert torch.equal(plain.kept[1] * 525, stretched.kept[1])
    torch.testing.assert_close(plain.entropy, stretched.entropy, rtol=1e-12, atol=1e-12)
    assert torch.equal(plain.tokens, strided.tokens) and torch.equal(plain.kept[1], strided.kept[1])


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("bad", ["all -inf", "nan", "+inf"])
def test_no_stage_makes_a_token_of_a_bad_row_or_of_none(name: str, bad: str) -> None:
    _, values, others = STAGES[name]
    x = torch.zeros(3, 9)
    x[1] = torch.from_numpy(row(np.random.default_rng(1), bad, 9))
    for value in values:
        params = SamplingParams(seed=0, **{name: value}, **others)
        found = sample(x, params, 0, on_bad_row="flag", need=NEEDS)
        assert found.tokens.tolist()[1] == -1 and min(found.tokens.tolist()[::2]) >= 0
        assert found.kept[0][1] == found.kept[0][2] and bool(found.entropy[1].isnan())
        empty = sample(torch.zeros(0, 9), params, 0, need=NEEDS)
        assert empty.tokens.shape == (0,) and empty.kept[0].tolist() == [0]


@pytest.mark.parametrize("name", STAGES)
def test_two_settings_draw_apart_only_where_one_forbids_what_the_other_drew(name: str) -> None:
    """Coupled draws: 400 positions of one row under each value of a stage and under none."""
    _, values, others = STAGES[name]
    x = (torch.randn(1, 30, generator=torch.Generator().manual_seed(2)) * 1.5).expand(400, -1)
    position = torch.arange(400)
    free = sample(x, SamplingParams(seed=9), position).tokens
    parted = 0
    for value in values:
        params = SamplingParams(seed=9, **{name: value}, **others)
        found = sample(x, params, position, need=("kept",))
        allowed = [set(found.kept[1][a:b].tolist()) for a, b in itertools.pairwise(found.kept[0].tolist())]
        for i, token in enumerate(free.tolist()):
            if token in allowed[i]:
                assert int(found.tokens[i]) == token
            else:
                parted += 1
    assert parted > 100


def test_completions_are_streams_of_their_own_and_the_first_does_not_depend_on_their_number() -> None:
    """100 completions at 50 positions of 64 equal tokens: two streams meet in 1/64 of the places.

    99 pairs of neighbours: 77.3 meetings are expected with a standard deviation of 8.7, and 50 coins of 100
    with one of 5; the limits are 6.5 of these away, so a false alarm is below 1e-9. Streams that are the
    same in one position of thirty would be found.
    """
    x = torch.zeros(100, 64)
    tokens = torch.stack(
        [sample(x, SamplingParams(seed=1), p, completion=torch.arange(100)).tokens for p in range(50)], 1
    )
    assert 20 < int((tokens[1:] == tokens[:-1]).sum()) < 150
    few = torch.stack(
        [sample(x[:3], SamplingParams(seed=1), p, completion=[0, 1, 2]).tokens for p in range(50)], 1
    )
    assert torch.equal(few, tokens[:3])
    xtc = SamplingParams(xtc_probability=0.5, xtc_threshold=1e-3, seed=1)
    sizes = sample(x, xtc, 0, completion=torch.arange(100), need=("kept",)).kept[0].diff()
    assert 15 < int((sizes == 1).sum()) < 85 and set(sizes.tolist()) == {1, 64}  # a coin for each completion


# ---- edits


def penalised(x: list[float], seen: list[int], prompt: int, s: dict[str, Any]) -> list[float]:
    """Stage 3 from the definitions, one token of the vocabulary after the other."""
    first = max(0, len(seen) - s["penalty_range"]) if s["penalty_range"] is not None else 0
    out = []
    for token, value in enumerate(x):
        if token in seen[first:]:
            value = value / s["repetition_penalty"] if value > 0 else value * s["repetition_penalty"]
        often = Counter(seen[max(first, prompt) :])[token]
        value -= often * s["frequency_penalty"] + (often > 0) * s["presence_penalty"]
        n = s["no_repeat_ngram_size"]
        runs = {tuple(seen[i : i + n]) for i in range(len(seen) - n + 1)} if n else set()
        if n and tuple([*seen, token][-n:]) in runs:
            value = -math.inf
        longest = 0
        for size in range(1, len(seen)):
            end = seen[-size:]
            if not set(end) & s["breakers"] and any(
                seen[i : i + size] == end and seen[i + size] == token for i in range(len(seen) - size)
            ):
                longest = size
        if longest >= s["allowed"] and token not in s["breakers"]:
            value -= s["dry_multiplier"] * s["dry_base"] ** (longest - s["allowed"])
        out.append(value)
    return out


def test_penalties_are_their_definitions() -> None:
    generator = np.random.default_rng(5)
    moved = 0
    for case in range(120):
        vocabulary = int(generator.choice([2, 3, 9]))
        seen = generator.integers(vocabulary, size=generator.integers(0, 30)).tolist()
        prompt = int(generator.integers(0, len(seen) + 1))
        s: dict[str, Any] = {
            "repetition_penalty": float(generator.choice([1.0, 1.5, 0.5])),
            "frequency_penalty": float(generator.choice([0.0, 0.25, -0.5])),
            "presence_penalty": float(generator.choice([0.0, 0.75])),
            "penalty_range": [None, 1, 4][case % 3],
            "no_repeat_ngram_size": int(generator.choice([0, 1, 2, 4])),
            "dry_multiplier": 0.5, "dry_base": 1.25, "allowed": int(generator.choice([1, 2, 3])),
            "breakers": {int(generator.integers(vocabulary))} if case % 2 else set(),
        }  # fmt: skip
        x = generator.normal(size=vocabulary) * 3
        params = SamplingParams(
            dry_allowed_length=s["allowed"], dry_breakers=s["breakers"] or None,
            **{name: value for name, value in s.items() if name in FIELDS},
        )  # fmt: skip
        past = (torch.tensor(seen, dtype=torch.int64), [0, len(seen)], [prompt])
        found = edited(torch.from_numpy(x)[None], params, history=past)[0].tolist()
        assert found == pytest.approx(penalised(x.tolist(), seen, prompt, s), rel=1e-6, abs=1e-6)
        moved += found != x.tolist()
    assert moved > 90


def test_a_far_range_of_dry_and_its_greatest_penalty() -> None:
    seen = [3, 1, 2, 3, 1]
    for reach, wanted in [(None, -1.0), (5, -1.0), (4, 0.0), (2, 0.0)]:
        params = SamplingParams(dry_multiplier=1.0, dry_range=reach)
        found = edited(torch.zeros(1, 4), params, history=(seen, [0, 5], [0]))
        assert found[0].tolist() == [0, 0, wanted, 0]
    long = SamplingParams(dry_multiplier=1.0, dry_base=1e6)
    found = edited(torch.zeros(1, 2), long, history=([0] * 2000, [0, 2000], [0]))
    assert found[0].tolist() == [pytest.approx(-1e30), 0]
