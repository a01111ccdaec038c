"""``best/``: the best model of a study, copied whole or not at all. Knows neither arms nor records."""

from __future__ import annotations

import shutil
from pathlib import Path

BEST = "best"


def put_best(out: Path, model: Path) -> None:
    """Make ``best/`` in `out` a copy of the folder `model`.

    A stop at any moment leaves the old copy or the new one, under its name or beside it, where `take_back`
    finds it.
    """
    side, old, target = out / f".{BEST}.new", out / f".{BEST}.old", out / BEST
    take_back(out)
    shutil.rmtree(side, ignore_errors=True)
    shutil.copytree(model, side)
    if target.exists():
        target.rename(old)
    side.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def take_back(out: Path) -> None:
    """Undo what `put_best` left half done: the old copy gets its name back where no new one has it."""
    old, target = out / f".{BEST}.old", out / BEST
    if not old.exists():
        return
    if target.exists():
        shutil.rmtree(old)  # the new copy was in its place; only the old one was still to be removed
    else:
        old.rename(target)
