"""docs/training.md says what is so: its table is that of the settings, and its example runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from twodice.training.config import setting_names

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_table_of_settings_is_that_of_the_program() -> None:
    table = TEXT.split("<!-- settings -->")[1].split("<!-- /settings -->")[0]
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.strip().splitlines()[2:]
    ]
    expected = []
    for name, field in setting_names().items():
        value = field.default
        if value is None:
            shown = ""
        elif isinstance(value, tuple):
            shown = " ".join(value)
        else:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
        expected.append((f"`{name}`", shown, field.description))
    assert rows == expected


def test_the_example_runs_as_it_stands(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    step, loss = done.stdout.split()
    assert 0 <= int(step) <= 4 and 4 < float(loss) < 8
