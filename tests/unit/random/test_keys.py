"""Keys come from names, and only from names."""

from __future__ import annotations

import hashlib

import pytest

from twodice.errors import ConfigError
from twodice.random.keys import Key, key_bits


def test_a_root_key_is_its_seed() -> None:
    assert Key(7).value == 7
    assert Key(-1) == Key(2**64 - 1)
    assert key_bits(Key(7)) == key_bits(7) == 7


def test_a_child_is_the_written_hash() -> None:
    data = (7).to_bytes(8, "little")
    data += b"s" + (7).to_bytes(8, "little") + b"dropout" + b"i" + (2).to_bytes(8, "little") + b"-3"
    digest = hashlib.blake2b(data, digest_size=8).digest()
    assert Key(7).child("dropout", -3).value == int.from_bytes(digest, "little")


def test_type_length_order_and_grouping_of_names_matter() -> None:
    root = Key(0)
    children = [
        root.child("ab"), root.child("a", "b"), root.child("a").child("b"), root.child("b", "a"),
        root.child("1"), root.child(1), root.child(-1), root.child(""), root.child("", ""), root.child("ä"),
        Key(1).child("ab"),
    ]  # fmt: skip
    assert len({child.value for child in children}) == len(children)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.0, "7", True, None])
def test_a_seed_that_is_no_64_bit_integer_is_an_error(seed: object) -> None:
    with pytest.raises(ConfigError, match="seed must be"):
        Key(seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [(), (True,), (1.5,), (b"x",), (None,)])
def test_a_name_is_text_or_an_integer(names: tuple[object, ...]) -> None:
    with pytest.raises(ConfigError):
        Key(0).child(*names)  # type: ignore[arg-type]


def test_a_key_is_frozen_and_hashable() -> None:
    assert {Key(3): 1}[Key(3)] == 1
    with pytest.raises(AttributeError):
        Key(3).seed = 4  # type: ignore[misc]
