"""The measures of what dropout does inside a model, each on a case with a known answer."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.tiny_models import VOCABULARY, tiny_model, tokens
from torch import nn

from twodice.dropout.plan import DropoutPlan
from twodice.dropout.sites import find
from twodice.errors import ConfigError
from twodice.random.keys import Key
from twodice.study.mechanisms.ablation import chosen, heads_of, rises, units_of, without
from twodice.study.mechanisms.correlation import correlation, read_units
from twodice.study.mechanisms.ensemble import compare_with_draws
from twodice.study.mechanisms.heads import entropy, read_heads, similarity
from twodice.study.mechanisms.measure import Mechanisms, measure
from twodice.study.mechanisms.measures import DOMAINS, FIELDS, other_domain
from twodice.study.mechanisms.shift import bits_per_byte, domain_text, noisy, sample_text
from twodice.study.worker import Jobs
from twodice.text.corpora import load_documents
from twodice.text.store import TokenStore, prepare
from twodice.text.tokenizer import bytes_tokenizer
from twodice.training.evaluate import nats

FAMILIES = ("gpt2", "llama")
KEY = Key(5).child("test")


def loss_of(model: nn.Module) -> float:
    ids = tokens()
    with torch.no_grad():
        return float(nats(model(input_ids=ids[:, :-1], use_cache=False).logits.double(), ids[:, 1:]))


# ---- heads


def test_equal_heads_are_alike_and_heads_that_share_no_key_are_not() -> None:
    one = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.0, 0.0, 0.5, 0.5]], dtype=torch.float64)
    other = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.9, 0.1, 0.0, 0.0]], dtype=torch.float64)
    assert similarity(torch.stack([one, one])[None]) == 1
    assert similarity(torch.stack([one, other])[None]) == pytest.approx(0, abs=1e-12)
    # Of three pairs one is alike.
    assert similarity(torch.stack([one, other, one])[None]) == pytest.approx(1 / 3)
    assert similarity(one[None, None]) is None


def test_uniform_attention_has_the_entropy_of_its_keys_and_a_single_key_none() -> None:
    assert entropy(torch.full((2, 3, 4, 16), 1 / 16)) == pytest.approx(math.log(16))
    assert entropy(torch.eye(5)[None, None]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_whose_queries_ask_nothing_attends_evenly_in_all_heads(family: str) -> None:
    model = tiny_model(family).eval()
    for module in model.modules():
        if hasattr(module, "c_attn"):
            module.c_attn.weight.data.zero_()
        if hasattr(module, "q_proj"):
            module.q_proj.weight.data.zero_()
    before = model.config._attn_implementation
    queries = torch.tensor([1, 4, 11])
    with torch.no_grad():
        alike, wide = read_heads(model, find(model), lambda: model(input_ids=tokens()), queries)
    assert alike == pytest.approx(1)
    assert wide == pytest.approx(np.mean(np.log([2, 5, 12])), abs=1e-6)
    assert model.config._attn_implementation == before != "eager"


# ---- one part removed


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_units_are_counted_by_the_shape_of_the_model(family: str) -> None:
    model = tiny_model(family)
    inner = {"gpt2": 96, "llama": 40}[family]
    parts = heads_of(find(model))
    assert len(parts) == 2 * 4 and len({part.module for part in parts}) == 2
    assert len(units_of(find(model))) == 2 * inner


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_nothing_reads_is_lost_without_any_change_and_another_is_not(family: str) -> None:
    model = tiny_model(family).eval()
    found = find(model)
    dead, alive = heads_of(found)[5], heads_of(found)[6]
    weight = dead.module.weight.data
    if family == "llama":
        weight[:, dead.first : dead.stop] = 0
    else:
        weight[dead.first : dead.stop] = 0
    told = rises([dead, alive], lambda: loss_of(model))
    assert told[0] == 0 and told[1] != 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_unit_removed_is_a_unit_whose_outgoing_weights_are_zero(family: str) -> None:
    model = tiny_model(family).eval()
    part = units_of(find(model))[7]
    with without(part):
        removed = loss_of(model)
    whole = loss_of(model)
    weight = part.module.weight.data
    if family == "llama":
        weight[:, 7] = 0
    else:
        weight[7] = 0
    assert removed == pytest.approx(loss_of(model), rel=1e-12) and removed != whole


def test_what_is_looked_at_is_the_same_for_the_same_key() -> None:
    parts = units_of(find(tiny_model()))
    names = [(id(p.module), p.first) for p in chosen(parts, 9, KEY)]
    assert names == [(id(p.module), p.first) for p in chosen(parts, 9, KEY)]
    assert len(set(names)) == 9
    assert names != [(id(p.module), p.first) for p in chosen(parts, 9, KEY.child("other"))]
    assert chosen(parts, 10_000, KEY) == parts


# ---- units that move together


def test_a_doubled_unit_is_correlated_and_one_that_never_moves_is_left_out() -> None:
    unit = torch.linspace(-1, 2, 64)
    assert correlation(torch.stack([unit, 3 * unit + 1, -unit], 1)) == pytest.approx(1)
    assert correlation(torch.stack([unit, -2 * unit, torch.full((64,), 0.1)], 1)) == pytest.approx(1)
    assert correlation(torch.stack([unit, torch.full((64,), 0.1)], 1)) is None
    angle = torch.arange(64) * (2 * math.pi / 64)
    assert correlation(torch.stack([angle.sin(), angle.cos()], 1)) == pytest.approx(0, abs=1e-6)


def test_independent_units_are_correlated_as_chance_has_it() -> None:
    """H0: mean |r| of 32 unrelated normal units over 4,096 draws is sqrt(2 / (pi 4096)) = 0.01247.

    Its standard deviation is 0.0075 / sqrt(496 pairs) = 0.00034; a bound of 0.0018 is passed by chance in
    fewer than one in 10^6; a common part of 5 % in all units would be found. The saboteur does not centre.
    """
    values = torch.from_numpy(np.random.default_rng(0).normal(1.0, 1.0, (4096, 32)))
    chance = math.sqrt(2 / (math.pi * 4096))
    found = correlation(values)
    assert found is not None and abs(found - chance) < 0.0018

    unit = values / values.norm(dim=0)
    uncentred = (unit.T @ unit).abs()
    saboteur = float((uncentred.sum() - uncentred.diagonal().sum()) / (32 * 31))
    assert abs(saboteur - chance) > 0.4


@pytest.mark.parametrize("family", FAMILIES)
def test_units_that_all_do_the_same_are_found_in_a_model(family: str) -> None:
    model = tiny_model(family).eval()
    for module in model.modules():
        if family == "gpt2" and hasattr(module, "c_fc"):
            module.c_fc.weight.data[:] = module.c_fc.weight.data[:, :1].clone()
        if hasattr(module, "gate_proj"):
            for linear in (module.gate_proj, module.up_proj):
                linear.weight.data[:] = linear.weight.data[:1].clone()
    with torch.no_grad():
        found = read_units(find(model), lambda: model(input_ids=tokens()), 8, KEY)
        other = tiny_model(family).eval()
        plain = read_units(find(other), lambda: other(input_ids=tokens()), 8, KEY)
    assert found == pytest.approx(1, abs=1e-6)
    assert plain is not None and plain < 0.9


# ---- shifted text


class Uniform(nn.Module):
    """Believes nothing: every token is as likely as any other."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.weight.expand(*input_ids.shape, self.classes))


