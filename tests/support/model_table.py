"""The table of models in the docs, made from the sites that are found in the zoo.

``python -m tests.support.model_table`` renews it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.support.model_zoo import ZOO
from twodice.dropout.places import ORDER, Inventory
from twodice.dropout.sites import find

FILE = Path(__file__).parents[2] / "docs" / "models.md"
COMMAND = "python -m tests.support.model_table"

HEAD = """# Which model has which sites

Every model below is made from a tiny config, without weights, and searched for sites: the numbers count what
is found in it. Stacks have two layers (decoders of BART, Marian, Whisper and `nn.Transformer` one). An empty
cell means that the architecture has no such tensor, or that it cannot be reached from outside: the second
table says why. What each kind is stands in [contracts/dropout.md](contracts/dropout.md). A model that is not
listed is matched by the names and the structure of its blocks; `twodice audit` says what was found in it and
what could not be decided.

This file is made by `{command}`; a test fails where it differs.

"""


def _cells(found: Inventory) -> list[str]:
    counts = Counter(place.kind for place in found.places)
    return [str(counts[kind]) if counts[kind] else "" for kind in ORDER]


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows]
    lines.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
    return "\n".join(line.rstrip() for line in lines)


def models_table() -> str:
    """Return the text of the page."""
    rows, reasons = [["model", *ORDER]], [["model", "what could not be decided, or is left out"]]
    for name, make in ZOO.items():
        found = find(make()[0])
        rows.append([name, *_cells(found)])
        for why in dict.fromkeys(why for _, why in found.undecided):
            reasons.append([name, why.replace("|", "/")])
    return f"{HEAD.format(command=COMMAND)}{_table(rows)}\n\n{_table(reasons)}\n"


if __name__ == "__main__":
    FILE.write_text(models_table(), encoding="utf-8")
