"""The page: the same bytes from the same JSON without torch, everything escaped, words that follow the
verdicts."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.report_cases import (
    HOSTILE,
    changed,
    full_report,
    hostile_report,
    one_arm_one_seed,
    without_cross,
)

from twodice.errors import DataError
from twodice.study.answer import SO_FAR
from twodice.study.contrasts import dropout_contrasts
from twodice.study.cross_words import cross_sentence, cross_summary, is_clear
from twodice.study.effects import effects
from twodice.study.marks import marked, repeated
from twodice.study.report import (
    cross_rows,
    in_two,
    key_figures,
    render,
    style_sheet,
    write_report_html,
)
from twodice.study.schema import Report
from twodice.study.words import interval, listed, number, percent, signed

# A fresh interpreter in which torch, transformers and the native module cannot be imported, and with another
# hash seed.
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('torch', 'transformers', 'tokenizers', 'twodice._native'):
            raise ImportError(f'{name} is blocked')
sys.meta_path.insert(0, Blocked())
from pathlib import Path
from twodice.study.report import write_report_html
write_report_html(Path(sys.argv[1]))
assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def page() -> str:
    return render(full_report())


def test_same_json_gives_the_same_bytes_in_another_process_without_torch(tmp_path: Path, page: str) -> None:
    (tmp_path / "report.json").write_text(full_report().as_json(), encoding="utf-8")
    source = str(Path(__file__).parents[3] / "src")
    strange = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "Asia/Tokyo", "PYTHONPATH": source}
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", BLOCKED, str(tmp_path)],
            check=True,
            timeout=120,
            env={**strange, "PYTHONHASHSEED": seed, "HOME": str(tmp_path)},
        )
        assert (tmp_path / "report.html").read_bytes() == page.encode("utf-8")
        (tmp_path / "report.html").unlink()


def test_a_users_own_matplotlib_settings_change_nothing(page: str) -> None:
    import matplotlib

    with matplotlib.rc_context(
        {"font.size": 30, "axes.grid": True, "svg.fonttype": "path", "lines.linewidth": 9}
    ):
        assert render(full_report()) == page


def test_page_is_one_file_that_asks_for_nothing(page: str) -> None:
    assert "<script" not in page and "@import" not in page and "<link" not in page and "<img" not in page
    assert re.findall(r"url\((?!#)[^)]*\)", page) == []
    assert re.findall(r"""(?:src|href|action|data)=["'](?!#)[^"']*""", page) == []
    digest = base64.b64encode(hashlib.sha256(style_sheet().encode()).digest()).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert (
        policy.group(1).replace("&#39;", "'").startswith(f"default-src 'none'; style-src 'sha256-{digest}'")
    )
    assert "unsafe" not in policy.group(1) and " style=" not in page
    assert len(page) < 600_000


def test_ids_are_unique_and_every_link_has_its_goal(page: str) -> None:
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)
    assert set(" ".join(re.findall(r'aria-labelledby="([^"]*)"', page)).split()) <= set(ids)


def test_every_answer_verdict_and_command_is_said_as_it_was_found(page: str) -> None:
    import html

    report, text = full_report(), html.unescape(page)
    shown = re.search(r"<h1[^>]*>(.*)</h1>", text)
    assert shown is not None and re.sub(r"<[^>]*>", "", shown[1]) == report.answer
    for sentence in (
        *report.details,
        *report.how.notes,
        *report.how.commands.values(),
        *(s.words for s in report.sanity),
    ):
        assert sentence in text
    for arm in report.arms:
        assert arm.words in text and arm.words_at_end in text and arm.name in text
    assert (
        text.count('<span class="also">wins only at the end</span>')
        == sum(arm.only_at_end for arm in report.arms)
        == 1
    )
    assert report.how.case is not None and report.how.case in text
    assert "very roughly 5 more seeds would" in text


