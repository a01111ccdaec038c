"""`twodice conformance`: does a sampler, ours or foreign, draw from the distribution that it claims?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from twodice.sampling.conformance.verdict import Judged, Verdict


def _names(given: list[str] | None) -> list[str] | None:
    return None if given is None else [name for text in given for name in text.split(",") if name]


def _line(one: Judged) -> str:
    from twodice.sampling.conformance.words import p_value

    mark = "rejected" if one.rejected else "ok"
    cell = one.cell
    return f"  {mark:<9}{cell.part}: {cell.found} (p {p_value(one.adjusted)}; would have found {one.catches})"


def _tell(verdict: Verdict, all_cells: bool) -> None:
    from twodice.sampling.conformance.words import answer, p_value, summary

    print(answer(verdict))
    for line in summary(verdict):
        count = f"{line.cells} cell{'s' if line.cells > 1 else ''}"
        state = f"{line.rejected} rejected" if line.rejected else "ok"
        print(f"{line.kind:<13}{count:<10}p {p_value(line.least):<9}{state}")
        for one in verdict.judged:
            if one.cell.kind == line.kind and (one.rejected or all_cells):
                print(_line(one))
    for part, why in verdict.not_offered:
        print(f"{part}: not offered, {why}")
    print(f"a right sampler is rejected with probability at most {verdict.alpha:g}")


def conformance(
    sampler: Annotated[
        str,
        typer.Option(metavar="MODULE:FUNCTION", help="what draws; also twodice or transformers"),
    ] = "twodice",
    rows: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help="only these rows and checks; a wrong name lists them all"),
    ] = None,
    draws: Annotated[
        int, typer.Option(metavar="N", help="draws of an ordinary row; at least 2000")
    ] = 100_000,
    ties: Annotated[
        str, typer.Option(help="equal logits at the cut of top-k: lower-id (stays) or kept (all are)")
    ] = "lower-id",
    crossing: Annotated[str, typer.Option(help="the token that crosses top-p: kept or dropped")] = "kept",
    temperature: Annotated[
        str, typer.Option(help="first (before the filters) or last (behind them)")
    ] = "first",
    offers: Annotated[
        str | None,
        typer.Option(metavar="WHAT", help="seeds, coupled, both with a comma, or none [default: as it says]"),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write a page with every cell")] = None,
    all_cells: Annotated[
        bool, typer.Option("--cells", help="print every cell, not only the rejected")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Judge a sampler by exact tests. Exit code 0: as it claims; 1: rejected; 2: it could not be judged."""
    from twodice.cli.console import EXIT_FAILED, EXIT_USAGE, Progress, notice, print_json
    from twodice.errors import DataError
    from twodice.sampling.conformance.claims import Rules
    from twodice.sampling.conformance.sampler import load
    from twodice.sampling.conformance.verdict import judge

    if html is not None and (html.is_dir() or not html.resolve().parent.is_dir()):
        what = "which is a folder" if html.is_dir() else "whose folder does not exist"
        raise DataError(f"--html must name a file in a folder that exists; got {html}, {what}")
    rules = Rules.parse(ties=ties, crossing=crossing, temperature=temperature)
    offered = None if offers is None else [] if offers == "none" else offers.split(",")
    judged = load(sampler, offered)
    with Progress("conformance", 1_000) as progress:
        verdict = judge(
            judged,
            rows=_names(rows),
            draws=draws,
            rules=rules,
            progress=lambda share, part: progress.update(int(1_000 * share), part),
        )
    if as_json:
        print_json(verdict.as_dict())
    else:
        _tell(verdict, all_cells)
    if html is not None:  # last: a disk that is full takes no verdict away
        from twodice.sampling.conformance.page import page

        try:
            html.write_text(page(verdict), encoding="utf-8")
        except OSError as error:  # exit code 1 would say that the sampler is rejected
            raise DataError(
                f"--html must name a file that can be written; {html}: {error.strerror}"
            ) from None
        notice(f"wrote {html}")
    if verdict.rejected or not verdict.judged:
        raise typer.Exit(EXIT_FAILED if verdict.judged else EXIT_USAGE)
