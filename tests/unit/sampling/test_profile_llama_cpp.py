"""The profile of llama.cpp against llama.cpp itself, by its Python bindings, where these are installed.

llama.cpp computes in float32, we in float64 and integers: a row counts where ours keeps the same tokens with
every threshold moved by 1e-4 of itself to both sides. Which of tied tokens it cuts is an accident of its
sort, so that rows with ties are compared by how many are kept, and by the odds.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.sampling_rows import row

from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample

llama = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, built from its source package")
pytestmark = pytest.mark.slow

VALUES: dict[str, list[float]] = {
    "repetition_penalty": [1.3, 0.7],
    "presence_penalty": [0.4],
    "frequency_penalty": [0.3],
    "dry_multiplier": [0.8],
    "top_n_sigma": [0.513, 1.037],
    "top_k": [1, 3, 11, 40],
    "typical_p": [0.2173, 0.6131, 0.9471],
    "top_p": [0.1137, 0.5071, 0.9137],
    "min_p": [0.0531, 0.313, 0.871],
    "xtc_probability": [1.0],
    "temperature": [0.31, 1.9],
}
THRESHOLDS = ("top_n_sigma", "typical_p", "top_p", "min_p", "xtc_threshold")


def chain_of(settings: dict[str, Any], vocabulary: int) -> Any:
    """The samplers of llama.cpp's common chain, in its order, as its command line builds them."""
    s = settings
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    if "mirostat_tau" in s:
        parts = [
            llama.llama_sampler_init_temp(s.get("temperature", 1.0)),
            llama.llama_sampler_init_mirostat_v2(1, s["mirostat_tau"], s.get("mirostat_eta", 0.1)),
        ]
    else:
        parts = [
            llama.llama_sampler_init_penalties(
                vocabulary,
                64, s.get("repetition_penalty", 1.0), s.get("frequency_penalty", 0.0),
                s.get("presence_penalty", 0.0),
            ),
            llama.llama_sampler_init_dry(None, s.get("dry_multiplier", 0.0), 1.75, 2, 64, None, 0),
            llama.llama_sampler_init_top_n_sigma(s.get("top_n_sigma", -1.0)),
            llama.llama_sampler_init_top_k(int(s.get("top_k", 0))),
            llama.llama_sampler_init_typical(s.get("typical_p", 1.0), 0),
            llama.llama_sampler_init_top_p(s.get("top_p", 1.0), 0),
            llama.llama_sampler_init_min_p(s.get("min_p", 0.0), 0),
            llama.llama_sampler_init_xtc(s.get("xtc_probability", 0.0), s.get("xtc_threshold", 0.1), 0, 1),
            llama.llama_sampler_init_temp_ext(s.get("temperature", 1.0), s.get("dynatemp_range", 0.0), 1.0),
        ]  # fmt: skip
    for part in parts:
        llama.llama_sampler_chain_add(chain, part)
    return chain


class Chain:
    """One chain of llama.cpp, fed with rows."""

    def __init__(self, settings: dict[str, Any], history: list[int], vocabulary: int) -> None:
        self.chain = chain_of(settings, vocabulary)
        for token in history:
            llama.llama_sampler_accept(self.chain, token)

    def apply(self, x: torch.Tensor) -> tuple[dict[int, float], int]:
        """(id to logit after the chain, of what it keeps; the id selected or -1)."""
        data = (llama.llama_token_data * len(x))()
        for i, logit in enumerate(x.tolist()):
            data[i].id, data[i].logit, data[i].p = i, logit, 0.0
        array = llama.llama_token_data_array(
            data=ctypes.cast(data, llama.llama_token_data_p), size=len(x), selected=-1, sorted=False
        )
        llama.llama_sampler_apply(self.chain, ctypes.byref(array))
        kept = {array.data[i].id: array.data[i].logit for i in range(array.size)}
        selected = array.data[array.selected].id if array.selected >= 0 else -1
        return {i: logit for i, logit in kept.items() if logit > -math.inf}, selected

    def __del__(self) -> None:
        llama.llama_sampler_free(self.chain)


