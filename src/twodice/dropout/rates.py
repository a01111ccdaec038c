"""Rates in time: how the rate of an entry of a plan follows from the step, and from nothing else.

Holds the schedules, their text and the rounding of a rate to the threshold that is in force. Knows neither
models nor tensors. Steps are counted from 0; a run of `total_steps` has the steps 0 to ``total_steps - 1``. A
point in time is a whole number of steps, or a fraction of the run in [0, 1] written with a point: ``1`` is
one step, ``1.0`` the whole run. One schedule, `Plateau`, also reads the validation losses that were measured
so far; it keeps no state of its own, so that a resumed run has the same rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, floor, pi

from twodice.errors import ConfigError

SMALLEST = 2.0**-17

#: Validation losses as they were logged: (step, loss), by rising step.
Losses = Sequence[tuple[int, float]]


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
class Schedule:
    """A rate in time. `rate` is the definition; `needs_total` says whether the run's length must be known.

    Rates lie in [0, 1] and are rounded to 1/65536 where they are used. What lies outside, and what cannot be
    meant, is a `ConfigError` when the schedule is made. Steps are counted from 0.

    *Randomness.* None: a rate is a function of the step, of the length of the run and, for `Plateau`, of the
    logged losses alone.
    """

    @property
    def needs_total(self) -> bool:
        """Whether `total_steps` must be known."""
        return False

    @property
    def peak(self) -> float:
        """The highest rate that can come."""
        raise NotImplementedError

    def rate(self, step: int, total_steps: int | None = None, losses: Losses = ()) -> float:
        """Return the rate at `step`, in [0, 1]; `losses` are those measured so far."""
        raise NotImplementedError

    def at(self, index: int, count: int) -> Schedule:
        """Return the schedule of the `index`-th of `count` layers; a schedule in time is the same for all."""
        return self


@dataclass(frozen=True)
class Constant(Schedule):
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
    def peak(self) -> float:
        """The highest rate that can come."""
        return self.p

    def rate(self, step: int, total_steps: int | None = None, losses: Losses = ()) -> float:
        """Return the rate at `step`, in [0, 1]."""
        return self.p

    def __str__(self) -> str:
        return repr(self.p)


@dataclass(frozen=True)
class _Ramp(Schedule):
    """From `first` at step 0 to `last` at the moment `until`, and `last` from there on.

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

    @property
    def name(self) -> str:
        """The word in a plan's text."""
        return type(self).__name__.lower()

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", _rate(self.first, f"the first rate of {self.name}"))
        object.__setattr__(self, "last", _rate(self.last, f"the last rate of {self.name}"))
        if self.until is not None:
            object.__setattr__(self, "until", _moment(self.until, f"the end of {self.name}"))

    @property
    def needs_total(self) -> bool:
        """Whether `total_steps` must be known."""
        return not isinstance(self.until, int)

    @property
    def peak(self) -> float:
        """The highest rate that can come."""
        return max(self.first, self.last)

    def between(self, done: float) -> float:
        """Return the rate where the share `done` in [0, 1) of the way is behind."""
        raise NotImplementedError

    def rate(self, step: int, total_steps: int | None = None, losses: Losses = ()) -> float:
        """Return the rate at `step`, in [0, 1]."""
        if self.until is None:
            if total_steps is None:
                raise ConfigError(
                    f"{self.name}(first, last) needs total_steps; pass it to attach, or write {self.name}("
                    "first, last, steps)"
                )
            end = total_steps - 1
        else:
            end = _steps(self.until, total_steps)
        if step >= end:
            # A run of one step has only its first rate to give.
            return self.first if self.until is None and step <= 0 else self.last
        return self.between(step / end)

    def __str__(self) -> str:
        tail = "" if self.until is None else f", {self.until!r}"
        return f"{self.name}({self.first!r}, {self.last!r}{tail})"


@dataclass(frozen=True)
class Linear(_Ramp):
    """A straight line: ``linear(0.2, 0.0)``; see `_Ramp` for the fields.

    Falling: Rennie et al. 2014 ("annealed dropout"); rising or falling: Hillier et al. 2024 (arXiv
    2409.05423).
    """

    def between(self, done: float) -> float:
        """Return ``first + (last - first) * done``."""
        return self.first + (self.last - self.first) * done


@dataclass(frozen=True)
class Cosine(_Ramp):
    """Half a cosine, flat at both ends: ``cosine(0.2, 0.0)``."""

    def between(self, done: float) -> float:
        """Return ``last + (first - last) * (1 + cos(pi * done)) / 2``."""
        return self.last + (self.first - self.last) * ((1 + cos(pi * done)) / 2)


