"""Which stretches of a text repeat what it said before, and which are copied from the training text.

Pure functions of a text; for the eye only. The numbers of a report come from `generation.measures`, over
tokens; here a repetition is one of four *words*, since words are what a reader sees.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

_WORD = re.compile(r"\w+|[^\w\s]")
_WORDS_IN_A_REPEAT = 4


class Piece(NamedTuple):
    """A stretch of text, and whether it repeats an earlier stretch or lies in the longest copied run."""

    text: str
    repeats: bool
    copied: bool


def repeated(text: str) -> list[tuple[int, int]]:
    """Character ranges of the 4-grams of words that stood in `text` before, merged and in order."""
    words = [(match.group(), match.start(), match.end()) for match in _WORD.finditer(text)]
    seen: set[tuple[str, ...]] = set()
    ranges: list[tuple[int, int]] = []
    for i in range(len(words) - _WORDS_IN_A_REPEAT + 1):
        gram = tuple(word for word, _, _ in words[i : i + _WORDS_IN_A_REPEAT])
        start, end = words[i][1], words[i + _WORDS_IN_A_REPEAT - 1][2]
        if gram not in seen:
            seen.add(gram)
        elif ranges and start <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((start, end))
    return ranges


_BLANK_LINES = re.compile(r"\n{4,}")


def without_blanks(text: str) -> str:
    """Write a run of four or more line ends as their number, so that blank lines take no page: ``⏎×7``."""
    return _BLANK_LINES.sub(lambda run: f"⏎×{len(run.group())}\n", text)


def marked(text: str, copied: tuple[int, int] = (0, 0)) -> list[Piece]:
    """Cut `text` where a mark begins or ends; the pieces joined are `text` again.

    Parameters
    ----------
    text
        Any text.
    copied
        Characters [start, end) of the longest copied run; empty where nothing is to be marked.
    """
    repeats = repeated(text)
    cuts = sorted({0, len(text), *(c for c in copied if 0 < c < len(text)), *(c for r in repeats for c in r)})
    return [
        Piece(text[a:b], any(s <= a < e for s, e in repeats), copied[0] <= a < copied[1])
        for a, b in pairwise(cuts)
    ]
