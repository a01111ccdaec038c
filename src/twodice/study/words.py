"""Numbers as text and verdicts as sentences: what the report says, and exactly what the statistics allow it
to say.

Knows nothing of pages or pictures. A sentence never says more than its verdict: *helps* and *hurts* only
where the adjusted interval lies on one side of zero at the best step; otherwise *cannot tell*, with how many
more seeds would be needed, or *wins only at the end* where that is what happened.
"""

from __future__ import annotations

import numpy as np

MINUS, NARROW = "−", "\u202f"  # a true minus; a narrow space that does not break, before units


def _signs(text: str) -> str:
    return text.replace("-", MINUS)


def number(value: float | int | None, kind: str = "nats") -> str:
    """`value` as text for people.

    Parameters
    ----------
    value
        None gives a dash.
    kind
        ``nats`` (three decimals), ``share`` (0.124 as 12.4 %), ``percent`` (3.1 as 3.1 %), ``count`` (whole,
        or one decimal below 100), ``plain1`` (one decimal), ``plain`` (two decimals), ``milli`` (0.0034 as
        3.40, in thousandths). Of ``percent`` and ``plain1`` see `brief` for what is small.
    """
    if value is None:
        return "–"
    if kind == "milli":
        return _unsigned_zero(f"{1000 * value:.2f}")
    if kind == "nats":
        return _unsigned_zero(f"{value:.3f}")
    if kind == "share":
        return _unsigned_zero(f"{100 * value:.1f}") + f"{NARROW}%"
    if kind == "percent":
        return brief(value) + f"{NARROW}%"
    if kind == "count":
        whole = float(value).is_integer() or abs(value) >= 100
        return _unsigned_zero(f"{value:,.0f}" if whole else f"{value:.1f}")
    return brief(value) if kind == "plain1" else _unsigned_zero(f"{value:.2f}")


def brief(value: float) -> str:
    """One decimal; below 0.1 as many as show two digits, since a bound that is not zero has a side."""
    if value == 0 or abs(value) >= 0.1:
        return _unsigned_zero(f"{value:.1f}")
    return _signs(np.format_float_positional(value, precision=2, fractional=False, trim="-"))


def _unsigned_zero(text: str) -> str:
    """No "−0.000": a zero that was rounded has no side."""
    return text.lstrip("-") if not text.strip("-0.,") else _signs(text)


def signed(value: float | None, kind: str = "nats") -> str:
    """As `number`, with a plus where it is above zero."""
    text = number(value, kind)
    has_digit = any(c in "123456789" for c in text)
    return f"+{text}" if value is not None and value > 0 and has_digit else text


def percent(value: float | None) -> str:
    """``-3.14`` as ``−3.1 %``, ``3.14`` as ``+3.1 %``."""
    return signed(value, "percent")


def interval(low: float | None, high: float | None, kind: str = "nats") -> str:
    """``[2.2, 4.0]`` with the unit left to the number before it; empty where there is no interval."""
    if low is None or high is None:
        return ""
    first, last = number(low, kind), number(high, kind)
    return f"[{first.removesuffix(f'{NARROW}%')}, {last.removesuffix(f'{NARROW}%')}]"


def signed_interval(low: float | None, high: float | None, kind: str) -> str:
    """``[−1.2, +0.4]``; empty where there is no interval."""
    return "" if low is None or high is None else f"[{signed(low, kind)}, {signed(high, kind)}]"


def counted(count: int, noun: str) -> str:
    """``1 seed``, ``5 seeds``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(words: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" and {words[-1]}" if words else ""
