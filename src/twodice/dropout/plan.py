"""What is dropped where, how much and when: the plan, its text and its checks. Knows no model and no tensor.

A plan's text is a list of ``kind[.place][layers]=rate``: ``embedding=0.1, residual.mlp[0:6]=early(0.1,
0.3)``.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twodice.dropout.schedules import Constant, Schedule, parse_schedule
from twodice.errors import ConfigError, nearest

#: kind -> (places that may narrow it, whether layers may). None as places: a path of modules.
KINDS: dict[str, tuple[tuple[str, ...] | None, bool]] = {
    "embedding": ((), False),
    "attention": ((), True),
    "residual": (("attention", "mlp"), True),
    "activation": ((), True),
    "output": ((), False),
    "dropout": (None, False),
}
UNBUILT = ("key", "head", "skip", "layer", "token", "word", "weight")

_TARGET = re.compile(r"\s*([A-Za-z_]\w*)((?:\.\w+)*)\s*(?:\[([^\]]*)\])?\s*")
_LAYERS = re.compile(r"\s*(-?\d+)?\s*(:)?\s*(-?\d+)?\s*")


@dataclass(frozen=True)
class Layers:
    """A run of layers, like a slice of a list: from `start` up to, but not with, `stop`; negative counts from
    the end.
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
    """One entry of a plan: a kind, narrowed by place and layers where that is said, and its schedule.

    Parameters
    ----------
    kind : str
        One of ``embedding``, ``attention``, ``residual``, ``activation``, ``output``, ``dropout``.
    schedule : Schedule
        The rate in time.
    place : str or None
        ``attention`` or ``mlp`` for ``residual``; a path of modules for ``dropout``; None means everywhere.
    layers : Layers or None
        None means every layer.
    """

    kind: str
    schedule: Schedule
    place: str | None = None
    layers: Layers | None = None

    def __post_init__(self) -> None:
        if self.kind in UNBUILT:
            raise ConfigError(f"the kind {self.kind!r} is not built yet; there are {', '.join(KINDS)}")
        if self.kind not in KINDS:
            raise ConfigError(
                f"a kind must be one of {', '.join(KINDS)}; got {self.kind!r}{nearest(self.kind, KINDS)}"
            )
        places, layered = KINDS[self.kind]
        if self.place is not None and places is not None and self.place not in places:
            if not places:
                raise ConfigError(
                    f"{self.kind!r} has no places to narrow it to; got {self.target!r}; write {self.kind!r}"
                )
            raise ConfigError(
                f"{self.kind!r} may be narrowed to {' or '.join(places)}; got "
                f"{self.place!r}{nearest(self.place, places)}"
            )
        if self.layers is not None and not layered:
            raise ConfigError(
                f"{self.kind!r} does not belong to a layer; got {self.target!r}; leave the brackets out"
            )
        if self.kind == "residual" and self.schedule == Constant(1):
            raise ConfigError(
                f"p must be below 1 at {self.target!r}, because all layers would be cut off for the whole "
                "run; got 1"
            )

    @property
    def target(self) -> str:
        """What the entry speaks of: the text before the equals sign."""
        place = "" if self.place is None else f".{self.place}"
        return f"{self.kind}{place}{'' if self.layers is None else self.layers}"

    def overlaps(self, other: Entry) -> bool:
        """Whether both speak of one site, as far as can be told without a model."""
        if self.kind != other.kind:
            return False
        if self.place is not None and other.place is not None and self.place != other.place:
            a, b = f"{self.place}.", f"{other.place}."
            if KINDS[self.kind][0] is not None or not (a.startswith(b) or b.startswith(a)):
                return False
        if self.layers is None or other.layers is None:
            return True
        return self.layers.meets(other.layers)

    def __str__(self) -> str:
        return f"{self.target}={self.schedule}"


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
                        "narrow one by "
                        "place or layers, or leave it out"
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
            that rounds to 0 or 1 without being it; entries that overlap; a kind that is not built yet.
        """
        if isinstance(source, DropoutPlan):
            return source
        if isinstance(source, Mapping):
            return cls(tuple(_entry(str(target), rate) for target, rate in _flat(source)))
        if isinstance(source, Path) or (isinstance(source, str) and source.strip().endswith(".toml")):
            return _read(Path(source.strip() if isinstance(source, str) else source))
        if not isinstance(source, str):
            raise ConfigError(f"a plan must be text, a mapping or a TOML file; got {type(source).__name__}")
        if source.strip().lower() in ("", "none"):
            return cls()
        entries = []
        for part in _split(source):
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


def _layer_order(entry: Entry) -> int:
    return -1 if entry.layers is None or entry.layers.start is None else entry.layers.start


def _split(text: str) -> list[str]:
    """The entries of a text: split at commas that stand in no brackets; one comma at the end is forgiven."""
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


def _entry(target: str, rate: Any) -> Entry:
    match = _TARGET.fullmatch(target)
    if match is None:
        raise ConfigError(
            f"a target must read kind[.place][layers], such as residual.mlp[0:6]; got {target.strip()!r}"
        )
    kind, place, layers = match[1], match[2][1:] if match[2] else None, match[3]
    # The name is checked before the rate, so that a misspelt kind is not reported as a bad rate.
    entry = Entry(kind, Constant(0.0), place, None if layers is None else _layers(layers, target.strip()))
    try:
        schedule = parse_schedule(rate)
    except ConfigError as error:
        raise ConfigError(f"{error} (at {target.strip()!r})") from None
    return Entry(kind, schedule, entry.place, entry.layers)


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