@dataclass(frozen=True)
class Exponential(_Ramp):
    """A constant factor from step to step: ``exponential(0.3, 0.01)``. Neither rate may be 0.

    The decay of Yan and Shao 2024 (arXiv 2411.03236), whose formula is not public; the one here reaches
    `last` exactly. Morerio et al. 2017 (arXiv 1703.06229) raise the rate to a limit instead.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first == 0 or self.last == 0:
            raise ConfigError(
                f"the rates of exponential must be above 0, as a factor never reaches it; got {self}; write "
                "linear, or a small rate"
            )

    def between(self, done: float) -> float:
        """Return ``first * (last / first) ** done``."""
        return float(self.first * (self.last / self.first) ** done)


@dataclass(frozen=True)
class Triangle(Schedule):
    """Up from `low` to `high` and down again, `cycles` times in the run: ``triangle(0.0, 0.2, 3)``.

    Parameters
    ----------
    low, high : float
        Rates in [0, 1]; `low` at the first step, `high` in the middle of each cycle.
    cycles : int
        1 or more.
    """

    low: float
    high: float
    cycles: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "low", _rate(self.low, "the first rate of triangle"))
        object.__setattr__(self, "high", _rate(self.high, "the second rate of triangle"))
        if isinstance(self.cycles, bool) or not isinstance(self.cycles, int) or self.cycles < 1:
            raise ConfigError(
                f"the cycles of triangle must be a whole number, 1 or more; got {self.cycles!r}"
            )

    @property
    def needs_total(self) -> bool:
        """True: a cycle is a share of the run."""
        return True

    @property
    def peak(self) -> float:
        """The highest rate that can come."""
        return max(self.low, self.high)

    def rate(self, step: int, total_steps: int | None = None, losses: Losses = ()) -> float:
        """Return the rate at `step`, in [0, 1]."""
        if total_steps is None:
            raise ConfigError("triangle needs total_steps; pass it to attach")
        inside = (min(step, total_steps) * self.cycles % total_steps) / total_steps
        return self.low + (self.high - self.low) * (1 - abs(2 * inside - 1))

    def __str__(self) -> str:
        return f"triangle({self.low!r}, {self.high!r}, {self.cycles!r})"


@dataclass(frozen=True)
class Early(Schedule):
    """`p` before the moment `until`, 0 from there on: ``early(0.1, 0.3)``.

    Liu et al. 2023, "Dropout Reduces Underfitting" (arXiv 2303.01500), section 4: dropout in the first phase
    makes the gradients point the same way. They let the rate also fall linearly within the phase (here:
    ``linear(0.1, 0.0, 0.3)``); `early` is constant.

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

    def rate(self, step: int, total_steps: int | None = None, losses: Losses = ()) -> float:
        """Return the rate at `step`, in [0, 1]."""
        return self.p if step < _steps(self.until, total_steps) else 0.0

    def __str__(self) -> str:
        return f"early({self.p!r}, {self.until!r})"


@dataclass(frozen=True)
class Late(Schedule):
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

    def rate(self, step: int, total_steps: int | None = None, losses: Losses = ()) -> float:
        """Return the rate at `step`, in [0, 1]."""
        return self.p if step >= _steps(self.start, total_steps) else 0.0

    def __str__(self) -> str:
        return f"late({self.p!r}, {self.start!r})"


@dataclass(frozen=True)
class Plateau(Schedule):
    """`p`, times `factor` whenever the validation loss stops improving: ``plateau(0.1, 1.5, 2, 0.5)``.

    The validation-driven rule of Yan and Shao 2024, "Dynamic Dropout" (arXiv 2411.03236). Their formula is
    not public; this one is that of a learning rate on a plateau: after `patience` measurements in a row that
    are not below the best so far, the rate is multiplied and the counting starts anew. It is a function of
    the logged losses alone: replaying them gives the same rates.

    Parameters
    ----------
    p : float
        Rate in (0, 1] until the first plateau.
    factor : float
        Above 0. Below 1 the rate falls, above 1 it rises (the answer to overfitting).
    patience : int
        Measurements without improvement, 1 or more.
    limit : float or None
        Where the rate stops; None means 0 for a factor below 1, else 0.9.
    """

    p: float
    factor: float
    patience: int = 1
    limit: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", _rate(self.p, "the rate of plateau"))
        if self.p == 0:
            raise ConfigError("the rate of plateau must be above 0, as a factor does not move 0; got 0")
        if isinstance(self.factor, bool) or not 0 < self.factor < float("inf"):
            raise ConfigError(f"the factor of plateau must be above 0; got {self.factor!r}")
        object.__setattr__(self, "factor", float(self.factor))
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise ConfigError(
                f"the patience of plateau must be a whole number, 1 or more; got {self.patience!r}"
            )
        if self.limit is not None:
            object.__setattr__(self, "limit", _rate(self.limit, "the limit of plateau"))
            if (self.limit > self.p) if self.factor < 1 else (self.limit < self.p):
                raise ConfigError(f"the limit of plateau must lie where the factor leads; got {self}")

    @property
    def peak(self) -> float:
        """The highest rate that can come."""
        return self.p if self.factor <= 1 else self._end

    @property
    def _end(self) -> float:
        if self.limit is not None:
            return self.limit
        return 0.0 if self.factor < 1 else max(0.9, self.p)

    def rate(self, step: int, total_steps: int | None = None, losses: Losses = ()) -> float:
        """Return the rate at `step`: a loss that was measured at step s counts from step s on."""
        best, waited, rate = float("inf"), 0, self.p
        for measured, loss in losses:
            if measured > step:
                break
            if loss < best:
                best, waited = loss, 0
                continue
            waited += 1
            if waited == self.patience:
                rate, waited = rate * self.factor, 0
        return max(rate, self._end) if self.factor < 1 else min(rate, self._end)

    def __str__(self) -> str:
        tail = "" if self.limit is None else f", {self.limit!r}"
        return f"plateau({self.p!r}, {self.factor!r}, {self.patience!r}{tail})"
