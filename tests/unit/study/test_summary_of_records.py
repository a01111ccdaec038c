"""From records to the report: the same bytes in any order, the promised shape, words that follow numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tests.support.example_records import example_records, example_spec
from tests.support.example_report import example_report

from twodice.errors import ConfigError, DataError
from twodice.random.keys import Key
from twodice.study import compare, schema
from twodice.study.answer import details_of
from twodice.study.effects import effects
from twodice.study.records import RECORDS, Recorder, read_records
from twodice.study.report import settings_text
from twodice.study.sanity import sanity_of, xz_bits_per_byte
from twodice.study.summary import choose_cross, earlier_sd_percent, summarise, write_summary
from twodice.study.words import brief, percent
from twodice.text.corpora import load_documents
from twodice.text.store import prepare


def write(folder: Path, records: list[dict[str, object]]) -> None:
    (folder / RECORDS).write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def test_shuffled_and_doubled_records_give_the_same_bytes(tmp_path: Path) -> None:
    records = example_records()
    write(tmp_path, records)
    write_summary(tmp_path)
    first = (tmp_path / "report.json").read_bytes()
    order = np.random.default_rng(0).permutation(len(records))
    write(tmp_path, [records[i] for i in order] + records[3:6])
    write_summary(tmp_path)
    assert (tmp_path / "report.json").read_bytes() == first
    assert schema.read_report(tmp_path / "report.json") == summarise(records)


def test_the_report_has_the_names_and_shapes_that_programs_read() -> None:
    report = json.loads(summarise(example_records()).as_json())
    assert {"twodice", "data", "model", "baseline", "best", "steps", "arms", "sampling"} <= report.keys()
    for arm in report["arms"]:
        assert {"name", "settings", "seeds", "at_best", "at_end", "verdict"} <= arm.keys()
        for when in ("at_best", "at_end"):
            for loss in ("train_nats_per_token", "validation_nats_per_token", "validation_bits_per_byte",
                         "gap_nats_per_token"):  # fmt: skip
                assert set(arm[when][loss]) == {"mean", "low", "high", "values"}
            told = arm[when]["difference"]
            if arm["name"] == "neither":
                assert told is None
            else:
                assert {"mean", "low", "high", "p", "p_adjusted", "more_seeds"} <= told.keys()
    for cell in report["sampling"]:
        assert set(cell) >= {"arm", "setting", "measures"}


def test_best_and_end_are_both_told_and_the_verdict_is_that_of_the_best() -> None:
    report = summarise(example_records())
    neither, dropout, decay = report.arms
    assert neither.at_best.steps == [10, 10, 10] and neither.at_end.steps == [20, 20, 20]
    assert dropout.verdict == "cannot tell" and dropout.at_end.verdict == "helps" and dropout.only_at_end
    assert decay.verdict == "hurts" and decay.words.startswith("hurts by 6.")
    assert report.best == report.baseline == "neither"
    assert any("at the end of training only" in text for text in report.details)
    assert neither.overfits_percent == pytest.approx(
        100 * 0.4 / neither.at_best.validation_nats_per_token.mean
    )
    assert neither.at_end.gap_nats_per_token.mean == pytest.approx(1.0)
    assert report.cross is not None and report.cross.with_dropout == "dropout"
    assert "in dropout alone" in report.cross.reason
    assert "not tuned for each arm" in " ".join(report.how.notes)


def test_a_stopped_study_is_reported_for_the_seeds_that_are_whole() -> None:
    records = [
        r
        for r in example_records()
        if not (r["kind"] == "trial" and r["seed"] == 2 and r["arm"] == "dropout")
    ]
    report = summarise(records)
    assert report.seeds == [0, 1] and not report.is_complete and report.answer.startswith("So far")
    alone = [
        r for r in example_records() if r["kind"] == "study" or (r["kind"] == "trial" and r["seed"] == 0)
    ]
    report = summarise(alone)
    assert report.arms[1].at_best.difference is not None and report.arms[1].at_best.difference.p is None
    assert report.arms[1].verdict == "cannot tell" and "one seed" in report.arms[1].words
    with pytest.raises(DataError, match="at least one seed"):
        summarise(alone[:1])


def test_equal_arms_cannot_be_told_apart() -> None:
    values = [3.1, 3.2, 3.05, 3.3]
    (told,) = compare.compare(values, [values])
    assert (told.mean, told.low, told.high, told.p, told.p_adjusted) == (0, 0, 0, 1, 1)
    assert compare.verdict(told) == "cannot tell" and told.more_seeds is None
    assert compare.words(told) == "cannot tell: no difference at all"


def test_words_carry_the_adjusted_interval_in_percent() -> None:
    base = [2.0, 2.0, 2.0]
    (told,) = compare.compare(base, [[1.93, 1.94, 1.95]])
    half = 4.302652729911275 * 0.01 / math.sqrt(3) / 2 * 100
    assert compare.words(told) == f"helps by 3.0 % [{3 - half:.1f}, {3 + half:.1f}]"
    (told,) = compare.compare(base, [[2.07, 2.06, 2.05]])
    assert compare.words(told).startswith("hurts by 3.0 % [1.8")
    (told,) = compare.compare(base, [[2.1, 1.93, 2.0]])
    assert compare.words(told).startswith(
        "cannot tell: 0.5 % worse ["
    ) and "more seeds would" in compare.words(told)


def test_an_interval_is_read_as_its_word_is() -> None:
    base = [2.0, 2.0, 2.0]
    (worse,) = compare.compare(base, [[2.05, 1.99, 2.0]])
    (better,) = compare.compare(base, [[1.95, 2.01, 2.0]])
    for told in (worse, better):
        low, high = told.percent.low, told.percent.high
        assert low is not None and high is not None and low < 0 < high
        assert f"[{brief(-low)} better to {brief(high)} worse]" in compare.words(told)
    assert "% worse [" in compare.words(worse) and "% better [" in compare.words(better)
    assert "-" not in compare.words(worse) and "−" not in compare.words(worse)


def test_the_imagined_report_is_of_the_same_shape() -> None:
    report = example_report()
    assert schema.Report.model_validate_json(report.as_json()) == report


def test_the_cross_holds_the_best_arm_and_one_with_dropout() -> None:
    report = example_report()
    by_name = {arm.name: arm for arm in report.arms}
    names, chosen, why = choose_cross(report.arms, "neither", "both")
    assert (names, chosen) == (["neither", "both", "dropout"], "dropout") and "in dropout alone" in why
    names, chosen, why = choose_cross([by_name["neither"], by_name["both"]], "neither", "both")
    assert (names, chosen) == (["neither", "both"], "both") and "optimizer.weight_decay too" in why
    names, chosen, why = choose_cross(
        [by_name[n] for n in ("neither", "dropout", "weight decay")], "neither", "weight decay"
    )
    assert (names, chosen) == (["neither", "weight decay", "dropout"], "dropout")
    assert choose_cross([by_name["neither"], by_name["weight decay"]], "neither", "neither")[1] is None


def test_the_cross_says_of_the_loss_what_the_verdict_says() -> None:
    report = summarise(example_records())
    assert report.cross is not None and report.cross.with_dropout == "dropout"
    arm = report.arms[1]
    assert arm.at_best.difference is not None
    # An adjusted interval that is wider than the plain one: the cross must not fall back on the latter.
    wide = arm.at_best.difference.model_copy(update={"low": -0.5, "high": 0.5})
    arm = arm.model_copy(update={"at_best": arm.at_best.model_copy(update={"difference": wide})})
    found = effects([report.arms[0], arm], report.sampling, report.cross)
    moved = next(e for e in found if e.measure == "validation_nats_per_token")
    assert (moved.mean, moved.low, moved.high) == (wide.mean, -0.5, 0.5)


def test_a_baseline_with_dropout_is_never_called_the_model_without() -> None:
    baseline, dropout, _ = summarise(example_records()).arms
    baseline = baseline.model_copy(update={"has_dropout": True})
    names, chosen, why = choose_cross([baseline, dropout], "neither", "neither")
    assert (names, chosen) == (["neither"], None) and "has dropout itself" in why
    assert "all dropout off" not in settings_text(baseline)


def test_records_that_cannot_be_read_are_one_clear_error(tmp_path: Path) -> None:
    whole = example_records()
    without_digest = {**whole[0], "data": {k: v for k, v in whole[0]["data"].items() if k != "digest"}}
    without_steps = {k: v for k, v in whole[1].items() if k != "evaluations"}
    for number, (record, said) in enumerate(
        ((without_digest, "Facts digest is missing"), (without_steps, "'evaluations' is missing in one"))
    ):
        write(tmp_path, [*whole[:number], record, *whole[number + 1 :]])
        with pytest.raises(DataError) as error:
            write_summary(tmp_path)
        assert said in str(error.value) and "\n" not in str(error.value)


def test_a_line_that_a_kill_cut_short_is_taken_away_and_nothing_else(tmp_path: Path) -> None:
    log = Recorder(tmp_path)
    log.write({"kind": "trial", "arm": "a", "seed": 0})
    log.write({"kind": "trial", "arm": "a", "seed": 0})
    log.close()
    path = tmp_path / RECORDS
    whole = path.read_bytes()
    assert whole.count(b"\n") == 1
    path.write_bytes(whole + b'{"kind": "trial", "arm": "b", "se')
    assert len(read_records(tmp_path)) == 1
    log = Recorder(tmp_path)
    assert log.has("trial", arm="a", seed=0) and not log.has("trial", arm="b", seed=0)
    with pytest.raises(ConfigError, match="another command is working"):
        Recorder(tmp_path)
    log.write({"kind": "trial", "arm": "b", "seed": 0})
    log.close()
    assert path.read_bytes() == whole + b'{"kind": "trial", "arm": "b", "seed": 0}\n'
    path.write_bytes(b"{\n" + whole)
    with pytest.raises(DataError, match="line 1"):
        read_records(tmp_path)


def test_the_plan_knows_what_earlier_records_measured(tmp_path: Path) -> None:
    assert earlier_sd_percent(tmp_path) is None
    write(tmp_path, example_records())
    found = earlier_sd_percent(tmp_path)
    assert found is not None and 0 < found < 1


def test_xz_needs_nothing_for_text_it_has_seen_and_8_bits_for_noise() -> None:
    text = ["The import statement combines two operations; it searches for the named module. " * 3]
    assert xz_bits_per_byte(text, text) < 0.4
    noise = "".join(map(chr, np.random.default_rng(1).integers(33, 127, 4000)))
    assert xz_bits_per_byte(text, [noise]) == pytest.approx(math.log2(94), rel=0.05)


def test_a_drawn_text_is_held_against_its_true_entropy_too(tmp_path: Path) -> None:
    corpus = load_documents(["markov:bytes=20000,symbols=4"])
    store = prepare(corpus, context=16, key=Key(0), out=tmp_path / "store")
    xz, truth = sanity_of(store)
    assert corpus.entropy_nats_per_byte is not None
    assert truth["value"] == corpus.entropy_nats_per_byte / math.log(2) and truth["unit"] == "bits per byte"
    assert truth["value"] < xz["value"] < 2 * truth["value"]  # no compressor does better than the source


def test_effects_of_the_cross_are_adjusted_for_their_number() -> None:
    from twodice.study.effects import adjusted

    clear, luck = [1.0, 1.1, 0.9, 1.05], [0.3, -0.2, 0.1, 0.25]
    (alone,) = adjusted([("rep_4", "generation", clear)])
    among = adjusted([("rep_4", "generation", clear), *(("rep_4", "training", luck) for _ in range(9))])
    plain = compare.estimate(clear)
    assert (alone.low, alone.high) == pytest.approx((plain.low, plain.high))
    wide = compare.half_width(4, 0.05 / 10) * math.sqrt(sum((v - 1.0125) ** 2 for v in clear) / 3) / 2
    assert (among[0].low, among[0].high) == pytest.approx((1.0125 - wide, 1.0125 + wide))


def test_effects_of_unequal_seeds_are_adjusted_each_by_its_own_number() -> None:
    from twodice.study.effects import adjusted

    four, three = [1.0, 1.1, 0.9, 1.05], [0.3, -0.2, 0.1]
    first, second, once = adjusted(
        [
            ("rep_4", "generation", four),
            ("self_bleu", "generation", three),
            ("distinct_2", "generation", [7.0]),
        ]
    )
    # The clearer of two is tested at 0.05 / 2, the other at 0.05; one seed claims nothing and is not counted.
    for effect, values, alpha in ((first, four, 0.025), (second, three, 0.05)):
        n, sd = len(values), float(np.std(values, ddof=1))
        half = compare.half_width(n, alpha) * sd / math.sqrt(n)
        mean = sum(values) / n
        assert (effect.low, effect.high) == pytest.approx((mean - half, mean + half))
    assert (once.mean, once.low, once.high) == (7.0, None, None)


def test_each_die_is_a_family_of_its_own() -> None:
    """What blurs the generation die alone widens no interval of the training die."""
    report = example_report()
    assert report.cross is not None

    def blurred(cell: schema.Sampling) -> schema.Sampling:
        if cell.setting.greedy:
            return cell
        told = {}
        for name in ("rep_4", "looping_tails", "distinct_2", "self_bleu", "own_nats_per_token"):
            values = getattr(cell.measures, name).values
            # The same for both models: it cancels in what the training die does.
            told[name] = compare.estimate([v + 30 * (-1) ** i for i, v in enumerate(values)])
        return cell.model_copy(update={"measures": cell.measures.model_copy(update=told)})

    before = effects(report.arms, report.sampling, report.cross)
    after = effects(report.arms, [blurred(cell) for cell in report.sampling], report.cross)
    for one, two in zip(before, after, strict=True):
        assert (one.measure, one.die) == (two.measure, two.die)
        if one.die == "training":
            assert (one.low, one.high) == pytest.approx((two.low, two.high), abs=1e-9)
        elif one.measure != "longest_copied_characters":  # the saboteur at work: it did blur the other die
            assert two.low is not None and two.low < -10 < 10 < two.high  # type: ignore[operator]


def test_a_small_bound_keeps_its_sign_and_its_size() -> None:
    said = [brief(x) for x in (0.0, 0.04, -0.04, 1.26, -0.001, 0.00051, -0.0000312, 0.0996)]
    assert said == ["0.0", "0.04", "−0.04", "1.3", "−0.001", "0.00051", "−0.000031", "0.1"]
    (told,) = compare.compare([2.0, 2.0, 2.0], [[1.9999, 2.0001, 1.99997]])
    assert compare.words(told).startswith("cannot tell: 0.0005 % better [0.013 better to 0.012 worse]; ")
    assert percent(-0.0004) == "−0.0004\u202f%"


def with_data(report: schema.Report, **changes: object) -> schema.Report:
    return report.model_copy(update={"data": report.data.model_copy(update=changes)})


def test_few_readings_are_named_as_the_reason_only_where_they_were_few() -> None:
    report = summarise(example_records())
    calm = report.arms[0].model_copy(update={"overfits_percent": 0.02})
    report = report.model_copy(update={"arms": [calm, *report.arms[1:]]})
    tokens = report.steps * report.model.batch * report.model.context
    few, many = (" ".join(details_of(with_data(report, train_tokens=tokens // n))) for n in (2, 40))
    assert "does not overfit in 20 steps: its loss on unseen text ends 0.02 % above" in few
    assert "was read about 2 times; dropout is for texts that are read many times" in few
    assert "although the training text was read about 40 times" in many and "dropout is for" not in many
    assert "still improving" not in few
    rising = calm.curve.validation_nats_per_token
    short = calm.model_copy(
        update={"curve": calm.curve.model_copy(update={"validation_nats_per_token": rising[:2]})}
    )
    told = details_of(report.model_copy(update={"arms": [short, *report.arms[1:]]}))
    assert (
        "'neither' was still improving at its last step: after more steps the answer may be another." in told
    )


def test_what_wins_only_at_the_end_is_held_against_stopping_early() -> None:
    report = summarise(example_records())
    assert report.arms[1].only_at_end
    for verdict, said in (
        ("cannot tell", "stopping 'neither' at its best step does as well, as far as this study can tell."),
        ("hurts", "stopping 'neither' at its best step does better."),
    ):
        arm = report.arms[1].model_copy(update={"verdict": verdict})
        told = details_of(report.model_copy(update={"arms": [report.arms[0], arm, report.arms[2]]}))
        assert told[0] == f"'dropout' wins at the end of training only: {said}"


def test_an_arm_that_helps_is_the_answer_with_its_interval() -> None:
    records = example_records()
    for record in records:
        if record["kind"] == "trial" and record["arm"] == "dropout":
            for evaluation in record["evaluations"]:
                evaluation["validation_b_nats_per_token"] -= 0.1
    report = summarise(records)
    dropout = report.arms[1]
    assert dropout.verdict == "helps" and report.best == "dropout" and not dropout.only_at_end
    told = dropout.at_best.difference
    assert told is not None and told.percent.low is not None and told.percent.high is not None
    ends = f"[{brief(-told.percent.high)}, {brief(-told.percent.low)}]"
    assert dropout.words == f"helps by {brief(-told.percent.mean)} % {ends}"
    assert report.answer.startswith(
        f"On this text dropout {dropout.words} against 'neither' (arm 'dropout'); without dropout, "
    )


def records_of_four_arms(levels: dict[str, float], seeds: int = 5) -> list[dict[str, object]]:
    """Trials of neither, dropout, weight decay and both whose losses on unseen text are near `levels`."""
    spec = example_spec(
        arms=[
            ("neither", ""),
            ("dropout", "residual=0.1"),
            ("weight decay", "weight_decay=1"),
            ("both", "residual=0.1; weight_decay=1"),
        ],
        seeds=seeds,
        sampling=None,
    )
    records = [r for r in example_records() if r["kind"] in ("study", "sanity")]
    records[0] = {**records[0], "spec": spec.model_dump(mode="json"), "sampling": None}
    template = next(r for r in example_records() if r["kind"] == "trial")
    rng = np.random.default_rng(7)
    for seed in spec.seed_list:
        luck = 0.05 * rng.standard_normal()
        for arm, level in levels.items():
            loss = level + luck + 0.004 * rng.standard_normal()
            evaluations = [
                {**e, **{f"validation_{part}_nats_per_token": loss + above for part in "ab"}}
                for e, above in zip(template["evaluations"], (3.0, 0.0, 0.4), strict=True)
            ]
            records.append({**template, "arm": arm, "seed": seed, "evaluations": evaluations})
    return records


def test_dropout_is_not_credited_with_what_weight_decay_does() -> None:
    levels = {"neither": 3.0, "dropout": 3.0, "weight decay": 2.9, "both": 2.9}
    report = summarise(records_of_four_arms(levels))
    assert [arm.verdict for arm in report.arms] == ["baseline", "cannot tell", "helps", "helps"]
    assert [(c.arm, c.against) for c in report.dropout_contrasts] == [
        ("dropout", "neither"),
        ("both", "weight decay"),
    ]
    assert {c.verdict for c in report.dropout_contrasts} == {"cannot tell"}
    both = report.arms[3]
    assert report.answer.startswith(f"On this text the arm 'both' {both.words} against 'neither'; dropout's ")
    assert "share in it is not shown (against 'weight decay': " in report.answer
    assert "dropout helps" not in report.answer and "dropout hurts" not in report.answer
    told = report.dropout_contrasts[1].at_best
    pairs = zip(both.at_best.validation_nats_per_token.values,
                report.arms[2].at_best.validation_nats_per_token.values, strict=True)  # fmt: skip
    assert told.values == [a - b for a, b in pairs]


def test_dropout_is_credited_where_an_arm_that_is_alike_but_for_it_does_worse() -> None:
    report = summarise(
        records_of_four_arms({"neither": 3.0, "dropout": 2.9, "weight decay": 3.0, "both": 2.8})
    )
    alone, on_top = report.dropout_contrasts
    assert report.answer.startswith(
        f"On this text dropout {alone.words} against 'neither' (arm 'dropout') and {on_top.words} on top of "
        "'weight decay' (arm 'both'); without dropout, "
    )
    report = summarise(
        records_of_four_arms({"neither": 3.0, "dropout": 3.0, "weight decay": 2.9, "both": 2.95})
    )
    assert "dropout's share in it is a loss: against 'weight decay' it hurts by" in report.answer


def test_contrasts_of_dropout_are_adjusted_for_their_number_and_never_gainsay_the_arm() -> None:
    levels = {"neither": 3.0, "dropout": 2.996, "weight decay": 3.0, "both": 3.0}
    for seeds in (3, 5, 9):
        report = summarise(records_of_four_arms(levels, seeds))
        ps = np.array([c.at_best.p for c in report.dropout_contrasts])
        least, _ = compare.holm(ps)
        arm = report.arms[1].at_best.difference
        assert arm is not None and arm.p_adjusted is not None
        first, second = (c.at_best.p_adjusted for c in report.dropout_contrasts)
        assert first == pytest.approx(max(least[0], arm.p_adjusted)) and second == pytest.approx(least[1])
        for told in (c.at_best for c in report.dropout_contrasts):
            assert told.p_adjusted is not None and told.low is not None and told.high is not None
            assert (told.low <= 0 <= told.high) == (told.p_adjusted >= 0.05)


def test_an_arm_that_no_arm_is_like_without_dropout_earns_dropout_nothing() -> None:
    records = records_of_four_arms({"neither": 3.0, "both": 2.9})
    spec = example_spec(
        arms=[("neither", ""), ("both", "residual=0.1; weight_decay=1")], seeds=5, sampling=None
    )
    records[0] = {**records[0], "spec": spec.model_dump(mode="json")}
    report = summarise(records)
    assert report.dropout_contrasts == []
    assert report.answer.endswith("not shown, for no arm differs from it in dropout alone.")
    for record in records:
        if record.get("arm") == "both":
            record["evaluations"] = next(
                r["evaluations"]
                for r in records
                if (r.get("arm"), r.get("seed")) == ("neither", record["seed"])
            )
    assert "for no two arms differ in it alone: arm 'both'" in summarise(records).answer


def test_texts_that_are_not_recorded_are_said_to_be_missing() -> None:
    assert not any("missing" in text for text in summarise(example_records()).details)
    old = [r for r in example_records() if not (r["kind"] == "sampling" and r["arm"] == "dropout")]
    assert "Texts of 'dropout' are missing: the same twodice study command generates them." in (
        summarise(old).details
    )


def test_what_all_arms_share_is_told_as_settled() -> None:
    settings = summarise(example_records()).how.settings
    assert (settings["steps"], settings["optimizer.lr"], settings["batch"]) == (20, 1e-3, 4)
    assert settings["optimizer.weight_decay"] == 0.1 and None not in settings.values()


def test_a_setting_tuned_for_each_arm_is_named_where_they_are_crossed() -> None:
    report = example_report()
    arms = [
        arm.model_copy(update={"tuned": {"optimizer.lr": f"{i}e-3"}}) for i, arm in enumerate(report.arms)
    ]
    assert choose_cross(arms, "neither", "neither")[2].endswith("; optimizer.lr was tuned for each")
    same = [arm.model_copy(update={"tuned": {"optimizer.lr": "1e-3"}}) for arm in report.arms]
    assert "tuned" not in choose_cross(same, "neither", "neither")[2]


def test_what_is_compared_is_scored_on_all_of_validation_b() -> None:
    records = example_records()
    plain = summarise(records)
    assert plain.scored_on is None and "for the curves" not in " ".join(plain.how.notes)
    trials = [r for r in records if r["kind"] == "trial"]
    for record in trials:
        best, end = record["evaluations"][1:]
        record["validation_b"] = {"windows": 96, "there": 96} | {
            when: {name: e[f"validation_b_{name}"] + 0.25 for name in ("nats_per_token", "bits_per_byte")}
            for when, e in (("best", best), ("end", end))
        }
    report = summarise(records)
    assert report.scored_on == schema.Scored(windows=96, there=96)
    for before, after in zip(plain.arms, report.arms, strict=True):
        for when in ("at_best", "at_end"):
            old, new = getattr(before, when), getattr(after, when)
            assert old.steps == new.steps and old.train_nats_per_token == new.train_nats_per_token
            for name in ("validation_nats_per_token", "validation_bits_per_byte", "gap_nats_per_token"):
                assert getattr(new, name).mean == pytest.approx(getattr(old, name).mean + 0.25)
        assert before.curve == after.curve
    assert any("are means over all 96 windows of it." in note for note in report.how.notes)
    # One trial that was scored otherwise: nothing unlike is compared.
    trials[0]["validation_b"] = {**trials[0]["validation_b"], "windows": 90}
    assert summarise(records).scored_on is None and summarise(records).arms == plain.arms
    del trials[0]["validation_b"]
    assert summarise(records).arms == plain.arms
