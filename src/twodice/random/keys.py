"""Keys: the 64 bits that name one stream of random decisions, derived from a seed by names.

This module knows neither Philox nor torch; it only turns (seed, names) into 64 bits on the host.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from twodice.errors import ConfigError

_LOW, _HIGH = -(2**63), 2**64


@dataclass(frozen=True, slots=True)
class Key:
    """64 bits that name a stream of random decisions.

    Parameters
    ----------
    seed : int
        Any integer in [-2^63, 2^64). A negative one means its two's complement, so ``Key(-1) == Key(2**64 -
        1)``, and the 64 bits of a root key are the seed itself.

    Raises
    ------
    ConfigError
        If the seed is not an integer or does not fit 64 bits.

    Examples
    --------
    >>> Key(7).value
    7
    >>> hex(Key(7).child("dropout", 3).value)
    '0xd2083097c573bc3c'
    """

    seed: int

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not hasattr(self.seed, "__index__"):
            raise ConfigError(f"a seed must be an integer; got {self.seed!r}")
        seed = self.seed.__index__()
        if not _LOW <= seed < _HIGH:
            raise ConfigError(f"a seed must be in [-2^63, 2^64); got {seed}; take it modulo 2**64")
        object.__setattr__(self, "seed", seed % _HIGH)

    @property
    def value(self) -> int:
        """The 64 bits, as an integer in [0, 2^64)."""
        return self.seed

    def child(self, *names: str | int) -> Key:
        """Return the key of the stream with these names under this one.

        Names, never counts: adding one stream moves no other. Each name enters with its type and its length,
        so ``child("ab") != child("a", "b")`` and ``child(1) != child("1")``.

        Parameters
        ----------
        *names : str or int
            At least one name. All of them enter one hash: ``child("a", "b")`` is not
            ``child("a").child("b")``.

        Returns
        -------
        Key
            BLAKE2b with 8 bytes of digest over the parent's 8 bytes and the names, read little-endian.

        Raises
        ------
        ConfigError
            If there is no name, or one is neither text nor an integer.
        """
        return Key(Key.children(*names)(self.seed))

    @staticmethod
    def children(*names: str | int) -> Callable[[int], int]:
        """Return the function from a parent's 64 bits to those of its child with these names.

        For many parents: the names are read once. ``Key.children("a")(7) == Key(7).child("a").value``.
        """
        told = spelled(*names)

        def child(parent: int) -> int:
            digest = hashlib.blake2b(parent.to_bytes(8, "little") + told, digest_size=8).digest()
            return int.from_bytes(digest, "little")

        return child

    def __repr__(self) -> str:
        return f"Key({self.seed:#x})"


def spelled(*names: str | int) -> bytes:
    """Return what follows the parent's 8 bytes in the hash of a child: each name with type and length."""
    if not names:
        raise ConfigError("a child key needs at least one name; got none")
    told = b""
    for name in names:
        if isinstance(name, str):
            kind, data = b"s", name.encode("utf-8")
        elif isinstance(name, int) and not isinstance(name, bool):
            kind, data = b"i", str(name).encode("ascii")
        else:
            raise ConfigError(f"the name of a key must be text or an integer; got {name!r}")
        told += kind + len(data).to_bytes(8, "little") + data
    return told


def key_bits(key: Key | int) -> int:
    """Return the 64 bits of a `Key`, or of an integer that stands for ``Key(integer)``."""
    return key.seed if isinstance(key, Key) else Key(key).seed
