"""`twodice doctor`: what is installed, which kernels run and why, and what machine this is."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Annotated, Any

import typer

import twodice

_SHOWN = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "scipy", "matplotlib", "triton")


def _versions() -> dict[str, str]:
    found = {}
    for name in _SHOWN:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def facts() -> dict[str, Any]:
    """Everything that the command shows, as plain values for ``--json``."""
    import torch

    from twodice.kernels import dispatch

    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return {
        "twodice": twodice.__version__,
        "python": sys.version.split()[0],
        "versions": _versions(),
        "kernels": dispatch.backend(),
        "why": dispatch.why(),
        "instructions": dispatch.facts()["simd_levels"],
        "gpu_kernels": gpu_kernels(dispatch.triton_is_there(), len(devices) > 1),
        "processor": processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "devices": devices,
    }


def gpu_kernels(triton: bool, gpu: bool) -> str:
    """What a tensor on a GPU would be served by, in words."""
    served = "Triton" if triton else "readable twins (no triton, or TWODICE_KERNELS=reference)"
    return served if gpu else f"{served}; no GPU here"


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show versions, the kernels in use and why, cores and devices."""
    from twodice.cli.console import out, print_json

    found = facts()
    if json:
        print_json(found)
        return
    console = out()
    console.print(f"twodice   {found['twodice']} (Python {found['python']})", markup=False)
    console.print(f"kernels   {found['kernels']}: {found['why']}", markup=False)
    console.print(f"on a GPU  {found['gpu_kernels']}", markup=False)
    machine = f"{found['processor']}, {found['cores']} cores, {found['threads']} threads"
    console.print(f"processor {machine}", markup=False)
    console.print(f"devices   {', '.join(found['devices'])}", markup=False)
    console.print("versions  " + ", ".join(f"{k} {v}" for k, v in found["versions"].items()), markup=False)
