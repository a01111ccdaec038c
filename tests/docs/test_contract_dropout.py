"""The contract's examples are run, and every rule has one."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "contracts" / "dropout.md"
OPTIONS = doctest.ELLIPSIS


def blocks(text: str) -> list[tuple[int, str]]:
    """Line number and text of every fenced Python block."""
    return [
        (text[: m.start()].count("\n") + 1, m[1]) for m in re.finditer(r"```python\n(.*?)```", text, re.S)
    ]


def failures(text: str) -> list[str]:
    """What the examples of a page give that the page does not say; the blocks share their names, as a reader
    does.
    """
    names: dict[str, object] = {}
    parser, runner, found = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=OPTIONS), []
    for line, code in blocks(text):
        test = parser.get_doctest(code, {}, PAGE.name, PAGE.name, line)
        test.globs = names
        runner.run(test, out=found.append, clear_globs=False)
    return found


def test_every_example_gives_what_it_says() -> None:
    assert "".join(failures(PAGE.read_text(encoding="utf-8"))) == ""


def test_a_wrong_example_would_be_found() -> None:
    text = PAGE.read_text(encoding="utf-8").replace("0.375", "0.376")
    assert failures(text)


def test_every_rule_is_numbered_once_and_has_an_example() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rules = re.split(r"^\*\*D(?=\d+\.)", text, flags=re.M)[1:]
    assert [int(rule.split(".")[0]) for rule in rules] == list(range(1, len(rules) + 1))
    assert [rule.split(".")[0] for rule in rules if ">>>" not in rule] == []