def test_hostile_names_and_texts_are_only_ever_text() -> None:
    page = render(hostile_report())
    assert not re.search(r"<(script|img|iframe|/title><script)", page, re.IGNORECASE)
    assert "&lt;script&gt;document.title=&#39;owned&#39;&lt;/script&gt;" in page
    assert page.count("{{ 7 * 7 }}{% raw %}") > 10  # nobody computes it
    assert page.count("</style>") == 1 and page.count("<body>") == 1
    tags = re.findall(r"<[a-zA-Z][^>]*>", page)
    assert [tag for tag in tags if re.search(r"\son\w+\s*=\s*[\"']", re.sub(r'"[^"]*"', '""', tag))] == []
    assert [arm.name for arm in hostile_report().arms] == list(HOSTILE)


@pytest.mark.parametrize("make", [without_cross, one_arm_one_seed])
def test_small_reports_make_a_page_without_holes(make: Any) -> None:
    page = render(make())
    assert "None" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert 'id="cross"' not in page and 'href="#cross"' not in page
    assert len(key_figures(make())) == 4


def test_the_answer_is_headed_by_what_it_says_and_loses_no_word() -> None:
    for lead in ("", SO_FAR):
        said, why = (
            f"{lead}On this text we cannot tell whether dropout helps: ",
            "arm 'a' 0.1 % better; more.",
        )
        assert in_two(said + why) == (said, why)
    assert in_two("Dropout helps.") == ("Dropout helps.", "")


def test_preliminary_and_untuned_studies_say_so() -> None:
    report = full_report()
    assert "<strong>Preliminary.</strong>" in render(changed(report, is_complete=False))
    quiet = changed(report, how=report.how.model_dump() | {"notes": []})
    assert "The learning rate was not tuned for each arm" in render(quiet)


def with_effect(training: tuple[float, float, float], generation: tuple[float, float, float]) -> Report:
    report = full_report()
    assert report.cross is not None
    found = [
        {"measure": "rep_4", "die": die, "mean": m, "low": low, "high": high}
        for die, (m, low, high) in (("training", training), ("generation", generation))
    ]
    return changed(report, cross=report.cross.model_dump() | {"effects": found})


def test_the_sentence_of_a_row_says_no_more_than_its_intervals() -> None:
    clear, unclear = (-0.5, -0.6, -0.4), (0.01, -0.1, 0.12)
    says = {
        (a, b): cross_sentence(with_effect(x, y), "rep_4", "share")
        for a, x in ((True, clear), (False, unclear))
        for b, y in ((True, clear), (False, unclear))
    }
    assert says[True, True].startswith("Both dice move it")
    assert says[False, True] == (
        "The generation die moves it: −50.0 points [−60.0, −40.0]. The training die is not shown to: "
        "+1.0 points [−10.0, +12.0]."
    )
    assert says[True, False].startswith("The training die moves it")
    assert says[False, False].startswith("Neither die is shown to move it")


def test_whether_one_die_replaces_the_other_goes_by_the_adjusted_intervals() -> None:
    clear, unclear = (-0.5, -0.6, -0.4), (-0.5, -1.1, 0.1)
    report = with_effect(unclear, clear)
    assert report.cross is not None

    def told(*loss: float) -> str:
        effect = {"measure": "validation_nats_per_token", "die": "training"}
        effect |= dict(zip(("mean", "low", "high"), loss, strict=True))  # type: ignore[arg-type]
        cross = report.cross.model_dump()  # type: ignore[union-attr]
        return cross_summary(changed(report, cross=cross | {"effects": [*cross["effects"], effect]}))

    assert told(*clear) == (
        "Neither die replaces the other here: only the training die is shown to move loss on unseen text, "
        "only the generation die repetition."
    )
    assert told(*unclear) == (
        "Only the generation die is shown to move repetition; the training die alone, nothing."
    )
    assert cross_summary(with_effect(unclear, unclear)) == ""
    assert cross_summary(report) in render(report)


def test_an_arm_that_differs_in_more_than_dropout_is_headed_so() -> None:
    report = full_report()
    assert report.cross is not None
    more = "with dropout and another optimizer.weight_decay"
    assert more in render(report)
    alone = changed(report, cross=report.cross.model_dump() | {"differs_in": []})
    assert more not in render(alone) and "with dropout <bdi" in render(alone)


def test_the_settings_that_an_unchanged_arm_is_said_to_have_stand_below_it(page: str) -> None:
    said = page.index("all dropout off, the settings of all arms, below")
    assert said < page.index('id="settings">The settings of all arms') < page.index("<dt>optimizer.lr</dt>")


