"""Torch's own team of threads for work that is many torch calls on independent parts.

Threads inside each small call would meet at its end, thousands of times a second; here each thread takes
whole parts, and what it calls runs on it alone, as OpenMP opens no region within another. The threads are
those that torch's other operations use: they spin for a while after each, and a pool of ours would have to
share the processors with them. Torch offers no such call to Python, but its runtime of OpenMP exports one;
where it does not, the caller works alone and each call uses the threads as usual. The native kernels are lent
the same threads, so that they need not wake a pool of their own beside them. This module knows no operation.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from twodice.kernels import dispatch

_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _parallel() -> Any:
    """``GOMP_parallel(function, data, threads, flags)`` of the runtime that torch uses, or None."""
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            found = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        found.argtypes, found.restype = [_MEMBER, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        return found
    return None


def lend() -> None:
    """Let the native kernels use these threads, where both are there; else they use threads of their own."""
    if dispatch.native is not None and (parallel := _parallel()) is not None:
        dispatch.native.lend_threads(ctypes.cast(parallel, ctypes.c_void_p).value)


def size(parts: int) -> int:
    """Return how many threads `run` asks for with so many parts."""
    return 1 if parts <= 1 or _parallel() is None else min(parts, torch.get_num_threads())


def run(work: Callable[[Iterator[int]], None], parts: int, threads: int) -> None:
    """Call `work` without gradient on each of at most `threads` threads, with an iterator that they share.

    The iterators give each of 0 .. `parts` - 1 once, to whoever asks first; so parts may not depend on one
    another, nor write to one place. The first error is raised here, when all threads are done.
    """
    if threads <= 1:
        with torch.no_grad():
            work(iter(range(parts)))
        return
    numbers, taking = iter(range(parts)), threading.Lock()
    errors: list[BaseException] = []

    def shared() -> Iterator[int]:
        while not errors:
            with taking:
                number = next(numbers, None)
            if number is None:
                return
            yield number

    def member(_: Any) -> None:
        try:
            with torch.no_grad():
                work(shared())
        except BaseException as error:  # nothing may leave a call from outside Python
            errors.append(error)

    _parallel()(_MEMBER(member), None, threads, 0)
    if errors:
        raise errors[0]
