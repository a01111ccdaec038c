"""The harness of all benchmarks: the peers run in turn in one process, medians are compared as ratios.

Turns alternate, so that a slow moment of the machine falls on all; inputs rotate (repeating one trains the
branch predictor and warms the caches); buffers are the caller's business and must be alike on both sides.
"""

from __future__ import annotations

import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twodice.cli.doctor import processor


@dataclass(frozen=True)
class Row:
    """One comparison: seconds a call of each contender, by name."""

    name: str
    seconds: Mapping[str, float]
    threads: int

    def ratio(self, ours: str, theirs: str) -> float:
        """How many times faster `ours` is than `theirs`."""
        return self.seconds[theirs] / self.seconds[ours]


def alternate(
    contenders: Mapping[str, Callable[[Any], Any]],
    inputs: Sequence[Any],
    *,
    rounds: int = 15,
    seconds: float = 0.02,
) -> dict[str, float]:
    """Return the median seconds a call of each contender; the parameters are those of `turns`."""
    found = turns(contenders, inputs, rounds=rounds, seconds=seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def turns(
    contenders: Mapping[str, Callable[[Any], Any]],
    inputs: Sequence[Any],
    *,
    rounds: int = 15,
    seconds: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds a call of each contender, round by round.

    Parameters
    ----------
    contenders : mapping of name to function of one input
        Called in turn, round after round.
    inputs : sequence
        What the calls rotate over; at least 64 for small work.
    rounds : int
        Turns that each contender gets.
    seconds : float
        Length of one turn; short calls are repeated to fill it.
    clock : function
        ``time.process_time`` counts what the process itself works: for long turns of one thread on a machine
        that others use.
    """
    repeats = {}
    for name, call in contenders.items():
        call(inputs[0])
        start = time.perf_counter()
        call(inputs[-1])
        repeats[name] = max(1, int(seconds / max(time.perf_counter() - start, 1e-7)))
    sources = {name: itertools.cycle(inputs) for name in contenders}
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            chosen = list(itertools.islice(sources[name], repeats[name]))
            start = clock()
            for value in chosen:
                call(value)
            found[name].append((clock() - start) / repeats[name])
    return found


def table(title: str, rows: Sequence[Row], ours: str, theirs: Sequence[str], file: Any = None) -> None:
    """Print the time of `ours` and how many times faster it is than each of `theirs`."""
    out = sys.stdout if file is None else file
    print(f"\n{title}\n{processor()}, Python {platform.python_version()}", file=out)
    print(
        f"{'case':<44}{'threads':>8}{ours + ' us':>16}" + "".join(f"{'x ' + t:>22}" for t in theirs), file=out
    )
    for row in rows:
        cells = "".join(f"{row.ratio(ours, t):>22.2f}" if t in row.seconds else f"{'':>22}" for t in theirs)
        print(f"{row.name:<44}{row.threads:>8}{row.seconds[ours] * 1e6:>16.1f}{cells}", file=out)
