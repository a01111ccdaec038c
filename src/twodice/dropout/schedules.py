"""Rates in time: how the rate of an entry of a plan follows from the step, and from nothing else.

Holds the schedules, their text and the rounding of a rate to the threshold that is in force. Knows neither
models nor tensors. Steps are counted from 0; a run of `total_steps` has the steps 0 to ``total_steps - 1``. A
point in time is a whole number of steps, or a fraction of the run in [0, 1] written with a point: ``1`` is
one step, ``1.0`` the whole run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import floor

from twodice.errors import ConfigError, nearest

LANES = 65536
SMALLEST = 2.0**-17
UNBUILT = ("cosine", "exponential", "triangle", "plateau")

_CALL = re.compile(r"([A-Za-z_]\w*)\s*\((.*)\)", re.DOTALL)
_WHOLE = re.compile(r"[+-]?\d+")


def threshold(rate: float) -> int:
    """Return ``t = round(rate * 65536)`` in [0, 65536]: a unit is dropped iff its 16-bit lane is below t."""
    return round(rate * LANES)


def _rate(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{what} must be a number in [0, 1]; got {value!r}")
    if not 0 <= value <= 1:
        raise ConfigError(f"{what} must be in [0, 1]; got {value!r}")
    return float(value)


def _moment(value: object, what: str) -> int | float:
    """A point in time: whole steps (int, >= 0) or a fraction of the run (float in [0, 1])."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(
            f"{what} must be a fraction of the run in [0, 1] or a whole number of steps; got {value!r}"
        )
    if isinstance(value, int):
        if value < 0:
            raise ConfigError(f"{what} must be 0 steps or more; got {value}")
        return value
    if not 0 <= value <= 1:
        raise ConfigError(
            f"{what} must be a fraction of the run in [0, 1] (or a whole number of steps, without a point); "
            f"got {value!r}"
        )
    return value


def _steps(moment: int | float, total_steps: int | None) -> int:
    """The moment as a number of steps; a fraction is rounded half up."""
    if isinstance(moment, int):
        return moment
    if total_steps is None:
        raise ConfigError(
            "a fraction of the run needs total_steps; pass it to attach, or write whole steps in the plan"
        )
    return floor(moment * total_steps + 0.5)


@dataclass(frozen=True)
class Constant:
    """The same rate at every step.

    Parameters
    ----------
    p : float
        Probability of dropping, in [0, 1]. Written as a bare number: ``0.1``.
    """

    p: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", _rate(self.p, "p"))
        if 0 < self.p < SMALLEST or 1 - SMALLEST < self.p < 1:
            end = 0 if self.p < 0.5 else 1
            raise ConfigError(
                f"a constant p must be 0, 1 or in [2^-17, 1 - 2^-17], because rates are counted in 1/65536; "
                f"got {self.p!r}; write {end}"
            )

    @property
    def needs_total(self) -> bool:
        """False: the rate never depends on the length of the run."""
        return False

    @property
    def peak(self) -> float:
        """The highest rate that can come."""
        return self.p

    def rate(self, step: int, total_steps: int | None = None) -> float:
        """Return the rate at `step`, in [0, 1]."""
        return self.p

    def __str__(self) -> str:
        return repr(self.p)


