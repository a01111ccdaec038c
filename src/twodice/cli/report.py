"""`twodice report`: a study's report made again from its records, on any machine, with or without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study, with its records.jsonl.")],
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document.")] = False,
) -> None:
    """Make report.json and report.html of a study again from its records, byte for byte (needs no torch)."""
    from twodice.cli.console import notice
    from twodice.study.report import write_report_html
    from twodice.study.summary import write_summary

    told = write_summary(folder)
    page = write_report_html(folder)
    if json:
        print(told.as_json(), end="")
    else:
        print(told.answer)
        print(page)
    if open_page:
        import webbrowser

        if not webbrowser.open(page.resolve().as_uri()):
            notice(f"no browser to open; the page is {page}")
