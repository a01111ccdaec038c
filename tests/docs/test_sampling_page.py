"""The examples of the page on sampling are run; it knows every stage that a person may choose."""

from __future__ import annotations

from pathlib import Path

from tests.docs.test_contracts import failures

from twodice.sampling.profiles import SWITCH

TEXT = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text(encoding="utf-8")


def test_every_example_gives_what_it_says_and_a_wrong_one_would_be_found() -> None:
    assert "".join(failures(TEXT)) == ""
    assert failures(TEXT.replace("('top_p=0.9', 3, 0.956)", "('top_p=0.9', 3, 0.957)"))


def test_every_stage_is_spoken_of() -> None:
    assert [name for name in SWITCH.values() if name not in TEXT.lower()] == []
