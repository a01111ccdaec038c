"""Arms: from ``NAME="residual=0.1; weight_decay=0.5"`` to what a trial is told. Pure; knows no torch.

A part of an arm's text is an entry of the dropout plan where its first word is a kind of dropout, and a
training setting otherwise. What all trials must share (text, seed, steps, machine) no arm may change.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from twodice.dropout.plan import KINDS, DropoutPlan
from twodice.errors import ConfigError, nearest
from twodice.training.config import TrainConfig, full_name, setting_names, with_setting, with_value

#: What the trials of a study have in common, hence no arm's to change.
SHARED = frozenset(
    {
        *(
            "data",
            "field",
            "share",
            "tokenizer",
            "vocabulary",
            "context",
            "steps",
            "epochs",
            "minutes",
            "seed",
        ),
        *(
            "device",
            "threads",
            "evaluation.every",
            "evaluation.windows",
            "checkpoint.every",
            "checkpoint.keep",
        ),
    }
)
BASELINE_NAMES = ("baseline", "neither")
CLASSIC = "embedding={0}; attention={0}; residual={0}"
#: About what the records on scarce text of 2026 use (0.8 to 1.6), 16 times the usual 0.1.
HEAVY = 1.6


@dataclass(frozen=True)
class Arm:
    """One setting of a study.

    Attributes
    ----------
    name
        As in the report.
    text
        As typed after the name; empty changes nothing.
    plan
        The plan of dropout as text, or None where the arm does not speak of it.
    settings
        Dotted name and value as text, in the order given.
    """

    name: str
    text: str
    plan: str | None
    settings: tuple[tuple[str, str], ...]

    @property
    def slug(self) -> str:
        """The name as a folder's name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-.") or "arm"

    def config(self, base: TrainConfig) -> TrainConfig:
        """What a trial of this arm is told, but for seed and steps."""
        config = base if self.plan is None else with_value(base, "dropout", self.plan)
        for name, value in self.settings:
            config = with_setting(config, name, value)
        return config

    def has_dropout(self, base: TrainConfig) -> bool:
        """Whether anything is dropped at any time."""
        return any(
            rate_is_live(str(entry.schedule))
            for entry in DropoutPlan.parse(self.config(base).dropout).entries
        )

    def changes(self) -> dict[str, str]:
        """What the arm changes, for the report."""
        return {**({} if self.plan is None else {"dropout": self.plan}), **dict(self.settings)}


def rate_is_live(schedule: str) -> bool:
    """Whether a schedule's text holds any rate above 0."""
    numbers = re.findall(r"\d+\.?\d*(?:[eE][+-]?\d+)?", schedule)
    # early(rate, share of the run) and late: the second number is a time.
    rates = 1 if schedule.startswith(("early", "late")) else 2
    return any(float(number) > 0 for number in numbers[:rates])


def parse_arm(name: str, text: str, base: TrainConfig) -> Arm:
    """Read an arm's text and check it against what it is a change of.

    Parameters
    ----------
    name
        Any text that is not blank.
    text
        Parts separated by ``;``. ``residual=0.1`` is an entry of the dropout plan, ``weight_decay=0.5`` or
        ``optimizer.lr=1e-3`` a setting, ``dropout=none`` a whole plan.

    Raises
    ------
    ConfigError
        An unknown kind or setting (with the nearest of both), a value that it cannot take, or a setting that
        all trials share.
    """
    name = name.strip()
    if not name:
        raise ConfigError(f"an arm needs a name: --arm NAME='residual=0.1'; got {text!r}")
    entries: list[str] = []
    plan: str | None = None
    settings: list[tuple[str, str]] = []
    try:
        for part in filter(None, (part.strip() for part in text.split(";"))):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not key or not value:
                raise ConfigError(f"a part must read name=value, such as residual=0.1; got {part!r}")
            word = re.split(r"[.\[:]", key, maxsplit=1)[0]
            if key == "dropout" and (value.lower() == "none" or "=" in value):
                plan = value
            elif word in KINDS:
                entries.append(part)
            else:
                settings.append((_setting(key, part), value))
        if plan is not None and entries:
            raise ConfigError(f"give dropout=... or single entries, not both; got {text!r}")
        if entries:
            plan = ", ".join(entries)
        if plan is not None:
            plan = str(DropoutPlan.parse(plan))
        arm = Arm(
            name, "; ".join(part.strip() for part in text.split(";") if part.strip()), plan, tuple(settings)
        )
        arm.config(base)
    except ConfigError as error:
        raise ConfigError(f"arm {name!r}: {error}") from None
    return arm


def _setting(key: str, part: str) -> str:
    names = setting_names()
    leaves = [n.rpartition(".")[2] for n in names]
    if key not in names and key not in leaves:
        hint = nearest(key, [*KINDS, *names, *leaves])
        raise ConfigError(f"neither a kind of dropout nor a setting is called {key!r}{hint}")
    name = full_name(key)
    if name in SHARED:
        raise ConfigError(
            f"no arm may change {name}, because all trials share it; give it to the study ({part!r})"
        )
    return name


def check_arms(arms: Sequence[Arm]) -> str:
    """Return the name of the baseline: the arm called baseline or neither, else the first.

    Raises
    ------
    ConfigError
        Fewer than two arms, or two that cannot be told apart by name.
    """
    if len(arms) < 2:
        raise ConfigError(f"a study compares at least 2 arms; got {len(arms)}: add --arm NAME='residual=0.1'")
    seen: dict[str, str] = {}
    for arm in arms:
        if arm.slug in seen:
            raise ConfigError(f"arms must differ in name; got {seen[arm.slug]!r} and {arm.name!r}")
        seen[arm.slug] = arm.name
    return next((arm.name for arm in arms if arm.name.lower() in BASELINE_NAMES), arms[0].name)


def default_arms(*, demo: bool) -> list[tuple[str, str]]:
    """The arms of a study that names none, as (name, text)."""
    heavy = f"weight_decay={HEAVY:g}"
    dropout = CLASSIC.format(0.1)
    arms = [("neither", ""), ("dropout", dropout), ("weight decay", heavy), ("both", f"{dropout}; {heavy}")]
    if not demo:
        arms += [("dropout 0.2", CLASSIC.format(0.2)), ("early dropout", CLASSIC.format("early(0.1, 0.3)"))]
    return arms