def test_a_model_that_believes_nothing_needs_the_bits_of_a_uniform_draw_for_each_byte() -> None:
    tokenizer = bytes_tokenizer()
    model = Uniform(tokenizer.vocabulary)
    texts = ["a text that ends inside its third window", "é", ""]
    found = bits_per_byte(model, tokenizer, texts, context=16, rows=2)
    assert found == pytest.approx(math.log2(tokenizer.vocabulary), rel=1e-6)


def test_the_loss_on_text_is_that_of_every_token_after_the_mark_of_a_document() -> None:
    tokenizer = bytes_tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocabulary).eval()
    text = "forty characters, in three windows of 16"
    ids = [tokenizer.end_of_document, *tokenizer.encode(text).tolist()]
    total = 0.0
    with torch.no_grad():
        for begin in range(0, len(ids) - 1, 16):
            window = torch.tensor([ids[begin : begin + 17]])
            total += float(nats(model(input_ids=window[:, :-1]).logits, window[:, 1:]))
    plain = bits_per_byte(model, tokenizer, [text], context=16)
    assert plain == pytest.approx(total / math.log(2) / 40, rel=1e-6)
    assert bits_per_byte(model, tokenizer, [noisy(text, 0.0, text, KEY)], context=16) == plain


def test_noise_replaces_the_share_asked_for_never_by_the_same_and_more_at_a_higher_rate() -> None:
    """H0: each of 40,000 characters is replaced with probability 1/4: 10,000 in all, standard deviation 86.6.

    Farther off than 433 (5 standard deviations) comes by chance in fewer than one in 10^6; a rate wrong by
    0.02 would be found. The saboteur may replace a character by itself.
    """
    text = "abcd" * 10_000
    assert noisy(text, 0.0, text, KEY) == text
    everywhere = noisy(text, 1.0, text, KEY)
    assert all(a != b for a, b in zip(text, everywhere, strict=True)) and set(everywhere) == set("abcd")
    little, much = noisy(text, 0.25, text, KEY), noisy(text, 0.5, text, KEY)
    hit = [i for i in range(len(text)) if little[i] != text[i]]
    assert abs(len(hit) - 10_000) <= 433
    assert all(much[i] == little[i] for i in hit)
    assert noisy(text, 0.25, text, KEY) == little != noisy(text, 0.25, text, KEY.child("other"))
    itself = np.random.default_rng(0).integers(0, 4, len(hit)) == 0
    assert abs(len(hit) - itself.sum() - 10_000) > 433
    with pytest.raises(ConfigError, match=r"must be in \[0, 1\]; got 1.5"):
        noisy(text, 1.5, text, KEY)
    with pytest.raises(ConfigError, match="two characters or more; got 1"):
        noisy(text, 0.5, "aa", KEY)


