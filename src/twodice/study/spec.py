"""A study as it was asked for, and as settled before the first trial (``spec.json``). Knows no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from twodice.errors import ConfigError, nearest
from twodice.study.arms import SHARED, Arm, check_arms, default_arms, parse_arm
from twodice.training.config import (
    TrainConfig,
    full_name,
    make_config,
    read_settings,
    setting_names,
    with_setting,
)
from twodice.training.fields import in_words, nearest_field

SPEC = "spec.json"
#: The tuning seed lies this far beyond the study's own, which never reach it.
TUNING_SEED = 1_000_003
#: Windows of validation text B, at most, on which the best and the last step of a trial are scored.
B_WINDOWS = 4096


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ArmText(_Part):
    """An arm as typed."""

    name: str
    text: str


class SamplingPlan(_Part):
    """How the second die is thrown at the end: every arm that generates, in every setting."""

    prompts: Annotated[int, Field(ge=2)] = Field(
        default=12, description="stretches of held-out text that are continued"
    )
    prompt_tokens: Annotated[int, Field(ge=1)] = Field(default=24, description="tokens of each prompt")
    tokens: Annotated[int, Field(ge=8)] = Field(default=96, description="tokens of each continuation")
    draws: Annotated[int, Field(ge=1)] = Field(default=2, description="sampling seeds for each drawn setting")
    top_k: tuple[Annotated[int, Field(ge=1)] | None, ...] = Field(
        default=(10, 50, None), description="none means all tokens"
    )
    temperature: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(default=(0.7, 1.0))


class StudySpec(_Part):
    """What was asked for.

    Everything that a trial's result is a function of, but for the text's bytes and the machine, is in here
    together with `Settled`.
    """

    base: TrainConfig = Field(description="what all arms start from; its seed is the first of the study's")
    arms: tuple[ArmText, ...]
    seeds: Annotated[int, Field(ge=1, le=1000)] = 5
    minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=5, description="time for the whole study"
    )
    tune: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="dotted name to the values tried"
    )
    sampling: SamplingPlan | None = SamplingPlan()
    case: str | None = None

    @field_validator("base", mode="before")
    @classmethod
    def _base(cls, value: Any) -> Any:
        return make_config(value, where="base") if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _whole(self) -> StudySpec:
        if self.minutes is None and self.base.steps is None:
            raise ValueError("a study needs minutes or steps")
        return self

    @property
    def seed_list(self) -> list[int]:
        """The study's seeds: those of the trials that are compared."""
        return [self.base.seed + i for i in range(self.seeds)]

    @property
    def tuning_seed(self) -> int:
        """A seed outside of `seed_list`."""
        return self.base.seed + TUNING_SEED

    def parsed_arms(self) -> list[Arm]:
        """The arms, checked."""
        return [parse_arm(arm.name, arm.text, self.base) for arm in self.arms]

    @property
    def baseline(self) -> str:
        """Name of the arm that the others are held against."""
        return check_arms(self.parsed_arms())

    def tunings(self) -> list[dict[str, str]]:
        """Every combination of the values to be tried, the same for every arm; empty without tuning."""
        combined: list[dict[str, str]] = [{}]
        for name, values in self.tune.items():
            combined = [{**before, name: value} for before in combined for value in values]
        return combined if self.tune else []


class Settled(_Part):
    """What was measured and fixed before the first trial, and is then the same for every trial."""

    steps: int
    workers: int
    threads: int
    evaluate_every: int
    checkpoint_every: int
    reason: str


