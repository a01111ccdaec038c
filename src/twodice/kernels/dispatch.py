"""Which kernels run, and why: the one place that reads ``TWODICE_KERNELS`` and loads the native module.

``TWODICE_KERNELS=auto`` (the default) takes the native module where it is there, and Triton for tensors on a
GPU; ``native`` demands the module, ``reference`` takes the readable twins. ``TWODICE_SIMD`` may lower the
instruction set of the native kernels (``portable``, ``avx2``, ``avx512``, ``neon``) for tests. The choice
changes speed only, never a bit. This module knows no operation and no torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from twodice.errors import BackendError, nearest

MODES = ("auto", "native", "reference")


def _sources() -> str | None:
    """The digest of what the native module is built from, as CMakeLists.txt takes it; None if installed."""
    package = Path(__file__).parents[1]
    root = package.parents[1]
    if package.parent.name != "src" or not (root / "native" / "module.cpp").is_file():
        return None  # a wheel holds the module of its own sources
    files = [root / "CMakeLists.txt", *root.glob("native/*.[ch]pp")]
    digests = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return hashlib.sha256(";".join(digests).encode()).hexdigest()


def _load() -> tuple[ModuleType | None, str]:
    mode = os.environ.get("TWODICE_KERNELS", "auto")
    if mode not in MODES:
        raise BackendError(
            f"TWODICE_KERNELS must be one of {', '.join(MODES)}; got {mode!r}{nearest(mode, MODES)}"
        )
    if mode == "reference":
        return None, "TWODICE_KERNELS=reference asks for the readable twins"
    cause: ImportError | None = None
    try:
        from twodice import _native  # type: ignore[attr-defined]
    except ImportError as error:
        cause = error
        detail = "" if importlib.util.find_spec("twodice._native") is None else f": {error}"
        why = f"the native module is not there{detail}; install with a C++17 compiler at hand"
    else:
        sources = _sources()
        old = sources is not None and getattr(_native, "sources", None) != sources
        why = "the native module is older than the source; build it again (make native)" if old else ""
    if why:
        if mode == "native":
            raise BackendError(f"TWODICE_KERNELS=native, but {why}") from cause
        return None, why
    if level := os.environ.get("TWODICE_SIMD"):
        set_simd(_native, level)
    return _native, f"native module, {_native.simd()} instructions"


def set_simd(module: Any, level: str) -> None:
    """Make the native kernels use this instruction set; an error names those that this machine has."""
    if level not in module.simd_levels():
        raise BackendError(
            f"the instruction set must be one of {', '.join(module.simd_levels())} here; got {level!r}"
        )
    module.set_simd(level)


native: Any
native, _why = _load()
_said = False


@functools.cache
def triton_is_there() -> bool:
    """Return whether tensors on a GPU go through the Triton kernels; asking does not load triton."""
    return os.environ.get("TWODICE_KERNELS") != "reference" and importlib.util.find_spec("triton") is not None


def backend() -> Literal["native", "reference"]:
    """Return which kernels are in use."""
    return "reference" if native is None else "native"


def why() -> str:
    """Return the reason for that, in words."""
    return _why


def facts() -> dict[str, Any]:
    """Return what ``twodice doctor`` shows: backend, reason, instruction sets, hardware threads."""
    found: dict[str, Any] = {
        "backend": backend(),
        "why": _why,
        "simd": None,
        "simd_levels": [],
        "threads": None,
        "triton": triton_is_there(),
    }
    if native is not None:
        found |= {
            "simd": native.simd(),
            "simd_levels": native.simd_levels(),
            "threads": native.hardware_threads(),
        }
    return found


def say_once_when_slow() -> None:
    """Log a warning, once a process, that the readable twins are in use although nobody asked for them."""
    global _said
    if native is None and not _said and os.environ.get("TWODICE_KERNELS") != "reference":
        _said = True
        logging.getLogger("twodice").warning("twodice uses its slow reference kernels: %s", _why)