def test_another_domain_is_one_that_was_not_trained_on() -> None:
    assert other_domain(["my-text/"]) == DOMAINS[0] and other_domain(["x", "python-docs"]) == DOMAINS[1]
    assert "Python" in DOMAINS[0] and "python" in domain_text(["my-text/"], 50_000).lower()
    letters = domain_text(["python-docs"], 500)
    assert len(letters) == 500 and len(set(letters)) <= 16


def test_a_sample_of_documents_is_as_long_as_asked_for_and_keyed() -> None:
    texts = ["a" * 30, "", "b" * 30, "c" * 30]
    found = sample_text(texts, 50, KEY)
    assert sum(map(len, found)) == 50 and len(found) == 2 and found == sample_text(texts, 50, KEY)
    assert len({"".join(sample_text(texts, 50, KEY.child(i))) for i in range(20)}) > 1


# ---- the implicit ensemble


def net(*, linear: bool, rate: float = 0.3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = [nn.Linear(5, 12), nn.Dropout(rate)] + ([] if linear else [nn.Tanh()]) + [nn.Linear(12, 4)]
        model = nn.Sequential(*layers)
    if not linear:
        model[0].weight.data *= 4
    return model.eval()


def test_weight_scaling_is_the_geometric_mean_of_draws_where_logits_are_linear() -> None:
    """H0: behind the dropout all is linear, so the distance is what K = 2,000 draws leave.

    With small errors d of the logits it is half their variance under the belief, at most half the mean of
    p d^2, whose expectation m is computed below. A weighted sum of squares of normal values is above 30 m
    with probability below 1e-7. The saboteur bends what was dropped.
    """
    x, draws, rate = torch.linspace(-1, 1, 15).view(3, 5), 2000, 0.3
    targets = torch.tensor([0, 1, 2])
    model = net(linear=True)
    with torch.no_grad():
        inner = model[0](x)
        variance = rate / (1 - rate) / draws * (inner**2) @ (model[2].weight ** 2).T
        m = float((model(x).softmax(-1) * variance / 2).sum(-1).mean())
    found = compare_with_draws(model, f"dropout={rate}", x, targets, draws)
    assert 0 <= found.distance < 30 * m
    bent = compare_with_draws(net(linear=False), f"dropout={rate}", x, targets, draws)
    assert bent.distance > 30 * m


def test_the_gain_of_averaging_is_that_of_the_two_networks_there_are() -> None:
    """H0: one unit, kept or not with 1/2: the mean belief is (s(4) + s(0)) / 2, one pass believes s(2).

    K = 4,096 draws leave the mean a standard error of 0.0038, 0.0051 in nats; a bound of 0.026 is passed by
    chance in fewer than one in 10^6.
    """
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 2, bias=False))
    model[1].weight.data = torch.tensor([[2.0], [0.0]])
    found = compare_with_draws(model, "dropout=0.5", torch.ones(1, 1), torch.tensor([0]), 4096)
    sigmoid = [1 / (1 + math.exp(-z)) for z in (0, 2, 4)]
    assert found.gain == pytest.approx(math.log(sigmoid[1] / ((sigmoid[0] + sigmoid[2]) / 2)), abs=0.026)
    assert model.training and not model[0]._forward_hooks