def make_spec(
    *,
    settings: Mapping[str, Any],
    arms: Sequence[tuple[str, str]],
    changes: Sequence[str] = (),
    tune: Sequence[str] = (),
    demo: bool = False,
    **rest: Any,
) -> StudySpec:
    """Put a study together and check all of it.

    Parameters
    ----------
    settings
        Values for `TrainConfig`.
    arms
        (name, text); none means the default ones.
    changes
        ``name=value`` as after ``--set``.
    tune
        ``lr=1e-3,3e-3`` as after ``--tune``.
    **rest
        The other fields of `StudySpec`.

    Raises
    ------
    ConfigError
        Anything that cannot be meant.
    """
    values = dict(settings)
    minutes = values.pop("minutes", None)
    if minutes is not None:
        rest["minutes"] = minutes
    if values.get("epochs") is not None:
        raise ConfigError(
            "a study is given minutes or steps, not epochs: every arm takes the same number of steps"
        )
    base = make_config(values)
    for text in changes:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set takes NAME=VALUE; got {text!r}")
        base = with_setting(base, name.strip(), value)
    if base.epochs is not None or base.minutes is not None:
        raise ConfigError(
            "a study takes --minutes, or --set steps=N; epochs and --set minutes belong to one run"
        )
    if base.steps is not None:
        if rest.get("minutes") is not None:
            raise ConfigError(
                f"give minutes or steps, not both; got minutes {rest['minutes']} and steps {base.steps}"
            )
        rest["minutes"] = None
    named = list(arms) if arms else default_arms(demo=demo)
    parsed = [parse_arm(name, text, base) for name, text in named]
    check_arms(parsed)
    grid: dict[str, tuple[str, ...]] = {}
    for text in tune:
        name, equals, listed = text.partition("=")
        options = tuple(value.strip() for value in listed.split(",") if value.strip())
        if not equals or len(options) < 2:
            raise ConfigError(f"--tune takes NAME=VALUE,VALUE,...; got {text!r}")
        dotted = full_name(name.strip())
        if dotted in SHARED or dotted in ("dropout", "dropout_draw", "model"):
            raise ConfigError(
                f"{dotted} cannot be tuned for each arm; learning rate and other optimizer settings can"
            )
        for option in options:
            with_setting(base, dotted, option)
        for arm in parsed:
            if dotted in dict(arm.settings):
                raise ConfigError(f"arm {arm.name!r} sets {dotted} itself, so it cannot be tuned")
        grid[dotted] = options
    try:
        return StudySpec(
            base=base, arms=tuple(ArmText(name=arm.name, text=arm.text) for arm in parsed), tune=grid, **rest
        )
    except ValidationError as error:
        raise ConfigError(in_words(error, StudySpec)) from None


def read_spec_file(path: Path) -> dict[str, Any]:
    """A spec file (TOML or JSON) as keyword arguments of `make_spec`.

    ``data``, ``model`` and any training setting stand at the top or in their tables, beside ``seeds``,
    ``minutes``, ``tune`` (a table of lists), ``sampling`` (a table) and ``arms`` (a table of name = "text").
    """
    values = read_settings(path)
    own = {"arms", "seeds", "minutes", "tune", "sampling", "case"}
    known = {*own, *(name.partition(".")[0] for name in setting_names())}
    for name in values:
        if name not in known:
            hint = nearest(name, known) or nearest_field(name, TrainConfig)
            raise ConfigError(f"{path}: no setting {name!r}{hint}")
    found: dict[str, Any] = {"settings": {k: v for k, v in values.items() if k not in own or k == "minutes"}}
    arms = values.get("arms", {})
    if not isinstance(arms, Mapping):
        raise ConfigError(f'{path}: arms must be a table of name = "text"; got a {type(arms).__name__}')
    found["arms"] = [(str(name), str(text)) for name, text in arms.items()]
    tune = values.get("tune", {})
    if not isinstance(tune, Mapping):
        raise ConfigError(f"{path}: tune must be a table of name = [values]; got a {type(tune).__name__}")
    found["tune"] = [f"{name}={','.join(map(str, options))}" for name, options in tune.items()]
    for name in ("seeds", "sampling", "case"):
        if name in values:
            found[name] = values[name]
    return found


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of plain values by dotted name."""
    if isinstance(value, Mapping):
        pairs = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        pairs = [(str(v.get("name", i)), v) for i, v in enumerate(value)]
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, inner in pairs:
        found.update(flat(inner, f"{prefix}.{name}" if prefix else name))
    return found


def differences(old: StudySpec, new: StudySpec) -> list[str]:
    """In what two studies differ, each as ``name: old there, new here``."""
    before, after = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    return [
        f"{name}: {before.get(name)!r} there, {after.get(name)!r} here"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name) and not name.endswith(".name")
    ]


def write_spec(folder: Path, spec: StudySpec, settled: Settled) -> None:
    """Write ``spec.json`` in one piece."""
    value = {"requested": spec.model_dump(mode="json"), "settled": settled.model_dump(mode="json")}
    side = folder / f".{SPEC}.new"
    with open(side, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    side.replace(folder / SPEC)


def read_spec(folder: Path) -> tuple[StudySpec, Settled] | None:
    """The study that is in `folder`, or None.

    Raises
    ------
    ConfigError
        The file is damaged.
    """
    path = folder / SPEC
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return StudySpec.model_validate(value["requested"]), Settled.model_validate(value["settled"])
    except ValidationError as error:
        known = {tree.__name__: tree for tree in (StudySpec, Settled)}
        said = in_words(error, known[error.title])
    except (ValueError, KeyError, TypeError) as error:
        said = f"{error}"
    raise ConfigError(f"{path} must hold a study as twodice writes it; {said}; give another --out")