def ours(x: torch.Tensor, settings: dict[str, Any], history: list[int], **rest: Any) -> Any:
    past = (torch.tensor(history), torch.tensor([0, len(history)]), torch.tensor([len(history)]))
    params = SamplingParams(profile="llama.cpp", **({"seed": 0} | settings))
    return sample(x, params, 0, history=past, need=("kept", "logprob"), **rest)


def is_near_a_cut(x: torch.Tensor, settings: dict[str, Any], history: list[int]) -> bool:
    found = set()
    for factor in (1 - 1e-4, 1.0, 1 + 1e-4):
        moved = {n: min(v * factor, 1.0) if n in THRESHOLDS[1:] else v * factor if n in THRESHOLDS else v
                 for n, v in settings.items()}  # fmt: skip
        found.add(tuple(ours(x, moved, history).kept[1].tolist()))
    return len(found) > 1


def test_each_sampler_and_chains_of_them_keep_the_same_tokens_at_the_same_odds() -> None:
    generator = np.random.default_rng(0)
    names = list(VALUES)
    counted = near = cut = 0
    for i in range(3000):
        kind = ("normal", "flat", "peaked", "ties", "gaps", "normal")[i % 6]
        vocabulary = int(generator.choice([7, 50, 300, 1500]))
        x = torch.from_numpy(row(generator, kind, vocabulary)).float()
        history = [
            int(t) for t in generator.integers(min(vocabulary, 4), size=int(generator.integers(1, 90)))
        ]
        on = [n for n in names if generator.random() < 0.3] if i % 2 else []
        on = on or [names[(i // 12) % len(names)]]
        tied = kind in ("ties", "gaps")
        if "typical_p" in on and (tied or kind == "flat" or "top_n_sigma" in on):
            # Ties at its cut, exact or of float32: we keep all. Behind top-n-sigma its entropy is NaN.
            on = [n for n in on if n != "typical_p"] or ["top_k"]
        settings = {n: generator.choice(VALUES[n]).item() for n in on}
        settings |= {n: int(settings[n]) for n in ("top_k",) if n in settings}
        if "xtc_probability" in settings:
            settings["xtc_threshold"] = 0.0731
        if is_near_a_cut(x, settings, history):
            near += 1
            continue
        theirs, _ = Chain(settings, history, vocabulary).apply(x)
        found = ours(x, settings, history)
        kept = found.kept[1].tolist()
        if tied:
            assert len(theirs) == len(kept), (settings, x.tolist())
        else:
            assert set(theirs) == set(kept), (settings, kind, vocabulary, len(theirs), len(kept))
        if int(found.tokens) in theirs:
            logits = torch.tensor(list(theirs.values()), dtype=torch.float64)
            odds = theirs[int(found.tokens)] - float(torch.logsumexp(logits, 0))
            assert odds == pytest.approx(float(found.logprob), abs=2e-3), settings
        counted += 1
        cut += len(kept) < vocabulary
    assert counted > 2300 and cut > 1500, (counted, near, cut)


def test_dynamic_temperature_gives_the_same_odds() -> None:
    generator = np.random.default_rng(1)
    for i in range(200):
        x = torch.from_numpy(row(generator, "normal", 60)).float()
        settings = {"dynatemp_range": [0.3, 0.7][i % 2], "temperature": 0.9, "top_k": 20}
        theirs, _ = Chain(settings, [0], 60).apply(x)
        found = ours(x, settings, [0])
        logits = torch.tensor(list(theirs.values()), dtype=torch.float64)
        odds = theirs[int(found.tokens)] - float(torch.logsumexp(logits, 0))
        assert odds == pytest.approx(float(found.logprob), abs=1e-4)


def test_mirostat_keeps_the_same_tokens_over_a_text_in_which_both_draw_the_same() -> None:
    generator = np.random.default_rng(2)
    settings = {"mirostat_tau": 2.5, "mirostat_eta": 0.3, "temperature": 0.8}
    theirs, state = Chain(settings, [], 40), None
    for _ in range(40):
        x = torch.from_numpy(row(generator, "normal", 40) * 2).float()
        kept, token = theirs.apply(x)
        for seed in range(3000):  # the seed with which ours draws what llama.cpp drew
            found = ours(x, settings | {"seed": seed}, [0], state=state)
            if int(found.tokens) == token:
                break
        assert int(found.tokens) == token
        assert set(found.kept[1].tolist()) == set(kept)
        state = found.state
