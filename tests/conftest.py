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
