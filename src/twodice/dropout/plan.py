"""What is dropped where, how much and when: the plan, its text and its checks. Knows no model and no tensor.

A plan's text is a list of ``kind[.place][layers][:noise]=rate``: ``embedding=0.1, residual.mlp[0:6]:feature=
early(0.1, 0.3)``.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twodice.dropout.schedules import Constant, Depth, Listed, Schedule, parse_schedule, split
from twodice.errors import ConfigError, nearest
from twodice.kernels.noise_form import UNIT, Noise
from twodice.random.thresholds import round_rate


@dataclass(frozen=True)
class Kind:
    """What a plan may say of a kind.

    Attributes
    ----------
    places : tuple of str or None
        Parts of a block that may narrow it; None: a path of modules.
    layered : bool
        Whether its sites belong to layers.
    noises : tuple of str
        Words of noise that it takes besides its own; ``any`` stands for all that `Noise` knows.
    cuts : bool
        Whether a constant rate of 1 would cut the model in two for the whole run, and so is an error.
    """

    places: tuple[str, ...] | None = ()
    layered: bool = False
    noises: tuple[str, ...] = ()
    cuts: bool = False


ANY = ("any",)
SUBLAYERS = ("attention", "cross", "mlp")
STACKS = ("encoder", "decoder")
KINDS: dict[str, Kind] = {
    "embedding": Kind(noises=ANY),
    "token": Kind(),
    "word": Kind(),
    "attention": Kind(("self", "cross"), layered=True),
    "key": Kind(("self", "cross"), layered=True),
    "head": Kind(("self", "cross"), layered=True),
    "residual": Kind(SUBLAYERS, layered=True, noises=ANY, cuts=True),
    "activation": Kind(layered=True, noises=ANY),
    "skip": Kind(SUBLAYERS, layered=True, noises=ANY, cuts=True),
    "layer": Kind(layered=True, noises=("example", "batch")),
    "output": Kind(noises=ANY),
    "weight": Kind(None, noises=("tied",)),
    "dropout": Kind(None, noises=ANY),
}

_TARGET = re.compile(r"\s*([A-Za-z_]\w*)((?:\.\w+)*)\s*(?:\[([^\]]*)\])?\s*(?::(.*))?\s*", re.DOTALL)
_LAYERS = re.compile(r"\s*(-?\d+)?\s*(:)?\s*(-?\d+)?\s*")


@dataclass(frozen=True)
class Layers:
    """A run of layers, like a slice of a list.

    Parameters
    ----------
    start, stop : int or None
        From `start` up to, but not with, `stop`; a negative number counts from the end of the stack, None is
        that end of it.
    """

    start: int | None
    stop: int | None

    def indices(self, count: int) -> range:
        """Return the layers among `count` that are meant."""
        return range(*slice(self.start, self.stop).indices(count))

    def meets(self, other: Layers) -> bool:
        """Whether both surely share a layer; with negative numbers only a model can tell (`attach` does)."""
        ends = (self.start, self.stop, other.start, other.stop)
        if any(end is not None and end < 0 for end in ends):
            return False
        low = max(0 if self.start is None else self.start, 0 if other.start is None else other.start)
        stops = [stop for stop in (self.stop, other.stop) if stop is not None]
        return not stops or low < min(stops)

    def __str__(self) -> str:
        if (
            self.start is not None
            and self.stop is not None
            and self.stop == self.start + 1
            and self.start >= 0
        ):
            return f"[{self.start}]"
        left = "" if self.start is None else self.start
        right = "" if self.stop is None else self.stop
        return f"[{left}:{right}]"


@dataclass(frozen=True)
class Entry:
    """One entry of a plan: a kind, narrowed by place and layers where that is said, its schedule and its
    noise.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    schedule : Schedule
        The rate in time.
    place : str or None
        Words of the kind's parts and of ``encoder`` and ``decoder``, joined by points
        (``decoder.cross``); a path of modules for ``dropout`` and ``weight``; None means everywhere.
    layers : Layers or None
        None means every layer.
    noise : str
        What is drawn: ``unit`` (neutral), ``feature``, ``block(N)``, ``gaussian``, joined with ``+``;
        ``example`` (neutral) or ``batch`` for ``layer``; ``tied`` lets ``weight`` reach tied weights.
    """

    kind: str
    schedule: Schedule
    place: str | None = None
    layers: Layers | None = None
    noise: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            narrowed = [name for name, kind in KINDS.items() if self.kind in (kind.places or ())]
            hint = f"; write {' or '.join(f'{name}.{self.kind}' for name in narrowed)}" if narrowed else ""
            raise ConfigError(
                f"a kind must be one of {', '.join(KINDS)}; got {self.kind!r}"
                f"{hint or nearest(self.kind, KINDS)}"
            )
        kind = KINDS[self.kind]
        if self.place is not None and kind.places is not None:
            self._check_place(kind.places)
        if self.layers is not None and not kind.layered:
            raise ConfigError(
                f"{self.kind!r} does not belong to a layer; got {self.target!r}; leave the brackets out"
            )
        object.__setattr__(self, "noise", self._checked_noise(kind))
        if isinstance(self.schedule, Depth | Listed) and not kind.layered:
            raise ConfigError(
                f"{self.kind!r} does not belong to a layer, so its rate has no profile over layers; got "
                f"{str(self.schedule)!r}"
            )
        if self.form.form == "gaussian" and round_rate(self.schedule.peak) == round_rate(1.0):
            raise ConfigError(
                f"p must stay below 1 at {self.target!r}, because Gaussian noise has no bound there; got "
                f"{self.schedule}; write a lower rate"
            )
        if kind.cuts and Constant(1) in _parts(self.schedule):
            raise ConfigError(
                f"p must be below 1 at {self.target!r}, because nothing would pass there for the whole run; "
                f"got {self.schedule}; write a lower rate, or, to leave whole blocks out, layer[...]=1"
            )

    def _check_place(self, places: tuple[str, ...]) -> None:
        words = [] if self.place is None else self.place.split(".")
        known = (*places, *STACKS)
        for word in words:
            if word in known:
                continue
            if not places:
                raise ConfigError(
                    f"{self.kind!r} has no places to narrow it to but {' and '.join(STACKS)}; got "
                    f"{self.target!r}; write {self.kind!r}"
                )
            raise ConfigError(
                f"{self.kind!r} may be narrowed to {', '.join(known)}; got {word!r}{nearest(word, known)}"
            )
        if sum(word in places for word in words) > 1 or sum(word in STACKS for word in words) > 1:
            raise ConfigError(f"a place names one part and one stack at most; got {self.target!r}")
        object.__setattr__(self, "place", ".".join(sorted(words, key=lambda word: word not in STACKS)))

    def _checked_noise(self, kind: Kind) -> str:
        said = self.noise.strip()
        if not said:
            return ""
        if kind.noises == ANY:
            text = str(Noise.parse(said))
            return "" if text == "unit" else text
        if said not in kind.noises:
            takes = " or ".join(kind.noises) if kind.noises else "no noise of another form"
            raise ConfigError(f"{self.kind!r} takes {takes}; got {said!r} at {self.target!r}")
        return "" if said == "example" else said

    @property
    def form(self) -> Noise:
        """The noise that is drawn at each unit of the site's tensor."""
        return Noise.parse(self.noise or "unit") if KINDS[self.kind].noises == ANY else UNIT

    @property
    def part(self) -> str | None:
        """The part of a block that the place names."""
        return next((word for word in (self.place or "").split(".") if word and word not in STACKS), None)

    @property
    def stack(self) -> str | None:
        """The stack that the place names."""
        return next((word for word in (self.place or "").split(".") if word in STACKS), None)

    @property
    def target(self) -> str:
        """What the entry speaks of: the text before the equals sign, without the noise."""
        place = "" if self.place is None else f".{self.place}"
        return f"{self.kind}{place}{'' if self.layers is None else self.layers}"

    def overlaps(self, other: Entry) -> bool:
        """Whether both speak of one site, as far as can be told without a model."""
        if self.kind != other.kind:
            return False
        if KINDS[self.kind].places is None:
            if self.place is not None and other.place is not None:
                a, b = f"{self.place}.", f"{other.place}."
                if not (a.startswith(b) or b.startswith(a)):
                    return False
        else:
            for mine, theirs in ((self.part, other.part), (self.stack, other.stack)):
                if mine is not None and theirs is not None and mine != theirs:
                    return False
        if self.layers is None or other.layers is None:
            return True
        return self.layers.meets(other.layers)

    def __str__(self) -> str:
        return f"{self.target}{f':{self.noise}' if self.noise else ''}={self.schedule}"


