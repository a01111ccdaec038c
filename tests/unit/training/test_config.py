"""The settings: what is refused and how it is said, how one is changed by name, how they are read back."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from twodice.errors import ConfigError
from twodice.training.config import (
    TrainConfig,
    full_name,
    make_config,
    read_config,
    setting_names,
    with_setting,
)


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in setting_names().items() if not field.description] == []


def test_an_unknown_setting_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        ConfigError, match=r"no setting 'optimizer\.weightdecay'; did you mean 'optimizer\.weight_decay'"
    ):
        make_config({"optimizer": {"weightdecay": 1}})
    with pytest.raises(ConfigError, match="did you mean 'dropout'"):
        make_config({"dropuot": "residual=0.1"})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lr", "0", "optimizer.lr must be a number in (0, inf); got '0'"),
        ("lr", "nan", "optimizer.lr must be a number in (0, inf); got 'nan'"),
        ("lr", "inf", "optimizer.lr must be a number in (0, inf); got 'inf'"),
        ("beta1", "1", "optimizer.beta1 must be a number in [0, 1); got '1'"),
        ("weight_decay", "heavy", "optimizer.weight_decay must be a number in [0, inf); got 'heavy'"),
        ("batch", "0", "batch must be an integer in [1, inf); got '0'"),
        ("share", "1.5", "share must be a number in (0, 1]; got '1.5'"),
        ("seed", str(2**64), f"seed must be an integer in [-2^63, 2^64); got '{2**64}'"),
        ("steps", "1.5", "steps must be an integer in [1, inf); got '1.5'"),
        ("dtype", "float8", "dtype must be one of auto, float32, bfloat16; got 'float8'"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_must_hold_and_what_came(
    name: str, value: str, said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        with_setting(TrainConfig(), name, value)
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"optimizer": 3}, "optimizer must be a table; got 3"),
        ({"data": "a.txt"}, "data must be a list of at least 1, each text; got 'a.txt'"),
        ({"lr": 1}, "no setting 'lr'; did you mean 'optimizer.lr'?"),
        ({"data": [3]}, "data.0 must be text; got 3"),
        (
            {"model": 3, "batch": 1.5},
            "model must be text; got 3; batch must be an integer in [1, inf); got 1.5",
        ),
    ],
)
def test_a_value_of_another_type_is_refused_in_the_same_words(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(values)
    assert str(error.value) == said


def test_a_setting_is_changed_by_its_last_name_or_its_dotted_one() -> None:
    config = with_setting(TrainConfig(), "lr", "3e-4")
    assert config.optimizer.lr == 3e-4 and TrainConfig().optimizer.lr is None
    assert with_setting(config, "optimizer.lr", "none").optimizer.lr is None
    assert with_setting(config, "checkpoint.every", "7").checkpoint.every == 7
    assert with_setting(config, "data", "a.txt, b.txt").data == ("a.txt", "b.txt")
    assert with_setting(config, "dropout", "none").dropout == "none"
    with pytest.raises(ConfigError, match=r"evaluation\.every or checkpoint\.every"):
        full_name("every")


def test_a_length_said_anew_takes_back_the_other() -> None:
    config = with_setting(make_config({"minutes": 2}), "steps", "9")
    assert (config.steps, config.minutes) == (9, None)
    with pytest.raises(ConfigError, match="one of steps, epochs, minutes"):
        make_config({"steps": 3, "epochs": 2})


def test_batch_must_be_a_multiple_of_accumulate() -> None:
    with pytest.raises(ConfigError, match="multiple of accumulate; got 6 and 4"):
        make_config({"batch": 6, "accumulate": 4})


def test_settings_are_read_back_from_json_and_toml(tmp_path: Path) -> None:
    config = make_config(
        {"seed": 2**64 - 1, "optimizer": {"lr": 1 / 3}, "dropout": "residual=0.1", "steps": 5}
    )
    (tmp_path / "config.json").write_text(config.as_json())
    assert read_config(tmp_path / "config.json") == config
    (tmp_path / "run.toml").write_text('steps = 5\ndropout = "residual=0.1"\n[optimizer]\nlr = 0.25\n')
    read = read_config(tmp_path / "run.toml")
    assert read.optimizer.lr == 0.25 and math.isclose(read.optimizer.beta2, 0.95)
    (tmp_path / "bad.toml").write_text("steps = ")
    with pytest.raises(ConfigError, match="must be TOML"):
        read_config(tmp_path / "bad.toml")


def test_settings_need_no_torch() -> None:
    code = "import sys, twodice.training.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
