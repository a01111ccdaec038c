"""What all tests share: few threads, no network, and backends that were promised must be there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

sys.path.insert(0, str(Path(__file__).parent.parent))  # tests.support and benchmarks; src comes installed

REQUIRED = frozenset(filter(None, os.environ.get("TWODICE_REQUIRE", "").split(",")))


def pytest_configure(config: object) -> None:
    """What TWODICE_REQUIRE names (native, triton, browser) must be there: a skip cannot hide its loss."""
    import importlib.util
    import shutil

    if "native" in REQUIRED:
        from twodice.kernels import dispatch

        if dispatch.native is None:
            raise SystemExit(f"TWODICE_REQUIRE names native kernels: {dispatch.why()}")
    if "triton" in REQUIRED and importlib.util.find_spec("triton") is None:
        raise SystemExit(
            "TWODICE_REQUIRE names triton, whose interpreter runs the kernels for GPUs; install it"
        )
    if "browser" in REQUIRED and shutil.which("chromium") is None:
        raise SystemExit("TWODICE_REQUIRE names a browser and there is no chromium on the PATH")
