"""Sampling against one vectorised max over the logits (the limit) and against what people run instead.

Peers: the transformers processors, `torch.topk` and vLLM's torch path (written anew from its rules: it
sorts), each with a softmax and a draw; NumPy; llama.cpp's bindings where they are installed. A call rotates
over at least 64 distinct rows. Single-threaded lines are taken by the processor's own time, because the
machine is shared; with 2 threads the clock on the wall has to do. `python -m benchmarks.sampling --help`.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from benchmarks.sidebyside import turns
from twodice.cli.doctor import processor
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample

DISTINCT = 64
VOCABULARIES = (32_000, 50_257, 128_256, 151_936, 262_144)
ROWS = (1, 8, 32, 256)
KINDS = ("peaked", "normal 1", "normal 3", "90 % -inf")
DTYPES = (torch.float32, torch.bfloat16)
HISTORY = 4096
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.95},
    "min-p": {"min_p": 0.05},
    "top-k + top-p": {"top_k": 50, "top_p": 0.95},
}
TIMES_MAX = {"none": 6, "top-k": 3, "top-p": 5, "min-p": 5, "top-k + top-p": 5}
OF_TRANSFORMERS: dict[str, Callable[[float], Any]] = {
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "top_h": TopHLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}
A_CALL = 15e-6  # seconds that each target allows a call beyond its multiple of the max
TRANSFORMERS = 100
AS_FAST = 1.1  # what "as fast as" means: the medians of two runs of one call differ by so much here


@dataclass(frozen=True)
class Line:
    """One comparison: microseconds a call by contender, and each target with whether it holds."""

    vocabulary: int
    rows: int
    dtype: str
    kind: str
    setting: str
    threads: int
    us: dict[str, float]
    targets: dict[str, bool]


def logits_of(vocabulary: int, rows: int, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Distinct rows, at least 64; in peaked ones the median top-p 0.95 set has 2 tokens, as in real text."""
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(max(rows, DISTINCT), vocabulary).normal_(generator=generator)
    if kind == "normal 3":
        x *= 3
    elif kind == "90 % -inf":
        x[torch.empty(x.shape).uniform_(generator=generator) < 0.9] = -torch.inf
    elif kind == "peaked":
        x *= 2
        gaps = torch.empty(len(x), 12).exponential_(0.5, generator=generator)
        for row, down in zip(x, gaps.cumsum(1), strict=True):
            row[torch.randint(0, vocabulary, (12,), generator=generator)] = 22 + down[0] - down
    return x.to(dtype)


def ours(params: Any, history: Any = None) -> Callable[[torch.Tensor], Any]:
    """Our call; the position moves on as in a text."""
    position = itertools.count()
    return lambda x: sample(x, params, next(position), history=history)


def transformers_way(setting: dict[str, Any]) -> Callable[[torch.Tensor], Any]:
    """What ``generate(do_sample=True)`` does to a batch of logits."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(0.8)])
    chain.extend(kind(setting[name]) for name, kind in OF_TRANSFORMERS.items() if name in setting)
    return lambda x: torch.multinomial(chain(None, x.float()).softmax(-1), 1)


def topk_way(x: torch.Tensor) -> torch.Tensor:
    """The shortest way in torch, for top-k alone."""
    values, ids = x.topk(50)
    return ids.gather(1, torch.multinomial((values.float() / 0.8).softmax(-1), 1))


def vllm_way(setting: dict[str, Any]) -> Callable[[torch.Tensor], Any]:
    """vLLM's rules in torch: one ascending sort for top-k and top-p, then the argmax of p / Exp(1)."""

    def call(x: torch.Tensor) -> torch.Tensor:
        x = x.float() / 0.8
        if "min_p" in setting:
            p = x.softmax(-1)
            x = x.masked_fill(p < setting["min_p"] * p.amax(-1, keepdim=True), -torch.inf)
        if "top_k" in setting or "top_p" in setting:
            ascending, ids = x.sort(-1)
            if "top_k" in setting:
                least = ascending[:, -setting["top_k"]].unsqueeze(1)
                ascending = ascending.masked_fill(ascending < least, -torch.inf)
            if "top_p" in setting:
                out = ascending.softmax(-1).cumsum(-1) <= 1 - setting["top_p"]
                out[:, -1] = False
                ascending = ascending.masked_fill(out, -torch.inf)
            x = ascending.scatter(-1, ids, ascending)
        p = x.softmax(-1, dtype=torch.float32)
        return p.div_(torch.empty_like(p).exponential_()).argmax(-1)

    return call


