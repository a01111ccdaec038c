"""What a study is asked for: arms as text, the whole as flags or a file, and what cannot be meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.example_records import example_spec

from twodice.errors import ConfigError
from twodice.study.arms import HEAVY, parse_arm
from twodice.study.spec import (
    Settled,
    StudySpec,
    differences,
    make_spec,
    read_spec,
    read_spec_file,
    write_spec,
)
from twodice.training.config import TrainConfig

BASE = TrainConfig()


def test_a_part_is_an_entry_of_the_plan_or_a_setting() -> None:
    arm = parse_arm("a", "residual=0.1; weight_decay=0.5; embedding=early(0.1, 0.3); optimizer.lr=1e-3", BASE)
    config = arm.config(BASE)
    assert config.dropout == "embedding=early(0.1, 0.3), residual=0.1"
    assert (config.optimizer.weight_decay, config.optimizer.lr) == (0.5, 1e-3)
    assert arm.changes() == {
        "dropout": "embedding=early(0.1, 0.3), residual=0.1",
        "optimizer.weight_decay": "0.5",
        "optimizer.lr": "1e-3",
    }
    assert arm.has_dropout(BASE)


def test_commas_between_entries_and_whole_plans_are_understood() -> None:
    assert parse_arm("a", "embedding=0.1, residual=0.1", BASE).plan == "embedding=0.1, residual=0.1"
    dropping = BASE.model_copy(update={"dropout": "residual=0.2"})
    arm = parse_arm("a", "dropout=none", dropping)
    assert arm.config(dropping).dropout == "none" and not arm.has_dropout(dropping)
    assert parse_arm("same", "", dropping).has_dropout(dropping)
    assert not parse_arm("zero", "residual=0", BASE).has_dropout(BASE)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("residul=0.1", "did you mean 'residual'"),
        ("weightdecay=1", "did you mean 'weight_decay'"),
        ("residual=1.5", r"\[0, 1\]"),
        ("residual=nan", "p must|rate"),
        ("seed=3", "all trials share"),
        ("optimizer.lr=-1", "must be a number in"),
        ("residual", "name=value"),
        ("dropout=none; residual=0.1", "not both"),
        ("layer:feature=0.1", "example or batch"),
    ],
)
def test_what_cannot_be_meant_is_said_with_the_arm_and_the_nearest_name(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        parse_arm("mine", text, BASE)
    assert "'mine'" in str(error.value)


def test_the_baseline_is_the_arm_called_so_or_the_first() -> None:
    assert make_spec(settings={}, arms=[("a", ""), ("neither", ""), ("c", "")]).baseline == "neither"
    assert make_spec(settings={}, arms=[("a", ""), ("b", "residual=0.1")]).baseline == "a"


def test_arms_that_cannot_be_told_apart_or_are_alone_are_refused() -> None:
    with pytest.raises(ConfigError, match="differ in name"):
        make_spec(settings={}, arms=[("a b", ""), ("A-b", "")])
    with pytest.raises(ConfigError, match="at least 2 arms"):
        make_spec(settings={}, arms=[("a", "")])


def test_the_default_arms_ask_what_the_literature_leaves_open() -> None:
    demo = make_spec(settings={}, arms=[], demo=True)
    assert [arm.name for arm in demo.arms] == ["neither", "dropout", "weight decay", "both"]
    both = demo.parsed_arms()[3].config(demo.base)
    assert both.dropout == "embedding=0.1, attention=0.1, residual=0.1"
    assert both.optimizer.weight_decay == HEAVY
    longer = make_spec(settings={}, arms=[])
    assert [arm.name for arm in longer.arms][4:] == ["dropout 0.2", "early dropout"]


def test_every_arm_is_tuned_with_the_same_effort_on_a_seed_of_its_own() -> None:
    spec = make_spec(settings={"seed": 7}, arms=[], tune=["lr=1e-3,2e-3", "warmup=1,2"])
    assert len(spec.tunings()) == 4 and spec.tunings()[0] == {"optimizer.lr": "1e-3", "optimizer.warmup": "1"}
    assert spec.tuning_seed not in spec.seed_list and spec.seed_list[0] == 7
    for tune, said in (
        ("lr", "NAME=VALUE"),
        ("seed=1,2", "cannot be tuned"),
        ("lr=1e-3,-1", "must be a number in"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_spec(settings={}, arms=[], tune=[tune])
    with pytest.raises(ConfigError, match=r"sets optimizer\.weight_decay itself"):
        make_spec(settings={}, arms=[], tune=["weight_decay=0.1,1"])


@pytest.mark.parametrize(
    ("text", "live"),
    [
        ("0", False),
        ("0.1", True),
        ("early(0, 0.3)", False),
        ("late(0.1, 0.5)", True),
        ("linear(0, 0.1)", True),
    ],
)
def test_an_arm_has_dropout_where_a_rate_is_above_zero(text: str, live: bool) -> None:
    spec = make_spec(settings={}, arms=[("neither", ""), ("arm", f"residual={text}")])
    assert spec.parsed_arms()[1].has_dropout(spec.base) is live


def test_a_study_has_minutes_or_steps() -> None:
    assert make_spec(settings={}, arms=[]).minutes == 5
    assert make_spec(settings={}, arms=[], changes=["steps=30"]).minutes is None
    with pytest.raises(ConfigError, match="epochs"):
        make_spec(settings={"epochs": 2}, arms=[])
    with pytest.raises(ConfigError, match=r"minutes must be a number in \(0, inf\); got inf"):
        make_spec(settings={"minutes": float("inf")}, arms=[])
    with pytest.raises(ConfigError, match="minutes or steps, not both"):
        make_spec(settings={"minutes": 7}, arms=[], changes=["steps=30"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"temperature": [0.7, float("nan")]},
            "sampling.temperature.1 must be a number in (0, inf); got nan",
        ),
        ({"temperature": [float("inf")]}, "sampling.temperature.0 must be a number in (0, inf); got inf"),
        ({"temperature": 1.0}, "sampling.temperature must be a list, each a number in (0, inf); got 1.0"),
        ({"top_k": [0]}, "sampling.top_k.0 must be an integer in [1, inf); got 0"),
        ({"prompts": 2.5}, "sampling.prompts must be an integer in [2, inf); got 2.5"),
        ({"prompt": 3}, "no setting 'sampling.prompt'; did you mean 'sampling.prompts'?"),
        (7, "sampling must be a table; got 7"),
    ],
)
def test_a_plan_of_sampling_that_cannot_be_meant_is_said_in_one_line(asked: object, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_spec(settings={}, arms=[], sampling=asked)
    assert str(error.value) == said


def test_seeds_out_of_range_are_said_with_their_interval() -> None:
    with pytest.raises(ConfigError) as error:
        make_spec(settings={}, arms=[], seeds=0)
    assert str(error.value) == "seeds must be an integer in [1, 1000]; got 0"


def test_a_spec_file_says_what_flags_say(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(
        'data = ["a.txt"]\nminutes = 9\nseeds = 4\n[optimizer]\nlr = 1e-3\n[arms]\nneither = ""\n'
        'light = "residual=0.1"\n[tune]\nclip = [0.5, 1.0]\n[sampling]\nprompts = 3\n'
    )
    spec = make_spec(**read_spec_file(path))
    assert (spec.base.data, spec.minutes, spec.seeds, spec.base.optimizer.lr) == (("a.txt",), 9, 4, 1e-3)
    assert [arm.name for arm in spec.arms] == ["neither", "light"] and spec.sampling is not None
    assert spec.tune == {"optimizer.clip": ("0.5", "1.0")} and spec.sampling.prompts == 3
    path.write_text("arm = 3\n")
    with pytest.raises(ConfigError, match="did you mean 'arms'"):
        read_spec_file(path)


def test_a_spec_is_written_and_read_back_and_its_changes_are_named(tmp_path: Path) -> None:
    spec = example_spec()
    settled = Settled(
        steps=20, workers=1, threads=1, evaluate_every=1, checkpoint_every=20, reason="as asked"
    )
    assert read_spec(tmp_path) is None
    write_spec(tmp_path, spec, settled)
    assert read_spec(tmp_path) == (spec, settled)
    other = example_spec(settings={"steps": 20, "batch": 3}, seeds=4)
    assert differences(spec, spec) == []
    assert differences(spec, other) == ["base.batch: None there, 3 here", "seeds: 3 there, 4 here"]
    assert StudySpec.model_validate_json(spec.model_dump_json()) == spec
    path = tmp_path / "spec.json"
    damaged = json.loads(path.read_text())
    damaged["requested"].update(seeds="many", speed=3)
    for text, said in (
        (json.dumps(damaged), "seeds must be an integer in [1, 1000]; got 'many'"),
        ("{", "Expecting"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as error:
            read_spec(tmp_path)
        assert said in str(error.value) and "\n" not in str(error.value)
