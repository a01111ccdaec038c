"""What torch's own library lends to the native kernels: its threads, and its product of matrices.

The threads are those that torch's other operations use: they spin for a while after each, and a pool of ours
would have to share the processors with them. The product is the one behind ``torch.mm`` and
``scaled_dot_product_attention``; called from within a kernel it costs no operation of torch, which matters
where attention has many small ones. Torch offers neither to Python, but its library exports both by their
public names, of OpenMP's runtime and of BLAS. Without its threads the kernels use threads of their own;
without its product they take that of scipy. This module knows no operation.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from twodice.kernels import dispatch


@functools.cache
def _address(name: str) -> int | None:
    """Where a C function of torch's library, or of one that it has loaded, stands in memory."""
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            return ctypes.cast(getattr(ctypes.CDLL(str(path)), name), ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def lend() -> None:
    """Let the native kernels use torch's threads, where both are there: by ``GOMP_parallel``."""
    if dispatch.native is not None and (parallel := _address("GOMP_parallel")) is not None:
        dispatch.native.lend_threads(parallel)


@functools.cache
def product() -> int:
    """Return the address of ``sgemm``, with the arguments of Fortran."""
    found = _address("sgemm_")
    if found is None:
        from scipy.linalg import cython_blas

        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.argtypes, get.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
        name = ctypes.pythonapi.PyCapsule_GetName
        name.argtypes, name.restype = [ctypes.py_object], ctypes.c_char_p
        capsule = cython_blas.__pyx_capi__["sgemm"]
        found = get(capsule, name(capsule))
    return found
