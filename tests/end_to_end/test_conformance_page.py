"""The page of a verdict in a real browser: light and dark, on a telephone and on a desk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.end_to_end.test_report_browser import CONTRASTS
from tests.support.broken_samplers import ties_kept
from tests.support.browser import NARROW, WIDE, browser, opened

from twodice.sampling.conformance.page import page
from twodice.sampling.conformance.sampler import as_sampler
from twodice.sampling.conformance.verdict import judge


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with a tail, a rejection and something that is not offered."""
    sampler = as_sampler(ties_kept, "an_engine_with_a_long_name.sampling.<b>bold</b>:draw", offers=["seeds"])
    verdict = judge(sampler, rows=["top-k", "tie-at-k", "coupling"], draws=5_000)
    path = tmp_path_factory.mktemp("page") / "verdict.html"
    path.write_text(page(verdict), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_read_in_any_browser(running: Any, file: Path, scheme: str, width: int) -> None:
    with opened(running, file, scheme=scheme, width=width) as (shown, requests, complaints):
        assert requests == [] and complaints == []
        assert "does not draw as it claims: ties" in shown.inner_text("h1")
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        low = [found for found in shown.evaluate(CONTRASTS) if found[0] < 4.5]
        assert low == []
        assert shown.locator("tr.rejected").count() == 1 and shown.locator("svg circle").count() == 1
        # The verdict of each check is in view without scrolling a table sideways.
        box = shown.locator("tbody .bad").first.bounding_box()
        assert box["x"] + box["width"] <= width
        assert "not offered" in shown.inner_text("table >> nth=0")
