"""What the docstrings show is what happens, and the public dropout API says all that a user must know."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from typing import Any

import pytest

import twodice
import twodice.nn
from twodice.dropout.functional import dropout
from twodice.dropout.handle import Handle
from twodice.sampling.shards import merge_shards, shard_candidates

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(twodice.__path__, "twodice.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_say(name: str) -> None:
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


DRAWS = [
    twodice.attach, Handle.step, Handle.monte_carlo, dropout, twodice.dropout_add, twodice.attention,
    twodice.nn.Dropout, twodice.nn.DropoutAdd, twodice.r_drop_loss, twodice.DropoutCallback,
]  # fmt: skip


@pytest.mark.parametrize("public", DRAWS, ids=lambda public: public.__qualname__)
def test_what_takes_a_key_says_which_sections_it_must(public: Any) -> None:
    text = inspect.getdoc(public) or ""
    assert "*Randomness.*" in text
    assert [s for s in ("Parameters", "Raises", "Notes") if f"{s}\n{'-' * len(s)}" not in text] == []


def described(public: Any) -> list[str]:
    """The names that stand under Parameters."""
    text = inspect.getdoc(public) or ""
    parts = text.partition("Parameters\n----------\n")[2].partition("\n\n")[0]
    return [
        name.strip()
        for line in parts.splitlines()
        if line[:1].strip()
        for name in line.split(" : ")[0].split(",")
    ]


CHOOSES = [
    twodice.sample, twodice.verify, twodice.explain, twodice.translate, twodice.processor,
    twodice.SamplingParams, shard_candidates, merge_shards,
]  # fmt: skip


@pytest.mark.parametrize("public", CHOOSES, ids=lambda public: public.__qualname__)
def test_each_argument_of_sampling_is_described_once_and_no_other(public: Any) -> None:
    names = described(public)
    assert sorted(names) == sorted(inspect.signature(public).parameters)
    assert "Raises\n------" in (inspect.getdoc(public) or "")


@pytest.mark.parametrize("public", [*DRAWS, twodice.max_norm_, Handle.observe], ids=lambda p: p.__qualname__)
def test_every_argument_is_described(public: Any) -> None:
    names = described(public)
    wanted = [name for name in inspect.signature(public).parameters if name not in ("self", "state")]
    assert set(wanted) <= set(names), (names, wanted)
