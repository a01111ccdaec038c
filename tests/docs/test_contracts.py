"""The contracts' examples are run, every rule has one, and the page on sampling knows every setting."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from twodice.kernels.sampling_settings import NEEDS
from twodice.sampling.fields import FIELDS

FOLDER = Path(__file__).parents[2] / "docs" / "contracts"
# Page, letter of its rules, number of its first rule, and a right value with a wrong one to put in its place.
PAGES = [
    ("randomness", "R", 1, "6627e8d5", "6627e8d6"),
    ("dropout", "D", 1, "0.375", "0.376"),
    ("sampling", "S", 0, "[1, 3, 0, 2]", "[1, 3, 2, 0]"),
    ("attention", "A", 1, "0.821", "0.822"),
    ("noise", "N", 1, "37f0357d", "37f0357e"),
]
OPTIONS = doctest.IGNORE_EXCEPTION_DETAIL | doctest.ELLIPSIS


def text_of(page: str) -> str:
    return (FOLDER / f"{page}.md").read_text(encoding="utf-8")


def failures(text: str) -> list[str]:
    """What the examples of a page give that the page does not say; blocks share their names."""
    names: dict[str, object] = {}
    parser, runner, found = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=OPTIONS), []
    for match in re.finditer(r"```python\n(.*?)```", text, re.S):
        test = parser.get_doctest(match[1], {}, "page", "page", text[: match.start()].count("\n") + 1)
        test.globs = names
        runner.run(test, out=found.append, clear_globs=False)
    return found


@pytest.mark.parametrize("page", [page for page, *_ in PAGES])
def test_every_example_gives_what_it_says(page: str) -> None:
    assert "".join(failures(text_of(page))) == ""


@pytest.mark.parametrize(("page", "right", "wrong"), [(page, r, w) for page, _, _, r, w in PAGES])
def test_a_wrong_example_would_be_found(page: str, right: str, wrong: str) -> None:
    assert failures(text_of(page).replace(right, wrong))


@pytest.mark.parametrize(("page", "letter", "first"), [(page, a, n) for page, a, n, _, _ in PAGES])
def test_every_rule_is_numbered_once_and_has_an_example(page: str, letter: str, first: int) -> None:
    rules = re.split(rf"^\*\*{letter}(?=\d+\.)", text_of(page), flags=re.M)[1:]
    numbers = [int(rule.split(".")[0]) for rule in rules]
    # The stages of sampling keep the numbers of the whole chain, of which some are not built yet.
    in_order = sorted(set(numbers)) if page == "sampling" else list(range(first, first + len(rules)))
    assert numbers == in_order and numbers[0] == first and len(rules) >= 10
    assert [rule.split(".")[0] for rule in rules if ">>>" not in rule] == []


def test_the_page_on_sampling_speaks_of_every_setting_and_every_field() -> None:
    text = text_of("sampling")
    words = text.lower().replace("-", "_").replace(" ", "_")
    assert [name for name in FIELDS if name.rstrip("s") not in words] == []
    assert [name for name in NEEDS if f"`{name}`" not in text] == []
