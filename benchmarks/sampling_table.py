"""The figures of ``python -m benchmarks.sampling --json FILE`` as the tables of RESULTS.md.

``python -m benchmarks.sampling_table FILE`` prints, for each vocabulary, number of rows and type, the median
of the max pass and our time as multiples of it over the shapes; then how many lines hold each target; then
the range of each peer, what penalties cost, and the lines that miss.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from typing import Any

SETTINGS = ("none", "top-k", "top-p", "min-p", "top-k + top-p", "mixed by row")


def span(values: Iterable[float]) -> str:
    """The least and the greatest of some numbers."""
    found = list(values)
    return f"{min(found):.1f} to {max(found):.1f}" if found else ""


def multiples(lines: list[dict[str, Any]]) -> None:
    """Our time as multiples of the max pass."""
    head = "".join(f"{name:>15}" for name in SETTINGS)
    print(f"vocabulary  rows dtype        max us{head}")
    for threads in sorted({x["threads"] for x in lines}):
        print(f"{threads} thread{'s' * (threads > 1)}")
        own = [x for x in lines if x["threads"] == threads]
        for v, rows, dtype in dict.fromkeys((x["vocabulary"], x["rows"], x["dtype"]) for x in own):
            cell = [x for x in own if (x["vocabulary"], x["rows"], x["dtype"]) == (v, rows, dtype)]
            limit = statistics.median(x["us"]["max"] for x in cell)
            spans = (
                span(x["us"]["ours"] / x["us"]["max"] for x in cell if x["setting"] == s) for s in SETTINGS
            )
            print(f"{v:>10} {rows:>5} {dtype:<8} {limit:>9.1f}" + "".join(f"{one:>15}" for one in spans))


def held(lines: list[dict[str, Any]]) -> None:
    """How many lines hold each target."""
    vocabularies = sorted({x["vocabulary"] for x in lines})
    print(f"{'held, of':<28}" + "".join(f"{v:>14}" for v in (*vocabularies, "all")))
    for target in dict.fromkeys(name for x in lines for name in x["targets"]):
        row = f"{target:<28}"
        for own in (*([x for x in lines if x["vocabulary"] == v] for v in vocabularies), lines):
            found = [x["targets"][target] for x in own if target in x["targets"]]
            row += f"{f'{sum(found)} of {len(found)}' if found else '':>14}"
        print(row)


def others(lines: list[dict[str, Any]]) -> None:
    """What stands in no table: peers, penalties, what misses."""
    for peer in ("llama.cpp", "torch.topk", "NumPy", "vLLM's rules", "transformers"):
        if found := [x["us"][peer] / x["us"]["ours"] for x in lines if peer in x["us"]]:
            print(f"{peer}: {span(found)} times our time, {len(found)} lines")
    for threads in (1, 2):
        found = [
            ((x["us"]["penalties"] - x["us"]["ours"]) / x["rows"], x["us"]["max"] / x["rows"])
            for x in lines
            if "penalties" in x["us"] and x["threads"] == threads
        ]
        if found:
            added, passes = [us for us, _ in found], [us / limit for us, limit in found]
            middle = statistics.median(added)
            print(
                f"penalties, {threads} threads: {span(added)} us a row ({middle:.1f}), {span(passes)} passes"
            )
    for x in lines:
        missed = [name for name in x["targets"] if not x["targets"][name] and "seeded" not in name]
        if missed:
            ours, limit = x["us"]["ours"], x["us"]["max"]
            of = f", transformers {x['us']['transformers'] / ours:.0f}" if "transformers" in x["us"] else ""
            print(
                f"{x['rows']:>3} x {x['vocabulary']:<6} {x['dtype']:<8} {x['kind']:<9} {x['threads']}t "
                f"{x['setting']:<13} {ours:9.1f} us, {ours / limit:.1f} max{of}: {'; '.join(missed)}"
            )


def main() -> None:
    """Print the tables of one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    with open(parser.parse_args().file, encoding="utf-8") as file:
        lines = json.load(file)["lines"]
    multiples(lines)
    held(lines)
    others(lines)


if __name__ == "__main__":
    main()
