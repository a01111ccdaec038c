"""A plan's schedules: rates in time (`rates`), profiles over the layers, and the text of both.

Holds what grows with depth, the table of words and the parser. Knows neither models nor tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from twodice.dropout.rates import (
    Constant,
    Cosine,
    Early,
    Exponential,
    Late,
    Linear,
    Losses,
    Plateau,
    Schedule,
    Triangle,
)
from twodice.errors import ConfigError, nearest

_CALL = re.compile(r"([A-Za-z_]\w*)\s*\((.*)\)", re.DOTALL)
_WHOLE = re.compile(r"[+-]?\d+")

__all__ = [
    "Constant",
    "Cosine",
    "Depth",
    "Early",
    "Exponential",
    "Late",
    "Linear",
    "Listed",
    "Losses",
    "Plateau",
    "Schedule",
    "Triangle",
    "parse_schedule",
]


@dataclass(frozen=True)
class Depth(Schedule):
    """From `first` in the first of the layers to `last` in the last, in a straight line: ``depth(0.0, 0.2)``.

    Stochastic depth grows so (Huang et al. 2016, arXiv 1603.09382, section 3: the first layer at 1/L, here at
    `first`). Both ends may be schedules in time: ``depth(0.0, linear(0.2, 0.0))`` falls in time and rises in
    depth, as in Elhoushi et al. 2026 (arXiv 2609.05275).

    Parameters
    ----------
    first, last : Schedule
        Of the first and the last layer that the entry speaks of; one layer alone takes `last`.
    """

    first: Schedule
    last: Schedule

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", _in_time(self.first, "depth"))
        object.__setattr__(self, "last", _in_time(self.last, "depth"))

    @property
    def needs_total(self) -> bool:
        """Whether `total_steps` must be known."""
        return self.first.needs_total or self.last.needs_total

    @property
    def peak(self) -> float:
        """The highest rate that can come."""
        return max(self.first.peak, self.last.peak)

    def at(self, index: int, count: int) -> Schedule:
        """Return the schedule of one layer."""
        share = 1.0 if count == 1 else index / (count - 1)
        return self.first if share == 0 else self.last if share == 1 else _Mixed(self.first, self.last, share)

    def __str__(self) -> str:
        return f"depth({self.first}, {self.last})"


@dataclass(frozen=True)
class Listed(Schedule):
    """A schedule for each layer: ``layers(0.0, 0.1, early(0.2, 0.5))``.

    Parameters
    ----------
    each : tuple of Schedule
        As many as the entry has layers.
    """

    each: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "each", tuple(_in_time(one, "layers") for one in self.each))

    @property
    def needs_total(self) -> bool:
        """Whether `total_steps` must be known."""
        return any(one.needs_total for one in self.each)

    @property
    def peak(self) -> float:
        """The highest rate that can come."""
        return max(one.peak for one in self.each)

    def at(self, index: int, count: int) -> Schedule:
        """Return the schedule of one layer."""
        if count != len(self.each):
            raise ConfigError(
                f"layers(...) must have one rate for each of the {count} layers; got {len(self.each)} in "
                f"{str(self)!r}"
            )
        return self.each[index]

    def __str__(self) -> str:
        return f"layers({', '.join(map(str, self.each))})"


@dataclass(frozen=True)
class _Mixed(Schedule):
    """What `Depth` makes of a layer in the middle: ``first * (1 - share) + last * share`` at every step."""

    first: Schedule
    last: Schedule
    share: float

    @property
    def needs_total(self) -> bool:
        """Whether `total_steps` must be known."""
        return self.first.needs_total or self.last.needs_total

    @property
    def peak(self) -> float:
        """The highest rate that can come: never more than the mixture of both peaks."""
        return self.first.peak * (1 - self.share) + self.last.peak * self.share

    def rate(self, step: int, total_steps: int | None = None, losses: Losses = ()) -> float:
        """Return the rate at `step`, in [0, 1]."""
        first, last = self.first.rate(step, total_steps, losses), self.last.rate(step, total_steps, losses)
        return first * (1 - self.share) + last * self.share

    def __str__(self) -> str:
        if isinstance(self.first, Constant) and isinstance(self.last, Constant):
            return f"{self.peak:.6g}"
        return f"{1 - self.share:.3g} x {self.first} + {self.share:.3g} x {self.last}"


def _in_time(one: object, where: str) -> Schedule:
    schedule = parse_schedule(one)
    if isinstance(schedule, Depth | Listed):
        raise ConfigError(f"{where} takes rates and schedules in time; got {str(schedule)!r} inside it")
    return schedule


#: word -> (class, fewest and most arguments).
SCHEDULES: dict[str, tuple[type[Schedule], int, int]] = {
    "constant": (Constant, 1, 1),
    "linear": (Linear, 2, 3),
    "cosine": (Cosine, 2, 3),
    "exponential": (Exponential, 2, 3),
    "triangle": (Triangle, 2, 3),
    "early": (Early, 2, 2),
    "late": (Late, 2, 2),
    "plateau": (Plateau, 2, 4),
    "depth": (Depth, 2, 2),
    "layers": (Listed, 1, 1024),
}


def split(text: str) -> list[str]:
    """The parts of a text: split at commas that stand in no brackets; one comma at the end is forgiven."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    if depth != 0:
        raise ConfigError(f"brackets must close; got {text!r}")
    return [*parts, text[start:]] if text[start:].strip() else parts


def _number(text: str) -> int | float:
    text = text.strip()
    if _WHOLE.fullmatch(text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"a number is expected; got {text!r}") from None


def parse_schedule(value: object) -> Schedule:
    """Return the schedule that a number, a text or a schedule means.

    Raises
    ------
    ConfigError
        An unknown name (the nearest is said), a wrong number of arguments, a rate outside [0, 1], NaN.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Constant(value)
    if not isinstance(value, str):
        raise ConfigError(
            f"a rate must be a number in [0, 1] or a schedule such as 'early(0.1, 0.3)'; got {value!r}"
        )
    text = value.strip()
    call = _CALL.fullmatch(text)
    if call is None:
        if text in SCHEDULES:
            raise ConfigError(f"{text} needs its arguments in brackets, such as 'early(0.1, 0.3)'")
        try:
            return Constant(_number(text))
        except ConfigError as error:
            if "number is expected" in str(error):
                raise ConfigError(
                    f"a rate must be a number in [0, 1] or one of {', '.join(SCHEDULES)} with brackets; got "
                    f"{text!r}"
                ) from None
            raise
    name, arguments = call[1], split(call[2])
    if name not in SCHEDULES:
        raise ConfigError(
            f"a schedule must be one of {', '.join(SCHEDULES)}; got {name!r}{nearest(name, SCHEDULES)}"
        )
    made, fewest, most = SCHEDULES[name]
    if not fewest <= len(arguments) <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} {'or' if most == fewest + 1 else 'to'} {most}"
        raise ConfigError(f"{name} takes {wanted} numbers; got {len(arguments)} in {text!r}")
    if made is Listed:
        return Listed(tuple(parse_schedule(a) for a in arguments))
    if made is Depth:
        return Depth(parse_schedule(arguments[0]), parse_schedule(arguments[1]))
    return made(*(_number(a) for a in arguments))