def numpy_way(setting: dict[str, Any]) -> Callable[[torch.Tensor], Any]:
    """A careful NumPy user: partition for k, sort for p, a cumulative sum and one uniform number a row."""
    generator = np.random.default_rng(0)

    def row(x: np.ndarray) -> int:
        ids = np.argpartition(x, -setting["top_k"])[-setting["top_k"] :] if "top_k" in setting else None
        x = x if ids is None else x[ids]
        p = np.exp((x - x.max()) / 0.8)
        if "min_p" in setting:
            p[p < setting["min_p"]] = 0
        if "top_p" in setting:
            order = np.argsort(-p)
            mass = np.cumsum(p[order])
            order = order[: np.searchsorted(mass, setting["top_p"] * mass[-1]) + 1]
            p, ids = p[order], order if ids is None else ids[order]
        mass = np.cumsum(p)
        at = int(np.searchsorted(mass, generator.random() * mass[-1], side="right"))
        return at if ids is None else int(ids[at])

    return lambda x: [row(one) for one in x.float().numpy()]


def llama_way(setting: dict[str, Any]) -> Callable[[torch.Tensor], Any] | None:
    """llama.cpp's sampler chain through its bindings; None where these are not installed."""
    if find_spec("llama_cpp") is None:
        return None
    import llama_cpp as c

    made = {
        "top_n_sigma": c.llama_sampler_init_top_n_sigma,
        "top_k": c.llama_sampler_init_top_k,
        "typical_p": lambda p: c.llama_sampler_init_typical(p, 1),
        "top_p": lambda p: c.llama_sampler_init_top_p(p, 1),
        "min_p": lambda p: c.llama_sampler_init_min_p(p, 1),
        "xtc_probability": lambda p: c.llama_sampler_init_xtc(p, setting["xtc_threshold"], 1, 1),
    }
    chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
    for name, make in made.items():
        if name in setting:
            c.llama_sampler_chain_add(chain, make(setting[name]))
    if "dynatemp_range" in setting:
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_temp_ext(0.8, setting["dynatemp_range"], 1.0))
    else:
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_temp(0.8))
    if "mirostat_tau" in setting:
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_mirostat_v2(1, setting["mirostat_tau"], 0.1))
    else:
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_dist(1))
    layout = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])

    def call(x: torch.Tensor) -> list[int]:
        tokens = []
        for one in x.float().numpy():
            data = np.zeros(len(one), layout)  # the candidates, filled anew for each token as llama.cpp does
            data["id"], data["logit"] = np.arange(len(one), dtype=np.int32), one
            pointer = data.ctypes.data_as(c.llama_token_data_p)
            list_ = c.llama_token_data_array(data=pointer, size=len(one), selected=-1, sorted=False)
            c.llama_sampler_apply(chain, ctypes.byref(list_))
            tokens.append(list_.data[list_.selected].id)
        return tokens

    return call


