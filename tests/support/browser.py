"""A real headless browser, offline, for the pages that twodice makes. Its absence is a counted skip, unless
required."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
NARROW, WIDE = 390, 1280


class Page(NamedTuple):
    """An opened page, what it asked the network for (itself apart), and what it complained about."""

    page: Any
    requests: list[str]
    complaints: list[str]


def executable() -> str:
    """Path of the browser; skips the test where there is none."""
    found = shutil.which("chromium")
    try:
        import playwright  # noqa: F401
    except ImportError:
        found = None
    if found is None:
        if "browser" in os.environ.get("TWODICE_REQUIRE", "").split(","):
            pytest.fail("TWODICE_REQUIRE names a browser; chromium and playwright must both be there")
        pytest.skip("no chromium or no playwright")
    return found


@contextmanager
def browser() -> Iterator[Any]:
    """A running browser, ended with the block."""
    path = executable()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield running
        finally:
            running.close()


@contextmanager
def opened(running: Any, file: Path, *, scheme: str = "light", width: int = WIDE) -> Iterator[Page]:
    """`file` opened with the network off, in a colour scheme and at a width in CSS pixels."""
    context = running.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True)
    page = context.new_page()
    address = file.resolve().as_uri()
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url) if request.url != address else None)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    try:
        page.goto(address)
        yield Page(page, requests, complaints)
    finally:
        context.close()
