"""The report in a real browser: light and dark, on a telephone and on a desk, with hostile names, and on
paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.browser import NARROW, WIDE, browser, opened
from tests.support.report_cases import full_report, hostile_report, one_arm_one_seed, without_cross

from twodice.study.report import write_report_html
from twodice.study.schema import Report

CASES = {"full": full_report, "hostile": hostile_report, "bare": without_cross, "smallest": one_arm_one_seed}
MODES = [(scheme, width) for scheme in ("light", "dark") for width in (NARROW, WIDE)]


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, make in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "report.json").write_text(make().as_json(), encoding="utf-8")
        made[name] = write_report_html(folder)
    return made


# Relative luminance and contrast as WCAG 2.2 defines them. Every text that is seen is held against the
# nearest opaque background behind it; texts in pictures by their fill.
CONTRASTS = """() => {
  const channel = v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !e.getClientRects().length) continue;
    if (['title', 'desc'].includes(e.tagName)) continue;
    const style = getComputedStyle(e);
    const own = parse(e.tagName === 'text' ? style.fill : style.color), back = behind(e);
    const [a, b] = [light(own), light(back)].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), walker.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
}"""

# Texts of one picture whose boxes meet by more than a hair.
OVERLAPS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll('svg.chart')) {
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([a, r], i) => texts.slice(i + 1).forEach(([b, s]) => {
      const w = Math.min(r.right, s.right) - Math.max(r.left, s.left);
      const h = Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top);
      if (w > 1 && h > 0.35 * Math.min(r.height, s.height)) found.push([svg.id, a, b]);
    }));
  }
  return found;
}"""

# Texts of a picture that stick out of the frame around it.
CLIPPED = """() => {
  const found = [];
  for (const figure of document.querySelectorAll('figure')) {
    const frame = figure.getBoundingClientRect();
    for (const text of figure.querySelectorAll('svg.chart text')) {
      const box = text.getBoundingClientRect();
      if (box.left < frame.left - 1 || box.right > frame.right + 1) found.push(text.textContent);
    }
  }
  return found;
}"""


@pytest.mark.parametrize(("scheme", "width"), MODES)
def test_page_is_whole_quiet_and_legible(
    running: Any, files: dict[str, Path], scheme: str, width: int
) -> None:
    report: Report = full_report()
    with opened(running, files["full"], scheme=scheme, width=width) as (page, requests, complaints):
        assert requests == [] and complaints == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.inner_text("h1") == report.answer
        text = page.inner_text("body")
        for arm in report.arms:
            assert arm.name in text and arm.words in text and arm.words_at_end in text
        assert "wins only at the end" in text
        assert page.locator("svg.chart").count() == 1 + 4 + 2 + 2 + 6 + 2
        low = [(ratio, words) for ratio, words in page.evaluate(CONTRASTS) if ratio < 4.5]
        assert low == []
        assert page.evaluate(CLIPPED) == []
        assert page.evaluate(OVERLAPS) == []
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == {
            "light": "rgb(247, 248, 250)", "dark": "rgb(15, 18, 23)"
        }[scheme]  # fmt: skip


def test_smallest_letters_on_a_telephone_can_be_read(running: Any, files: dict[str, Path]) -> None:
    with opened(running, files["full"], width=NARROW) as (page, _, _):
        heights = page.evaluate(
            "[...document.querySelectorAll('svg.chart text')].map("
            "t => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a)"
        )
        assert min(heights) >= 8.5


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("case", ["hostile", "bare", "smallest"])
def test_odd_reports_do_not_break_the_page(
    running: Any, files: dict[str, Path], case: str, width: int
) -> None:
    with opened(running, files[case], width=width) as (page, requests, complaints):
        assert requests == [] and complaints == []
        assert page.title() != "owned"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("script, img, iframe, object, link, [onerror]").count() == 0
        assert page.locator("footer").count() == 1 and page.locator("main > section").count() >= 5


def test_policy_stops_what_should_ever_get_in(running: Any, tmp_path: Path, files: dict[str, Path]) -> None:
    # The saboteur: the same page with a script, a foreign style and a picture from outside put into it.
    page_text = files["full"].read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    payload = "<script>document.title='owned'</script><style>h1{display:none}</style><img src=https://attacker.invalid/x>"
    broken.write_text(page_text.replace("<main>", f"<main>{payload}"), encoding="utf-8")
    with opened(running, broken) as (page, _, complaints):
        assert page.title() != "owned" and page.locator("h1").is_visible()
        assert len(complaints) == 3 and all("Content Security Policy" in c for c in complaints)


def test_marks_lie_where_their_numbers_say(running: Any, files: dict[str, Path]) -> None:
    # Held against the browser's own layout: places of the means in the forest plot are a straight line of the
    # values.
    report = full_report()
    with opened(running, files["full"]) as (page, _, _):
        places = page.evaluate(
            "[...document.querySelectorAll('#forest-best [data-mean]')].map(g => [Number(g.dataset.mean),"
            " (b => b.left + b.width / 2)(g.getBoundingClientRect())])"
        )
    expected = [a.at_best.difference.mean for a in report.arms if a.at_best.difference is not None]
    assert [value for value, _ in places] == expected
    (v0, x0), (v1, x1), (v2, x2) = places
    assert abs((x1 - x0) * (v2 - v0) - (x2 - x0) * (v1 - v0)) < 0.5 * abs(v2 - v0)


def test_paper_is_white_in_a_dark_room(running: Any, files: dict[str, Path]) -> None:
    with opened(running, files["full"], scheme="dark") as (page, _, _):
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