def contenders_of(name: str, rows: int, dtype: torch.dtype, vocabulary: int, peers: bool) -> dict[str, Any]:
    """Ours and the limit on every line; how seeds and mixed rows do; the peers where they are asked for."""
    setting = SETTINGS[name]
    # Every row with its seed: rows that share their noise are faster than what people have.
    seeded = [SamplingParams(temperature=0.8, seed=i, **setting) for i in range(rows)]
    found: dict[str, Any] = {"ours": ours(seeded), "max": lambda x: x.amax(1)}
    if dtype == torch.float32:
        found["max (NumPy)"] = lambda x: x.numpy().max(axis=1)
    found["unseeded"] = ours(SamplingParams(temperature=0.8, **setting))
    if rows > 1:
        halves = [SamplingParams(temperature=0.8, seed=(i, None)[i % 2], **setting) for i in range(rows)]
        found["half seeded"] = ours(halves)
    if name == "top-k":
        length = np.random.default_rng(1).integers(0, vocabulary, rows * HISTORY)
        past = (
            torch.from_numpy(length),
            torch.arange(rows + 1) * HISTORY,
            torch.full((rows,), HISTORY // 2, dtype=torch.int64),
        )
        penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1}
        found["penalties"] = ours([dataclasses.replace(one, **penalties) for one in seeded], past)
    if peers:
        found["transformers"] = transformers_way(setting)
        found["vLLM's rules"] = vllm_way(setting)
        found["NumPy"] = numpy_way(setting)
        if name == "top-k":
            found["torch.topk"] = topk_way
        if (llama := llama_way(setting)) is not None:
            found["llama.cpp"] = llama
    return found


def judge(name: str, us: dict[str, float]) -> dict[str, bool]:
    """Each target of the line, and whether it holds."""
    limit, mine = us["max"], us["ours"]
    found = {f"{TIMES_MAX[name]} x max + 15 us": mine <= TIMES_MAX[name] * limit + A_CALL * 1e6}
    if "transformers" in us:
        found[f"{TRANSFORMERS} x transformers"] = us["transformers"] >= TRANSFORMERS * mine
    found["seeded as unseeded"] = mine <= AS_FAST * us["unseeded"]
    found["unseeded as seeded"] = us["unseeded"] <= AS_FAST * mine
    if "penalties" in us:
        found["penalties + 1 x max"] = us["penalties"] - mine <= limit
    for peer in ("transformers", "vLLM's rules", "NumPy", "torch.topk", "llama.cpp"):
        if peer in us:
            found[f"faster than {peer}"] = us[peer] >= mine
    return found


def timed(
    contenders: dict[str, Any], batches: list[torch.Tensor], threads: int, quick: bool
) -> dict[str, float]:
    """The medians in microseconds; the limit is the faster of torch's max and NumPy's."""
    clock = time.process_time if threads == 1 else time.perf_counter
    found = turns(
        contenders, batches, rounds=3 if quick else 5, seconds=0.004 if quick else 0.01, clock=clock
    )
    us = {name: statistics.median(values) * 1e6 for name, values in found.items()}
    us["max"] = min(us["max"], us.pop("max (NumPy)", us["max"]))
    return us


def mixed_line(
    batches: list[torch.Tensor], threads: int, quick: bool
) -> tuple[dict[str, float], dict[str, bool]]:
    """Settings mixed by row against the mean of the same settings uniform, each on the same rows.

    Every row has its own seed on both sides: the processor learns from a row where the next one with the same
    noise is going to look.
    """
    rows = len(batches[0])
    each = {
        f"all {n}": ours([SamplingParams(temperature=0.8, seed=i, **s) for i in range(rows)])
        for n, s in SETTINGS.items()
    }
    kinds = list(SETTINGS.values())
    mixed = [SamplingParams(temperature=0.8, seed=i, **kinds[i % len(kinds)]) for i in range(rows)]
    us = timed({"ours": ours(mixed), "max": lambda x: x.amax(1), **each}, batches, threads, quick)
    names = list(SETTINGS)
    us["uniform"] = statistics.mean(us[f"all {names[i % len(names)]}"] for i in range(rows))
    us = {name: value for name, value in us.items() if not name.startswith("all ")}
    return us, {"mixed as uniform": us["ours"] <= AS_FAST * us["uniform"]}