def test_masks_that_reach_nothing_change_nothing() -> None:
    model = net(linear=False)
    model[3].weight.data.zero_()
    found = compare_with_draws(model, "dropout=0.5", torch.ones(2, 5), torch.tensor([1, -100]), 7)
    assert found.gain == pytest.approx(0, abs=1e-6) and found.distance == pytest.approx(0, abs=1e-6)


# ---- all together


def test_a_trial_that_cannot_be_measured_is_told_and_not_lost(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    jobs = Jobs(said.append, lambda: False)
    (tmp_path / "trial").mkdir()
    jobs._stores["text"] = None
    assert jobs._mechanisms("text", str(tmp_path / "trial")) == {}
    (notice,) = said
    assert notice["kind"] == "notice" and notice["text"].startswith("not measured inside: ")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder = tmp_path_factory.mktemp("text")
    text = folder / "text.txt"
    lines = [f"{i}: the quick brown fox number {i * i} jumps over {i % 7} lazy dogs\n\n" for i in range(120)]
    text.write_text("".join(lines), encoding="utf-8")
    return prepare(load_documents([text]), tokenizer="bytes", context=16, key=KEY, out=folder / "store")


def test_every_measure_has_a_name_in_the_table() -> None:
    assert tuple(field.name for field in fields(Mechanisms)) == FIELDS


@pytest.mark.parametrize("family", FAMILIES)
def test_a_measured_model_is_left_as_it_was_and_measured_alike_again(family: str, store: TokenStore) -> None:
    model = tiny_model(family, vocab_size=store.vocabulary)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    ids = tokens() % VOCABULARY
    with torch.no_grad():
        before = model(input_ids=ids).logits
    plan = DropoutPlan.parse("residual=linear(0.2, 0.0)")
    found = measure(model, store, 16, plan, ["text.txt"], total_steps=10)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert model.training and model.config._attn_implementation == implementation
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)

    values = asdict(found)
    assert all(value is not None and math.isfinite(value) for value in values.values())
    assert 0 < values["head_similarity"] < 1 and 0 < values["head_entropy"] < math.log(16)
    assert 0 < values["unit_correlation"] < 1 and values["ensemble_distance"] > 0
    assert values["head_removed_most"] > values["head_removed"]
    assert measure(model, store, 16, plan, ["text.txt"], total_steps=10) == found
    without_plan = measure(model, store, 16, DropoutPlan.parse("none"), ["text.txt"])
    assert without_plan.own_ensemble_gain is None
    assert without_plan.ensemble_gain == found.ensemble_gain
