"""The kit's own parts: what is claimed, the interface, the rows, and the page."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.broken_samplers import InverseTransform, ours, sample_one
from tests.support.sampling_rows import batch

from twodice import SamplingParams, sample
from twodice.errors import ConfigError, ShapeError
from twodice.sampling.conformance.claims import Rules, claimed
from twodice.sampling.conformance.page import page
from twodice.sampling.conformance.rows import LADDER, all_rows
from twodice.sampling.conformance.sampler import NEUTRAL, Rows, as_sampler, load
from twodice.sampling.conformance.verdict import judge, part_names

HALVES = np.log(np.array([0.125, 0.5, 0.125, 0.25])).astype(np.float32)


def kept(logits: np.ndarray, rules: Rules | None = None, **settings: Any) -> list[int]:
    return claimed(logits, {**NEUTRAL, **settings}, rules or Rules()).ids.tolist()


def test_the_claim_follows_the_worked_examples_of_the_contract() -> None:
    assert kept(HALVES) == [1, 3, 0, 2]
    assert kept(HALVES, top_k=3) == [1, 3, 0]
    assert kept(HALVES, top_k=9) == [1, 3, 0, 2]
    assert [len(kept(HALVES, top_p=p)) for p in (0.0, 0.49, 0.51, 0.76, 1.0)] == [1, 1, 2, 3, 4]
    assert [len(kept(HALVES, min_p=m)) for m in (0.0, 0.2, 0.4, 0.6, 1.0)] == [4, 4, 2, 1, 1]
    assert kept(np.array([1, 3, 3], np.float32), temperature=0.0) == [1]
    assert kept(np.array([-np.inf, 0, -np.inf], np.float32), top_p=0.5) == [1]


def test_the_claim_follows_other_rules_where_they_are_claimed() -> None:
    assert kept(HALVES, Rules(ties="kept"), top_k=3) == [1, 3, 0, 2]
    assert kept(HALVES, Rules(crossing="dropped"), top_p=0.6) == [1]
    assert kept(HALVES, Rules(crossing="dropped"), top_p=0.1) == [1], "one token always stays"
    hot = {"temperature": 4.0, "top_p": 0.6}
    assert len(kept(HALVES, **hot)) == 3 and len(kept(HALVES, Rules(temperature="last"), **hot)) == 2
    late = claimed(HALVES, {**NEUTRAL, **hot}, Rules(temperature="last")).probabilities
    assert late == pytest.approx(np.array([2**0.25, 1]) / (2**0.25 + 1))


def test_probabilities_of_the_claim_are_those_of_exact_arithmetic() -> None:
    x = np.array([-3.0, 0.0, -21.0, -1.5], np.float32)
    found = claimed(x, {**NEUTRAL, "temperature": 0.75})
    weights = [Fraction(math.exp(float(x[i]) / 0.75)) for i in found.ids]
    for got, weight in zip(found.probabilities, weights, strict=True):
        assert got == pytest.approx(float(weight / sum(weights)), rel=1e-14)


def test_the_claim_and_the_library_keep_the_same_tokens_on_adversarial_rows() -> None:
    """Two programs that share no code; where the mass is within 1e-9 of p either is right, so p is odd."""
    settings = [
        {"top_k": 5},
        {"top_p": 0.7310001},
        {"min_p": 0.0371},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8130007, "min_p": 0.0113},
    ]
    compared = 0
    for number in (0, 4, 8, 12):  # float32 rows
        logits = batch(number, 24, 61)
        for one in logits:
            if not torch.isfinite(one.max()) or one.isnan().any():
                continue
            for setting in settings:
                found = sample(one[None], SamplingParams(**setting, seed=0), 0, need=("kept",)).kept
                assert found is not None
                assert found[1].tolist() == kept(one.numpy(), **setting)
                compared += 1
    assert compared > 200


def test_no_row_is_decided_by_the_last_bits() -> None:
    """A cut that rounding could move would judge arithmetic and not the sampler; equal-top-p is exact."""
    for row in all_rows():
        settings = {**NEUTRAL, **row.settings}
        if row.name == "equal-top-p" or (settings["top_p"] is None and settings["min_p"] is None):
            continue
        x = row.make()
        ids = claimed(x, settings).ids.tolist()
        for by in (-1e-6, 1e-6):
            moved = {n: v * (1 + by) if n in ("top_p", "min_p") and v else v for n, v in settings.items()}
            assert claimed(x, moved).ids.tolist() == ids, row.name


def test_the_deepest_row_holds_what_it_says() -> None:
    row = next(row for row in all_rows() if row.name == "deep-tail")
    found = claimed(row.make(), NEUTRAL)
    assert len(found.ids) == 2**17 and 1e-4 < found.probabilities[-LADDER[-1][1] :].sum() < 1.1e-4
    assert found.probabilities[-1] == pytest.approx(1e-9, rel=0.05)


def test_rows_are_a_sequence_of_mappings() -> None:
    rows = Rows([{"top_k": 3}, {"top_p": 0.9}], np.array([5, 6, 7]), np.array([1, 2, 3]), np.array([0, 1, 0]))
    assert rows[1] == {
        "temperature": 1.0,
        "top_k": None,
        "top_p": 0.9,
        "min_p": None,
        "seed": 2,
        "position": 6,
    }
    assert [row["position"] for row in rows] == [5, 6, 7] and len(rows[1:]) == 2
    assert [(kind["top_k"], at.tolist()) for kind, at in rows.groups()] == [(3, [0, 2]), (None, [1])]
    assert Rows([{}], np.array([5]), None)[0]["seed"] is None


def test_a_sampler_written_row_by_row_is_judged_like_a_fast_one() -> None:
    slow, fast = (judge(as_sampler(f), rows=["top-p", "place"], draws=2_000) for f in (sample_one, ours))
    assert [one.cell for one in slow.judged] == [one.cell for one in fast.judged]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "twodise",
            "module:function, or one of twodice, transformers; got 'twodise'; did you mean 'twodice'?",
        ),
        ("no.such.module:f", "can be imported; 'no.such.module' gave ModuleNotFoundError"),
        ("math:sqroot", "there is no 'sqroot'; did you mean 'sqrt'?"),
        ("torch:nothing", "there is no 'nothing'"),
        ("torch:tesnor", "there is no 'tesnor'; did you mean 'tensor'?"),  # and not the class Tensor
        ("json:decode", "there is no 'decode'"),  # decoder is a module
        ("json:JSONDecode", "there is no 'JSONDecode'"),  # JSONDecoder is a class
        ("json:JSONEncoder.encoed", "there is no 'encoed'; did you mean 'encode'?"),
        ("math:pi", "a sampler must be a function; math:pi is float"),
        ("json:dumps", "a sampler must take (logits, rows); json:dumps is defined as dumps(obj, *"),
        (":f", "module:function"),
    ],
)
def test_a_sampler_that_cannot_be_meant_is_a_clear_error(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert says in str(caught.value) and len(str(caught.value)) < 240
    assert "did you mean" in says or "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (lambda x, rows: x.argmax(1)[:-1], ShapeError, "one integer a row, shape ("),
        (lambda x, rows: x.softmax(1), ShapeError, "of float32 at 'plain'"),
        (lambda x, rows: x.argmax(1).float(), ShapeError, "of float32"),
        (lambda x, rows: "tokens", ShapeError, "tensor, array or list; got str"),
        (lambda x, rows: 1 / 0, ConfigError, "raised ZeroDivisionError at 'plain': division by zero"),
    ],
)
def test_a_wrong_answer_of_a_sampler_is_a_clear_error(answer: Any, error: type, says: str) -> None:
    with pytest.raises(error) as caught:
        judge(as_sampler(answer, "mine"), rows=["plain"], draws=2_000)
    assert says in str(caught.value) and "mine" in str(caught.value)


def test_bad_settings_of_the_kit_name_what_would_be_right() -> None:
    sampler = load("twodice")
    with pytest.raises(ConfigError, match=r"draws must be at least 2000.*got 10"):
        judge(sampler, draws=10)
    with pytest.raises(ConfigError, match="no row 'top-kk'; did you mean 'top-k'"):
        judge(sampler, rows=["top-kk"])
    with pytest.raises(ConfigError, match="alpha must be in"):
        judge(sampler, alpha=0.0)
    with pytest.raises(ConfigError, match="ties must be one of lower-id, kept; got 'keep'"):
        Rules.parse(ties="keep")
    with pytest.raises(ConfigError, match="may offer seeds and coupled; got 'seed'"):
        as_sampler(ours, offers=["seed"])
    with pytest.raises(ConfigError, match="must offer seeds; got coupled alone"):
        as_sampler(ours, offers=["coupled"])
    assert as_sampler(ours, offers="seeds").offers == {"seeds"}
    with pytest.raises(ConfigError, match="rows must name at least one"):
        judge(sampler, rows=[])


def test_settings_that_a_sampler_does_not_offer_are_said_and_not_failed() -> None:
    right = InverseTransform(1)

    def no_min_p(logits: torch.Tensor, rows: Rows) -> np.ndarray:
        if any(kind["min_p"] for kind in rows.kinds):
            raise NotImplementedError("no min-p here")
        return right(logits, rows)

    verdict = judge(as_sampler(no_min_p, offers=[]), rows=["min-p", "plain", "seeds"], draws=2_000)
    assert not verdict.rejected and {one.cell.part for one in verdict.judged} == {"plain"}
    assert verdict.not_offered == (
        ("min-p", "no min-p here"),
        ("seeds", "the sampler does not offer seeds"),
    )


def test_token_ids_outside_the_vocabulary_are_rejected() -> None:
    for wrong in (-1, 100):

        def beyond(logits: torch.Tensor, rows: Rows, wrong: int = wrong) -> np.ndarray:
            tokens = ours(logits, rows).numpy().copy()
            tokens[::1000] = wrong
            return tokens

        verdict = judge(as_sampler(beyond), rows=["plain"], draws=5_000)
        assert verdict.rejecting() == ("kept set",)


def test_names_of_parts_can_be_typed_and_are_each_one_thing() -> None:
    names = part_names()
    assert len(set(names)) == len(names) and all(not set(name) & set(" ,;") for name in names)


def test_the_page_escapes_names_and_is_the_same_each_time() -> None:
    sampler = as_sampler(ours, "<script>alert(1)</script>")
    verdict = judge(sampler, rows=["plain", "place"], draws=2_000)
    text = page(verdict)
    assert text == page(verdict) and "<script" not in text and "&lt;script&gt;" in text
    assert "http" not in text.replace("http-equiv", "")


def test_the_sampler_that_the_docs_show_is_accepted() -> None:
    text = (Path(__file__).parents[3] / "docs" / "conformance.md").read_text("utf-8")
    shown: dict[str, Any] = {}
    exec(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0], shown)
    verdict = judge(as_sampler(shown["draw"]), rows=["top-p", "place", "coupling"], draws=2_000)
    assert not verdict.rejected and verdict.not_offered == () and len(verdict.judged) == 8