def grid(options: argparse.Namespace) -> Iterator[tuple[int, int, torch.dtype, str, int, bool]]:
    """Vocabulary, rows, type, shape, threads, whether the peers run."""
    if options.quick:
        for rows, dtype, kind in itertools.product((1, 32), DTYPES, ("peaked", "normal 3")):
            yield 151_936, rows, dtype, kind, 1, rows == 1 and dtype == torch.float32
        return
    vocabularies, heights = options.vocabulary or VOCABULARIES, options.rows or ROWS
    for v, rows, dtype, kind, threads in itertools.product(vocabularies, heights, DTYPES, KINDS, (1, 2)):
        peers = v in (32_000, 151_936) and rows in (1, 32) and kind in ("peaked", "normal 3") and threads == 1
        yield v, rows, dtype, kind, threads, peers or options.full


def measure(options: argparse.Namespace) -> Iterator[Line]:
    """Every line of the grid, as it is found."""
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    for (v, rows, dtype, kind), cells in itertools.groupby(grid(options), lambda cell: cell[:4]):
        full = logits_of(v, rows, kind, dtype)
        batches = [full[i : i + rows] for i in range(0, len(full), rows)]
        for *_, threads, peers in cells:
            torch.set_num_threads(threads)
            short = str(dtype).removeprefix("torch.")
            for name in SETTINGS:
                if deadline is not None and time.monotonic() > deadline:
                    return
                us = timed(contenders_of(name, rows, dtype, v, peers), batches, threads, options.quick)
                yield Line(v, rows, short, kind, name, threads, us, judge(name, us))
            if rows > 1:
                us, targets = mixed_line(batches, threads, options.quick)
                yield Line(v, rows, short, kind, "mixed by row", threads, us, targets)


def overhead() -> dict[str, float]:
    """Microseconds of a call whose work is next to nothing: one row of 1,000 logits."""
    torch.set_num_threads(1)
    batches = list(logits_of(1000, 1, "peaked", torch.float32).split(1))
    calls = {
        f"{name}, seeded": ours(SamplingParams(temperature=0.8, seed=1, **s)) for name, s in SETTINGS.items()
    }
    calls["top-k, unseeded"] = ours(SamplingParams(temperature=0.8, top_k=50))
    found = turns({**calls, "max": lambda x: x.amax(1)}, batches, clock=time.process_time)
    return {name: statistics.median(values) * 1e6 for name, values in found.items()}


def show(line: Line) -> None:
    """One line of the table: our time, then everybody's as a multiple of it, then what is missed."""
    ratios = "  ".join(f"{n} {u / line.us['ours']:.2f}" for n, u in line.us.items() if n != "ours")
    missed = [name for name, held in line.targets.items() if not held]
    verdict = "held" if not missed else "MISSED " + "; ".join(missed)
    where = f"{line.rows:>3} x {line.vocabulary:<6} {line.dtype:<8} {line.kind:<9} {line.threads}t"
    print(f"{where} {line.setting:<13} {line.us['ours']:>9.1f} us | {ratios} | {verdict}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Print the table and the count of each target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a table in about two minutes")
    parser.add_argument("--full", action="store_true", help="all peers on all lines (many hours)")
    parser.add_argument("--vocabulary", type=int, nargs="+", help="these only")
    parser.add_argument("--rows", type=int, nargs="+", help="these only")
    parser.add_argument("--minutes", type=float, help="stop after so long; the table says where it stopped")
    parser.add_argument("--json", metavar="FILE", help="write the figures too")
    options = parser.parse_args([] if arguments is None else arguments)
    load = " ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"{processor()}, {os.cpu_count()} processors, load {load}, torch {torch.__version__}")
    if find_spec("llama_cpp") is None:
        print("llama.cpp: absent (its bindings are not installed)")
    call = overhead()
    print("one row of 1,000, us a call: " + ", ".join(f"{name} {us:.1f}" for name, us in call.items()))
    print("others as multiples of our time (above 1: we are faster)\n")
    lines = []
    for line in measure(options):
        show(line)
        lines.append(line)
    print()
    for target in dict.fromkeys(name for line in lines for name in line.targets):
        held = [line.targets[target] for line in lines if target in line.targets]
        print(f"{target:<28} held {sum(held):>4} of {len(held)}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"processor": processor(), "call": call, "lines": [asdict(x) for x in lines]}, file)


if __name__ == "__main__":
    main(sys.argv[1:])
