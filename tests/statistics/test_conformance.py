"""The conformance kit: right samplers pass; each broken one is rejected by the check that is meant for it.

Hypothesis of each cell: what the sampler claims. Draws: as given below. False alarm: at most 1e-6 for each
call of the kit, by Holm's correction over exact p-values; here seeds are fixed, so each verdict is the same
each time. The smallest defect of each cell is computed by the kit and held against simulation in
``test_the_power_that_is_stated_is_there``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom, chisquare
from tests.support import broken_samplers as broken

from twodice.sampling.conformance import exact
from twodice.sampling.conformance.sampler import Function, as_sampler, load
from twodice.sampling.conformance.verdict import CHECKS, Verdict, judge, part_names

COSTLY = {"deep-tail", "leak-top-k", "leak-top-p", "leak-min-p", "wide"}
CHEAP = [name for name in part_names() if name not in COSTLY]


def rejected_cells(verdict: Verdict) -> list[str]:
    return [f"{one.cell.part} {one.cell.kind}: {one.cell.found}" for one in verdict.judged if one.rejected]


def test_twodice_draws_as_it_claims() -> None:
    verdict = judge(load("twodice"), rows=CHEAP, draws=20_000)
    assert rejected_cells(verdict) == [] and verdict.not_offered == ()
    assert {one.cell.part for one in verdict.judged} == {*CHEAP, "all-filters"}


@pytest.mark.slow
def test_twodice_draws_as_it_claims_in_the_default_run() -> None:
    """Half a minute: 2.5e10 logits for the deep tail, 4.8 million draws for what may never come."""
    verdict = judge(load("twodice"))
    assert rejected_cells(verdict) == [] and len(verdict.judged) > 80


@pytest.mark.parametrize("seed", range(4))
def test_a_right_sampler_that_is_not_ours_passes(seed: int) -> None:
    sampler = as_sampler(broken.InverseTransform(seed), "inverse transform")
    verdict = judge(sampler, rows=[*CHEAP, "leak-top-p"], draws=10_000)
    assert rejected_cells(verdict) == []
    assert {part for part, _ in verdict.not_offered} == {name for name, _, needs, _ in CHECKS if needs}


SABOTEURS: list[tuple[Function, str, int, set[str]]] = [
    (broken.tail_missing, "plain", 100_000, {"body", "tail"}),
    (broken.equal_noise, "neighbouring-rows batch-size", 10_000, {"independence", "batch-size"}),
    (broken.first_seed_for_all, "seeds", 10_000, {"independence"}),
    (broken.first_seed_for_all, "batch-size place neighbours repeat", 10_000,
     {"batch-size", "place", "neighbours"}),
    (broken.settings_of_first, "mixed-batch", 10_000, {"neighbours"}),
    (broken.NeverTheSame(), "repeat plain neighbouring-rows", 10_000, {"repeat"}),
    (broken.noise_by_width, "coupling place batch-size repeat", 10_000, {"coupling"}),
    (broken.seed_plus_position, "streams plain", 10_000, {"independence"}),
    (broken.starts_anew, "neighbouring-rows", 20_000, {"independence"}),
    (broken.k_one_more, "top-k", 10_000, {"kept set"}),
    (broken.k_one_less, "top-k", 10_000, {"body", "tail"}),
    (broken.crossing_dropped, "top-p plain", 100_000, {"body"}),
    (broken.ties_kept, "tie-at-k equal-top-k bfloat16-top-k top-k", 10_000, {"ties"}),
    (broken.temperature_after_top_p, "top-p-cold", 10_000, {"kept set"}),
    (broken.temperature_after_top_p, "top-p-hot", 10_000, {"body", "tail"}),
    (broken.top_p_of_all, "top-k-top-p", 10_000, {"kept set"}),
    (broken.last_argmax, "greedy top-k", 10_000, {"ties"}),
    (broken.leaks_once_in_a_million, "leak-top-k leak-min-p", 100_000, {"kept set"}),
    (broken.biased_gumbel, "two", 100_000, {"body", "tail"}),
    (broken.float16_sums, "wide", 30_000, {"body", "tail"}),
    (broken.noise_by_rank, "plain tie-at-k top-p place neighbours batch-size repeat coupling", 10_000,
     {"coupling"}),
    (broken.Noise24(), "deep-tail", 100_000, {"tail"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("saboteur", "rows", "draws", "kinds"),
    SABOTEURS,
    ids=[f"{saboteur.__name__}-{rows.split()[0]}" for saboteur, rows, *_ in SABOTEURS],
)
def test_a_broken_sampler_is_rejected_by_the_check_that_is_meant_for_it(
    saboteur: Function, rows: str, draws: int, kinds: set[str]
) -> None:
    verdict = judge(as_sampler(saboteur), rows=rows.split(), draws=draws)
    assert set(verdict.rejecting()) == kinds, rejected_cells(verdict)


@pytest.mark.parametrize(
    ("saboteur", "rows", "draws", "cells"),
    [
        (broken.noise_by_rank, "coupling", 10_000,
         ["another token raised", "another token lowered"]),
        (broken.noise_by_width, "coupling", 10_000, ["vocabulary padded with -inf"]),
        (broken.starts_anew, "neighbouring-rows", 400_000, ["rows, 4,096 apart"]),
        (broken.seed_plus_position, "streams", 10_000, ["neighbouring seeds, seed + position equal"]),
    ],
    ids=["rank", "width", "anew", "seed+position"],
)  # fmt: skip
def test_a_defect_shows_in_the_cells_that_are_meant_for_it(
    saboteur: Function, rows: str, draws: int, cells: list[str]
) -> None:
    verdict = judge(as_sampler(saboteur), rows=[rows], draws=draws)
    rejected = [one.cell.found for one in verdict.judged if one.rejected]
    assert all(any(found.startswith(cell + ":") for found in rejected) for cell in cells), rejected


def test_a_defect_at_one_place_of_many_is_found_and_so_is_one_that_is_everywhere() -> None:
    """1,000 leaves: the sum of all logarithms does not see one of them, the smallest p-value does; and the
    other way round for a slope of a hundredth."""
    generator, n = np.random.default_rng(7), 1_000_000
    p = np.full(1_000, 1e-3)
    counts = generator.multinomial(n, p)
    right = exact.fit(counts, p)
    one_place = counts.copy()
    one_place[500] += 330  # ten deviations
    everywhere = generator.multinomial(n, p * np.linspace(1.1, 0.9, 1_000))
    found = [exact.fit(table, p) for table in (one_place, everywhere)]
    assert right is not None and right.p > 1e-6
    assert all(fit is not None and fit.p < 1e-6 for fit in found), found


def test_coarse_noise_shows_in_the_strata_that_it_cannot_reach_and_in_no_other() -> None:
    verdict = judge(as_sampler(broken.Noise24()), rows=["deep-tail"])
    strata = {one.cell.found.split()[3]: one.rejected for one in verdict.judged if one.cell.kind == "tail"}
    assert strata == {"1e-5": False, "1e-6": False, "1e-7": strata["1e-7"], "1e-8": True, "1e-9": True}
    fine = judge(as_sampler(broken.Noise24(bits=50)), rows=["deep-tail"])
    assert rejected_cells(fine) == []


def test_transformers_own_sampling_differs_from_ours_at_ties_and_nowhere_else() -> None:
    """What docs/conformance.md says of it: all ties at k stay, and where top-p ends the higher ids stay."""
    torch.manual_seed(1)
    names = ["plain", "hot", "minus-inf", "top-k", "top-p", "top-p-cold", "top-k-top-p", "min-p",
             "all-stages", "tie-at-k", "equal-top-k", "bfloat16-top-k", "equal-top-p", "tie-at-p", "greedy",
             "mixed-batch", "neighbouring-rows", "repeat"]  # fmt: skip
    sampler = load("transformers")
    verdict = judge(sampler, rows=names, draws=10_000)
    assert verdict.rejecting() == ("ties",)
    assert {one.cell.part for one in verdict.judged if one.rejected} == {
        "tie-at-k", "equal-top-k", "bfloat16-top-k", "equal-top-p", "tie-at-p",
    }  # fmt: skip
    assert verdict.not_offered == (("repeat", "the sampler does not offer seeds"),)


def test_a_sampler_is_held_to_the_rules_that_it_claims() -> None:
    from twodice.sampling.conformance.claims import Rules

    ties = ["tie-at-k", "equal-top-k", "bfloat16-top-k"]
    kept = Rules(ties="kept")
    assert not judge(as_sampler(broken.ties_kept), rows=ties, draws=10_000, rules=kept).rejected
    assert judge(load("twodice"), rows=ties, draws=10_000, rules=kept).rejected
    dropped = Rules(crossing="dropped")
    assert not judge(
        as_sampler(broken.crossing_dropped), rows=["top-p"], draws=10_000, rules=dropped
    ).rejected
    late, rows = Rules(temperature="last"), ["top-p-cold", "top-p-hot", "hot"]
    assert not judge(as_sampler(broken.temperature_after_top_p), rows=rows, draws=10_000, rules=late).rejected
    assert judge(load("twodice"), rows=rows, draws=10_000, rules=late).rejected


def test_p_values_of_a_table_are_uniform_or_larger() -> None:
    """2,000 tables of 20,000 draws under the hypothesis; a share of p-values below x that is above x rejects.

    Exact binomial at 1e-7 for each of 4 levels; catches p-values that are too small by a factor of 1.5 at
    0.1. The saboteur is the usual chi-square with small cells, which is too small at 0.001.
    """
    generator = np.random.default_rng(5)
    p = np.exp(-np.arange(60) / 9.0)
    p /= p.sum()
    tables = generator.multinomial(20_000, p, size=2_000)
    found = np.array([fit.p for row in tables if (fit := exact.fit(row, p)) is not None])
    assert len(found) == len(tables)
    for level in (0.5, 0.1, 0.01, 0.001):
        assert binom.sf((found <= level).sum() - 1, len(found), level) > 1e-7, level
    small = np.full(2_000, 1 / 2_000) * np.where(np.arange(2_000) < 1_000, 1.9, 0.1)
    usual = np.array(
        [chisquare(row, small * 500).pvalue for row in generator.multinomial(500, small, size=2_000)]
    )
    assert binom.sf((usual <= 0.001).sum() - 1, len(usual), 0.001) < 1e-7, "chi-square is not exact"


def test_the_power_that_is_stated_is_there() -> None:
    """A stratum short, or over, by the factor that is stated is rejected 99 times in 100.

    4,000 simulations and an exact binomial at 1e-7, so a power below 0.978 is caught; at half the defect the
    power is below 0.9.
    """
    generator = np.random.default_rng(6)
    n, q, level = 50_000, 0.02, 1e-8

    def power(factor: float) -> float:
        hits, times = np.unique(generator.binomial(n, q * factor, size=4_000), return_counts=True)
        return float(times[[exact.two_sided(int(h), n, q) <= level for h in hits]].sum() / 4_000)

    for factor in exact.factors_caught(n, q, level):
        assert factor is not None
        assert binom.cdf(round(power(factor) * 4_000), 4_000, exact.POWER) > 1e-7
        assert power((1 + factor) / 2) < 0.9
    assert exact.factors_caught(100, 0.001, level)[0] is None, "what is expected 0.1 times cannot be missed"
    assert exact.rate_caught(4_605_168) == pytest.approx(1e-6, rel=1e-5)


def test_holm_rejects_what_his_procedure_rejects() -> None:
    assert exact.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert exact.holm([0.6, 0.0]) == [0.6, 0.0] and exact.holm([]) == []


def test_a_sampler_that_writes_into_its_logits_is_judged_all_the_same() -> None:
    verdict = judge(
        as_sampler(broken.writes_into_logits), rows=["plain", "mixed-batch", "repeat"], draws=10_000
    )
    assert rejected_cells(verdict) == []


def test_the_verdict_of_a_seeded_sampler_is_the_same_each_time() -> None:
    first, second = (judge(load("twodice"), rows=["plain", "place"], draws=5_000).as_dict() for _ in range(2))
    assert first == second