@dataclass(frozen=True)
class Linear:
    """A straight line from `first` at step 0 to `last`, and `last` from there on: ``linear(0.2, 0.0)``.

    Parameters
    ----------
    first, last : float
        Rates in [0, 1].
    until : int, float or None
        The step at which `last` is reached (whole steps, or a fraction of the run); None means the last step
        of the run.
    """

    first: float
    last: float
    until: int | float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", _rate(self.first, "the first rate of linear"))
        object.__setattr__(self, "last", _rate(self.last, "the last rate of linear"))
        if self.until is not None:
            object.__setattr__(self, "until", _moment(self.until, "the end of linear"))

    @property
    def needs_total(self) -> bool:
        """Whether `total_steps` must be known."""
        return not isinstance(self.until, int)

    @property
    def peak(self) -> float:
        """The highest rate that can come."""
        return max(self.first, self.last)

    def rate(self, step: int, total_steps: int | None = None) -> float:
        """Return the rate at `step`, in [0, 1]."""
        if self.until is None:
            if total_steps is None:
                raise ConfigError(
                    "linear(first, last) needs total_steps; pass it to attach, or write linear(first, "
                    "last, steps)"
                )
            end = total_steps - 1
        else:
            end = _steps(self.until, total_steps)
        if step >= end:
            # A run of one step has only its first rate to give.
            return self.first if self.until is None and step <= 0 else self.last
        return self.first + (self.last - self.first) * (step / end)

    def __str__(self) -> str:
        tail = "" if self.until is None else f", {self.until!r}"
        return f"linear({self.first!r}, {self.last!r}{tail})"


@dataclass(frozen=True)
class Early:
    """`p` before the moment `until`, 0 from there on: ``early(0.1, 0.3)``.

    Liu et al. 2023, "Dropout Reduces Underfitting" (arXiv 2303.01500), section 4: dropout in the first phase
    makes the gradients point the same way. They let the rate also fall linearly within the phase; here it is
    constant.

    Parameters
    ----------
    p : float
        Rate in [0, 1].
    until : int or float
        Whole steps, or a fraction of the run (rounded half up to a step).
    """

    p: float
    until: int | float

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", _rate(self.p, "the rate of early"))
        object.__setattr__(self, "until", _moment(self.until, "the end of early"))

    @property
    def needs_total(self) -> bool:
        """Whether `total_steps` must be known."""
        return not isinstance(self.until, int)

    @property
    def peak(self) -> float:
        """The highest rate that can come."""
        return self.p

    def rate(self, step: int, total_steps: int | None = None) -> float:
        """Return the rate at `step`, in [0, 1]."""
        return self.p if step < _steps(self.until, total_steps) else 0.0

    def __str__(self) -> str:
        return f"early({self.p!r}, {self.until!r})"


@dataclass(frozen=True)
class Late:
    """0 before the moment `start`, `p` from there on: ``late(0.1, 0.5)`` (Liu et al. 2023, section 5).

    Parameters
    ----------
    p : float
        Rate in [0, 1].
    start : int or float
        Whole steps, or a fraction of the run (rounded half up to a step).
    """

    p: float
    start: int | float

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", _rate(self.p, "the rate of late"))
        object.__setattr__(self, "start", _moment(self.start, "the start of late"))

    @property
    def needs_total(self) -> bool:
        """Whether `total_steps` must be known."""
        return not isinstance(self.start, int)

    @property
    def peak(self) -> float:
        """The highest rate that can come."""
        return self.p

    def rate(self, step: int, total_steps: int | None = None) -> float:
        """Return the rate at `step`, in [0, 1]."""
        return self.p if step >= _steps(self.start, total_steps) else 0.0

    def __str__(self) -> str:
        return f"late({self.p!r}, {self.start!r})"


Schedule = Constant | Linear | Early | Late
SCHEDULES: dict[str, tuple[type[Schedule], int, int]] = {
    "constant": (Constant, 1, 1),
    "linear": (Linear, 2, 3),
    "early": (Early, 2, 2),
    "late": (Late, 2, 2),
}


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
    if isinstance(value, Constant | Linear | Early | Late):
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
    name, arguments = call[1], [part for part in call[2].split(",") if part.strip()]
    if name in UNBUILT:
        raise ConfigError(f"the schedule {name!r} is not built yet; there are {', '.join(SCHEDULES)}")
    if name not in SCHEDULES:
        raise ConfigError(
            f"a schedule must be one of {', '.join(SCHEDULES)}; got {name!r}{nearest(name, SCHEDULES)}"
        )
    made, fewest, most = SCHEDULES[name]
    if not fewest <= len(arguments) <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} or {most}"
        raise ConfigError(f"{name} takes {wanted} numbers; got {len(arguments)} in {text!r}")
    return made(*(_number(a) for a in arguments))
