"""Runs cases on the Triton kernels in a process of their own: by the interpreter, and on a GPU if there is.

Triton decides when it is imported whether it interprets, so neither choice may reach the other tests.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
MODES = ["interpreter", "gpu"]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")


def cases_pass(file: Path, mode: str) -> None:
    """Run the tests of `file` (any name) with Triton's interpreter or on the GPU, and show what failed."""
    if mode == "gpu" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    environment = os.environ | {
        "TRITON_INTERPRET": "1" if mode == "interpreter" else "0",
        "OMP_NUM_THREADS": "1",
    }
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert "skipped" not in ran.stdout.splitlines()[-1], ran.stdout[-2000:]


def interpret_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter set up its language once a launch and module, not at every call of a function.

    Only speed changes (about three times); what is patched are names of Triton's own, so that another release
    of it may fail here.
    """
    from triton.runtime import interpreter

    prepared: set[int] = set()
    launch = interpreter.GridExecutor.__call__

    def called(self: Any, *given: Any, **named: Any) -> Any:
        if id(self.fn.__globals__) not in prepared:
            prepared.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*given, **named)

    def launched(self: Any, *given: Any, **named: Any) -> Any:
        prepared.clear()
        return launch(self, *given, **named)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", called)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)


def assembly(kernel: Any, arguments: dict[str, Any], capability: int = 90, **options: Any) -> str:
    """Compile a Triton kernel for a GPU that need not be there, and return its PTX.

    `arguments` are in the kernel's order. Text is a type (``*fp32`` a pointer, ``i32``; a ``+`` after it says
    that the value is a multiple of 16); everything else is a constant.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert list(arguments) == kernel.arg_names
    types = {n: v.rstrip("+") if isinstance(v, str) else "constexpr" for n, v in arguments.items()}
    constants = {(i,): v for i, v in enumerate(arguments.values()) if not isinstance(v, str)}
    multiples = {
        (i,): [["tt.divisibility", 16]]
        for i, v in enumerate(arguments.values())
        if isinstance(v, str) and v.endswith("+")
    }
    source = ASTSource(kernel, types, constants, multiples)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return str(compiled.asm["ptx"])
