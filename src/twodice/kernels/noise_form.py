"""The forms of noise that a plan and a function can name, and their text. Knows no torch.

``unit`` draws for every unit; ``feature`` locks the draw over positions; ``block(N)`` draws once for N
neighbouring columns; ``gaussian`` multiplies by a normal number instead of dropping. Words are joined with
``+``: ``feature+gaussian``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from twodice.errors import ConfigError, nearest

_BLOCK = re.compile(r"block\s*\(\s*(\d+)\s*\)")
WORDS = ("unit", "feature", "block(N)", "gaussian")
_COLUMNS = 1 << 23


@dataclass(frozen=True)
class Noise:
    """What is drawn at a site, and for what one draw counts.

    Parameters
    ----------
    form : {"bernoulli", "gaussian"}
        ``bernoulli`` drops a unit with probability p and scales the others by 1 / (1 - p); ``gaussian``
        multiplies by a normal number of mean 1 and variance p / (1 - p), which has the same first two moments
        (Srivastava et al. 2014, section 10).
    locked : bool
        Whether all positions of an example share the draw (variational dropout, Gal and Ghahramani 2016): the
        position of every decision is 0.
    block : int
        So many neighbouring columns share a draw: the column of a decision is ``column // block``. 1 is
        neutral.
    """

    form: Literal["bernoulli", "gaussian"] = "bernoulli"
    locked: bool = False
    block: int = 1

    def __post_init__(self) -> None:
        if self.form not in ("bernoulli", "gaussian"):
            raise ConfigError(f"the form of noise must be bernoulli or gaussian; got {self.form!r}")
        if isinstance(self.block, bool) or not isinstance(self.block, int) or not 1 <= self.block <= _COLUMNS:
            raise ConfigError(f"a block must have 1 to {_COLUMNS} columns; got {self.block!r}")

    @classmethod
    def parse(cls, text: str | Noise) -> Noise:
        """Return the noise that a text names.

        Raises
        ------
        ConfigError
            An unknown word (the nearest is said), or one that stands twice.
        """
        if isinstance(text, Noise):
            return text
        seen: set[str] = set()
        form: Literal["bernoulli", "gaussian"] = "bernoulli"
        locked, block = False, 1
        for word in (part.strip() for part in text.split("+")):
            name = word.partition("(")[0].strip()
            if name in seen:
                raise ConfigError(f"a noise names each word once; got {text!r}")
            seen.add(name)
            if word == "unit":
                continue
            if word == "feature":
                locked = True
            elif word == "gaussian":
                form = "gaussian"
            elif (match := _BLOCK.fullmatch(word)) is not None:
                block = int(match[1])
            else:
                raise ConfigError(
                    f"a noise must be made of {', '.join(WORDS)}, joined with '+'; got {word!r}"
                    f"{nearest(word, WORDS)}"
                )
        return cls(form, locked, block)

    def __str__(self) -> str:
        words = ["feature"] * self.locked + [f"block({self.block})"] * (self.block > 1)
        return "+".join([*words, *(["gaussian"] if self.form == "gaussian" else [])]) or "unit"


UNIT = Noise()