def test_effects_are_paired_by_seed_and_those_of_the_model_have_one_die() -> None:
    report = full_report()
    assert report.cross is not None
    found = {(e.measure, e.die): e for e in effects(report.arms, report.sampling, report.cross)}
    arms = {arm.name: arm for arm in report.arms}
    a, b = (arms[n].at_best.validation_nats_per_token.values for n in ("neither", "both"))
    mean = sum(y - x for x, y in zip(a, b, strict=True)) / len(a)
    assert found["validation_nats_per_token", "training"].mean == pytest.approx(mean, abs=1e-12)
    assert ("validation_nats_per_token", "generation") not in found
    assert is_clear(found["rep_4", "generation"]) and found["rep_4", "generation"].mean < 0
    alone = report.cross.model_copy(update={"with_dropout": None})
    assert {e.die for e in effects(report.arms, report.sampling, alone)} == {"generation"}


def test_central_table_without_an_arm_with_dropout_has_two_corners() -> None:
    report = full_report()
    assert report.cross is not None
    shown = changed(report, cross=report.cross.model_dump() | {"with_dropout": None})
    assert {len(row.cells) for row in cross_rows(shown) if not row.spans} == {2}
    assert 'id="cross"' in render(shown)


def test_repeated_words_are_marked_from_their_second_time_on() -> None:
    text = "to be or not, to be or not to be"
    assert [(a, text[a:b]) for a, b in repeated(text)] == [(14, "to be or not")]
    text = "the name of the name of the name"
    assert [text[a:b] for a, b in repeated(text)] == ["the name of the name"]
    assert repeated("") == [] and repeated("one two three") == []


def test_pieces_joined_are_the_text_and_carry_both_marks() -> None:
    text = "a b c d\n  a b c d e"
    pieces = marked(text, (8, 14))
    assert "".join(piece.text for piece in pieces) == text
    assert any(p.repeats and p.copied for p in pieces) and any(p.copied and not p.repeats for p in pieces)
    assert marked("", (0, 0)) == []
    assert [p.text for p in marked("abc", (1, 99))] == ["a", "bc"]


def test_numbers_as_text() -> None:
    assert number(1.23456) == "1.235" and number(-0.0001) == "0.000" and number(None) == "–"
    assert signed(-0.5) == "−0.500" and signed(0.5) == "+0.500" and signed(0.0001) == "0.000"
    assert percent(-3.14) == "−3.1\u202f%" and number(0.1234, "share") == "12.3\u202f%"
    assert number(12345, "count") == "12,345" and number(7.25, "count") == "7.2"
    assert interval(0.022, 0.04, "share") == "[2.2, 4.0]" and interval(None, 1.0) == ""
    assert listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a, b and c" and listed([]) == ""


def test_a_report_that_is_missing_or_malformed_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"report\.json"):
        write_report_html(tmp_path)
    (tmp_path / "report.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="not the report of a study"):
        write_report_html(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json"]


def test_many_blank_lines_take_one_line_of_the_page() -> None:
    from twodice.study.marks import without_blanks

    assert without_blanks("a" + "\n" * 7 + "b") == "a⏎×7\nb"
    assert without_blanks("a\n\n\nb") == "a\n\n\nb"


def test_the_axis_is_said_to_be_cut_only_where_it_is() -> None:
    report = full_report()
    said = "the axis is cut to what follows the first fifth"
    assert said in render(report)
    flat = report.model_dump()
    for arm in flat["arms"]:
        for estimate in arm["curve"]["validation_nats_per_token"]:
            estimate.update(arm["curve"]["validation_nats_per_token"][-1])
    assert said not in render(type(report).model_validate(flat))


def test_the_page_shows_what_dropout_alone_does() -> None:
    report = full_report()
    contrasts = dropout_contrasts(report.arms, report.baseline)
    page = render(report.model_copy(update={"dropout_contrasts": contrasts}))
    assert "What dropout alone does" in page and "What dropout alone does" not in render(report)
    assert [(c.arm, c.against) for c in contrasts] == [("dropout", "neither"), ("both", "weight decay")]
    assert all(contrast.words in page for contrast in contrasts)
