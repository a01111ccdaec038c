"""The page on other engines: what it shows is what comes out, and it names every profile."""

from __future__ import annotations

import doctest
from pathlib import Path

from twodice.sampling import translate
from twodice.sampling.profiles import PROFILES

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"


def test_what_the_page_and_translate_show_comes_out() -> None:
    text = PAGE.read_text("utf-8")
    shown = doctest.DocTestParser().get_doctest(text.replace("```", ""), {}, "engines", str(PAGE), 0)
    assert len(shown.examples) >= 6
    assert doctest.DocTestRunner().run(shown).failed == 0
    assert doctest.testmod(translate) == (0, 2)


def test_the_page_speaks_of_every_profile() -> None:
    assert all(f"**{name}**" in PAGE.read_text("utf-8") for name in PROFILES)
