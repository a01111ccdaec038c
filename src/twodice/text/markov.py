"""A small Markov source whose entropy rate is known exactly, so that a loss can be held against the truth.

Each symbol is one byte. Probabilities are multiples of 1/256, so that a uniform byte and a table draw from
them without rounding, and the entropy rate is that of what is really drawn. This module knows nothing of
files and tokens.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twodice.errors import ConfigError, nearest
from twodice.random.keys import Key
from twodice.random.philox import philox4x32
from twodice.text.documents import Corpus, Document

ALPHABET = string.ascii_lowercase + string.ascii_uppercase + string.digits + ".,"
SMALLEST, LARGEST = 2, len(ALPHABET)
_PARTS = 256


@dataclass(frozen=True)
class MarkovSource:
    """Options of the source ``markov:symbols=16,bytes=1000000,seed=0,order=2``.

    Attributes
    ----------
    symbols : int
        Size of the alphabet, in [2, 64].
    num_bytes : int
        Length of the text, at least 1.
    seed : int
        Seed of table and text.
    order : int
        Symbols that the next one depends on, 1 or 2.
    """

    symbols: int = 16
    num_bytes: int = 1_000_000
    seed: int = 0
    order: int = 2

    def __post_init__(self) -> None:
        for name, low, high in (("symbols", SMALLEST, LARGEST), ("num_bytes", 1, 2**34), ("order", 1, 2)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(
                    f"{name.removeprefix('num_')} of markov must be in [{low}, {high}]; got {value}"
                )

    @classmethod
    def parse(cls, text: str) -> MarkovSource:
        """Read ``markov`` or ``markov:key=value,...``."""
        settings: dict[str, int] = {}
        options = ("symbols", "bytes", "seed", "order")
        for item in text.partition(":")[2].split(",") if ":" in text else []:
            name, equals, value = (piece.strip() for piece in item.partition("="))
            if name not in options:
                raise ConfigError(
                    f"markov takes {', '.join(options)}; got {name!r}{nearest(name, options)}; "
                    "write markov:symbols=16,bytes=1000000,seed=0,order=2"
                )
            if name in settings:
                raise ConfigError(f"markov takes each option once; {name} came twice in {text!r}")
            try:
                settings[name] = int(value.replace("_", ""))
            except ValueError as error:
                raise ConfigError(
                    f"{name} of markov must be an integer; got {equals + value!r} in {text!r}"
                ) from error
        return cls(**{"num_bytes" if name == "bytes" else name: value for name, value in settings.items()})

    def counts(self) -> npt.NDArray[np.int64]:
        """256 times the probability of each symbol after each state: ``(symbols ** order, symbols)``.

        Rows sum to 256. Every entry is at least 1, so every text is possible and the chain has one stationary
        distribution.
        """
        states = self.symbols**self.order
        noise = _words(Key(self.seed).child("markov", "table"), states * self.symbols).reshape(
            states, self.symbols
        )
        # The cube makes a few continuations likely and most of them rare, as in a language.
        weights = (noise >> 16).astype(np.float64) ** 3 + 1e-6
        spare = _PARTS - self.symbols
        exact = weights / weights.sum(axis=1, keepdims=True) * spare
        counts = np.floor(exact).astype(np.int64)
        missing = spare - counts.sum(axis=1)
        order = np.argsort(-(exact - counts), axis=1, kind="stable")
        ranks = np.argsort(order, axis=1, kind="stable")
        return np.asarray(1 + counts + (ranks < missing[:, None]), dtype=np.int64)

    def entropy_nats(self) -> float:
        """Entropy rate in nats a symbol (a byte): entropy of each row, by the stationary shares."""
        probabilities = self.counts().astype(np.float64) / _PARTS
        states = len(probabilities)
        stationary = np.full(states, 1 / states)
        following = (np.arange(states)[:, None] * self.symbols + np.arange(self.symbols)) % states
        for _ in range(10_000):
            flow = (stationary[:, None] * probabilities).ravel()
            new = np.bincount(following.ravel(), weights=flow, minlength=states).astype(np.float64)
            new = new / new.sum()
            if np.abs(new - stationary).sum() < 1e-15:
                break
            stationary = new
        return float(-(stationary[:, None] * probabilities * np.log(probabilities)).sum())

    def draw(self) -> bytes:
        """The text: a function of the options alone.

        *Randomness.* Symbol i reads byte i of the Philox stream of ``Key(seed).child("markov", "text")``.
        """
        counts = self.counts()
        states = len(counts)
        symbols = np.repeat(np.tile(np.arange(self.symbols), states), counts.ravel())
        table: list[int] = symbols.tolist()
        out = bytearray(self.num_bytes)
        letters = ALPHABET.encode("ascii")
        key, symbols_there = Key(self.seed).child("markov", "text"), self.symbols
        state, place, stretch = 0, 0, 1 << 20
        for start in range(0, self.num_bytes, stretch):
            length = min(stretch, self.num_bytes - start)
            noise = _words(key, -(-length // 4), start // 4).astype("<u4").view(np.uint8)[:length]
            for byte in noise.tolist():
                symbol = table[state * _PARTS + byte]
                out[place] = letters[symbol]
                place += 1
                state = (state * symbols_there + symbol) % states
        return bytes(out)

    def corpus(self, source: str = "markov") -> Corpus:
        """One document with the drawn text, its entropy beside it."""
        document = Document(source, self.draw())
        return Corpus((document,), (source,), entropy_nats_per_byte=self.entropy_nats())


def _words(key: Key, count: int, first: int = 0) -> npt.NDArray[np.uint64]:
    """32-bit Philox words `first` to ``first + count`` of `key`; `first` is a multiple of 4."""
    index = np.arange(first // 4, first // 4 + -(-count // 4), dtype=np.uint64)
    zero = index & np.uint64(0)
    words = philox4x32(index & np.uint64(0xFFFFFFFF), index >> np.uint64(32), zero, zero, key.value)
    return np.stack([np.asarray(word, dtype=np.uint64) for word in words], axis=1).reshape(-1)[:count]