@dataclass(frozen=True)
class DropoutPlan:
    """Which sites, which rate, on which schedule. Frozen, hashable; ``str(plan)`` is text that parses to an
    equal plan.

    Parameters
    ----------
    entries : tuple of Entry
        In any order: they are sorted, so that plans that mean the same are equal. None may overlap another.

    Examples
    --------
    >>> str(DropoutPlan.parse("residual=0.1, embedding=early(0.1, 0.3)"))
    'embedding=early(0.1, 0.3), residual=0.1'
    """

    entries: tuple[Entry, ...] = ()

    def __post_init__(self) -> None:
        order = list(KINDS)
        entries = tuple(sorted(self.entries, key=lambda e: (order.index(e.kind), _layer_order(e), str(e))))
        object.__setattr__(self, "entries", entries)
        for number, entry in enumerate(entries):
            for other in entries[:number]:
                if entry.overlaps(other):
                    raise ConfigError(
                        f"each site must be spoken of once; {str(other)!r} and {str(entry)!r} overlap; "
                        "narrow one by place or layers, or leave it out"
                    )

    @classmethod
    def parse(cls, source: str | Path | Mapping[str, Any] | DropoutPlan) -> DropoutPlan:
        """Return the plan that a text, a mapping or a TOML file means.

        Parameters
        ----------
        source : str, Path, mapping or DropoutPlan
            Text such as ``"embedding=0.1, residual.mlp[0:6]=linear(0.2, 0.0)"``; ``""`` or ``"none"`` is the
            empty plan. A mapping from targets to rates (numbers, text or schedules). A path that ends in
            ``.toml``: such a mapping at the top level or in the table ``dropout``.

        Raises
        ------
        ConfigError
            An unknown kind, place or schedule (the nearest is named); a rate outside [0, 1] or NaN; a rate
            that rounds to 0 or 1 without being it; a constant rate of 1 at ``residual`` or ``skip``, one that
            reaches 1 with Gaussian noise; entries that overlap; a noise that the kind does not take; a file
            that cannot be read.

        Notes
        -----
        The grammar is D1 and D2 of ``docs/contracts/dropout.md``; which kind does what, ``docs/dropout.md``.
        """
        if isinstance(source, DropoutPlan):
            return source
        if isinstance(source, Mapping):
            return cls(tuple(_entry(str(target), rate) for target, rate in _flat(source)))
        if isinstance(source, Path) or (isinstance(source, str) and source.strip().endswith(".toml")):
            return _read(Path(source.strip() if isinstance(source, str) else source))
        if not isinstance(source, str):
            raise ConfigError(
                "a plan must be text such as 'residual=0.1', a mapping, a TOML file or a DropoutPlan; got "
                f"{source!r}"
            )
        if source.strip().lower() in ("", "none"):
            return cls()
        entries = []
        for part in split(source):
            target, equals, rate = part.partition("=")
            if not equals or not target.strip() or not rate.strip():
                raise ConfigError(
                    f"an entry of a plan must read kind=rate, such as residual=0.1; got {part.strip()!r}"
                )
            entries.append(_entry(target, rate))
        return cls(tuple(entries))

    @property
    def needs_total(self) -> bool:
        """Whether a schedule in the plan depends on the length of the run."""
        return any(entry.schedule.needs_total for entry in self.entries)

    def __bool__(self) -> bool:
        return bool(self.entries)

    def __str__(self) -> str:
        return ", ".join(map(str, self.entries)) if self.entries else "none"


