"""Runs the benchmarks one after another: `python -m benchmarks [NAME ...]`.

Each holds us and the peer side by side in one process, alternating, and prints medians and a ratio.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

NAMES = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "__main__", "sidebyside")
)

if __name__ == "__main__":
    chosen = sys.argv[1:] or NAMES
    unknown = [name for name in chosen if name not in NAMES]
    if unknown:
        raise SystemExit(f"no benchmark {unknown[0]!r}; there are: {', '.join(NAMES)}")
    for name in chosen:
        print(f"\n# {name}\n", flush=True)
        importlib.import_module(f"benchmarks.{name}").main()
