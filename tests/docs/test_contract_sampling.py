"""The examples of the sampling contract are run, every rule has one, and the page knows every setting."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

from twodice.kernels.sampling import NEEDS
from twodice.sampling.params import FIELDS

PAGE = Path(__file__).parents[2] / "docs" / "contracts" / "sampling.md"
TEXT = PAGE.read_text(encoding="utf-8")


def failures(text: str) -> list[str]:
    """What the examples give that the page does not say; blocks share their names."""
    names: dict[str, object] = {}
    parser, runner, found = doctest.DocTestParser(), doctest.DocTestRunner(), []
    for match in re.finditer(r"```python\n(.*?)```", text, re.S):
        test = parser.get_doctest(match[1], {}, PAGE.name, PAGE.name, text[: match.start()].count("\n") + 1)
        test.globs = names
        runner.run(test, out=found.append, clear_globs=False)
    return found


def test_every_example_gives_what_it_says() -> None:
    assert "".join(failures(TEXT)) == ""


def test_a_wrong_example_would_be_found() -> None:
    assert failures(TEXT.replace("[1, 3, 0, 2]", "[1, 3, 2, 0]"))


def test_every_rule_has_a_number_of_its_own_in_order_and_an_example() -> None:
    rules = re.split(r"^\*\*S(?=\d+\.)", TEXT, flags=re.M)[1:]
    numbers = [int(rule.split(".")[0]) for rule in rules]
    assert numbers == sorted(set(numbers)) and len(numbers) >= 11
    assert [rule.split(".")[0] for rule in rules if ">>>" not in rule] == []


def test_the_page_speaks_of_every_setting_and_every_field() -> None:
    words = TEXT.lower().replace("-", "_").replace(" ", "_")
    assert [name for name in FIELDS if name.rstrip("s") not in words] == []
    assert [name for name in NEEDS if f"`{name}`" not in TEXT] == []