def _parts(schedule: Schedule) -> tuple[Schedule, ...]:
    """The schedules in time that a profile over layers holds; one in time is its own."""
    if isinstance(schedule, Depth):
        return schedule.first, schedule.last
    return schedule.each if isinstance(schedule, Listed) else (schedule,)


def _layer_order(entry: Entry) -> int:
    return -1 if entry.layers is None or entry.layers.start is None else entry.layers.start


def _entry(target: str, rate: Any) -> Entry:
    match = _TARGET.fullmatch(target)
    if match is None:
        raise ConfigError(
            f"a target must read kind[.place][layers], such as residual.mlp[0:6]; got {target.strip()!r}"
        )
    kind, place, layers = match[1], match[2][1:] if match[2] else None, match[3]
    noise = match[4] or ""
    # The name is checked before the rate, so that a misspelt kind is not reported as a bad rate.
    span = None if layers is None else _layers(layers, target.strip())
    Entry(kind, Constant(0.0), place, span, noise)
    try:
        schedule = parse_schedule(rate)
    except ConfigError as error:
        raise ConfigError(f"{error} (at {target.strip()!r})") from None
    return Entry(kind, schedule, place, span, noise)


def _layers(text: str, target: str) -> Layers:
    match = _LAYERS.fullmatch(text)
    if (
        match is None
        or (match[1] is None and match[2] is None)
        or (match[2] is None and match[3] is not None)
    ):
        raise ConfigError(f"layers must read [3], [0:6], [6:] or [:6]; got [{text}] at {target!r}")
    start = None if match[1] is None else int(match[1])
    if match[2] is None:
        assert start is not None
        return Layers(start, None if start == -1 else start + 1)
    stop = None if match[3] is None else int(match[3])
    if start is not None and stop is not None and (start < 0) == (stop < 0) and start >= stop:
        raise ConfigError(f"layers must hold at least one; got [{text}] at {target!r}")
    return Layers(start, stop)


def _flat(mapping: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """TOML reads ``residual.mlp = 0.1`` as a table in a table: put the names together again."""
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _read(path: Path) -> DropoutPlan:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the plan in {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} must be TOML: {error}") from None
    table = values.get("dropout")
    if len(values) == 1 and isinstance(table, Mapping):
        values = dict(table)
    elif len(values) == 1 and isinstance(table, str):
        return DropoutPlan.parse(table)
    try:
        return DropoutPlan.parse(values)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {path})") from None
