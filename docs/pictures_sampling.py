"""Draws what each sampling setting does to the distributions of a real model, along one sentence.

`sampling-settings.png`: one context in which the model is unsure; its own distribution and what each setting
makes of it. `sampling-sizes.png`: how many tokens each setting keeps at every place of the sentence. Tokens
that are kept, masses and temperatures are those of `twodice.sample` and `twodice.explain`.

Run: python docs/pictures_sampling.py RUN_OR_MODEL_FOLDER [--out docs/images]
Needs the folder of a model made by `twodice train`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import twodice
from twodice import SamplingParams

INK, MUTED, MODEL, DRAWN = "#1d2433", "#6b7485", "#d3d9e4", "#2f6fb3"
TEXT = (
    "If the key is not found, the default value is returned if it was given; otherwise a KeyError is raised. "
    "This method returns a new list with the items of the dictionary."
)
PANELS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.6},
    {"temperature": 1.5},
    {"top_k": 20},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_n_sigma": 1.0},
    {"top_h": 0.4},
    {"typical_p": 0.7},
    {"eta_cutoff": 0.01},
    {"mirostat_tau": 3.0},
    {"xtc_probability": 1.0, "xtc_threshold": 0.05},
    {"top_p": 0.9, "temperature": 1.5, "profile": "llama.cpp"},
)
SIZES: tuple[dict[str, Any], ...] = (
    {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_n_sigma": 1.0}, {"top_h": 0.4},
)  # fmt: skip


def said(settings: dict[str, Any]) -> str:
    """Settings for people."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def titled(settings: dict[str, Any]) -> str:
    """The same in two lines where it is long."""
    return said(settings).replace(", ", ",\n", 1) if len(settings) > 1 else said(settings)


def logits_along(folder: Path) -> tuple[list[str], torch.Tensor]:
    """The tokens of the sentence, and the logits (T, V) behind each of them, float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(TEXT)["input_ids"][: model.config.max_position_embeddings]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].double()
    return [tokenizer.decode([i]) for i in ids], logits


def drawn_from(logits: torch.Tensor, settings: dict[str, Any]) -> tuple[torch.Tensor, twodice.Explanation]:
    """The distribution (V,) that a setting draws from, and what `explain` says of it."""
    params = SamplingParams(seed=0, **settings)
    kept = twodice.sample(logits, params, 0, need=("kept",)).kept
    assert kept is not None
    found = twodice.explain(logits, params)
    drawn = torch.zeros_like(logits)
    drawn[kept[1]] = torch.softmax(logits[kept[1]] / found.temperature, 0)
    return drawn, found


def sizes_along(logits: torch.Tensor, settings: dict[str, Any]) -> np.ndarray:
    """Tokens that a setting keeps at each place, (T,)."""
    kept = twodice.sample(logits, SamplingParams(seed=0, **settings), 0, need=("kept",)).kept
    assert kept is not None
    return kept[0].diff().numpy()


def entropies(logits: torch.Tensor) -> np.ndarray:
    """The model's own, (T,) nats."""
    found = twodice.sample(logits, SamplingParams(seed=0), 0, need=("entropy",)).entropy
    assert found is not None
    return found.numpy()


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    with Image.open(path) as image:  # a few colours are enough, and half of the bytes
        small = image.convert("RGB").quantize(48, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    return path


def draw_settings(words: list[str], logits: torch.Tensor, out: Path) -> Path:
    """One panel for each setting, at the place where the model is least sure."""
    at = int(entropies(logits).argmax())
    row = logits[at]
    order = torch.argsort(row, descending=True, stable=True)
    own, ranks = torch.softmax(row, 0)[order], np.arange(1, len(row) + 1)
    figure, grid = plt.subplots(3, 4, figsize=(11, 7.4), sharex=True, sharey=True, layout="constrained")
    for axes, settings in zip(grid.flat, PANELS, strict=True):
        drawn, found = drawn_from(row, settings)
        shown = drawn[order].numpy()
        axes.fill_between(ranks, own.numpy(), 1e-9, color=MODEL, step="mid", linewidth=0)
        axes.plot(ranks, np.where(shown > 0, shown, np.nan), color=DRAWN, linewidth=1.6)
        axes.set(xscale="log", yscale="log", ylim=(1e-6, 1), xlim=(0.9, len(row)))
        axes.set_title(titled(settings), loc="left", fontsize=9, fontweight="bold", color=INK)
        axes.text(
            0.04, 0.05,
            f"{found.kept:,} kept, mass {found.kept_mass:.2f}\nentropy {found.entropy:.2f}",
            transform=axes.transAxes, color=DRAWN, fontsize=8,
        )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("rank of the token", color=INK)
    figure.supylabel("probability", color=INK)
    before = "".join(words[: at + 1])[-46:].strip().replace("$", r"\$")
    figure.suptitle(
        f"After “… {before}”: the model in grey (entropy {entropies(logits)[at]:.2f}), drawn from in blue",
        x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK,
    )  # fmt: skip
    return _save(figure, out / "sampling-settings.png")


def draw_sizes(words: list[str], logits: torch.Tensor, out: Path) -> Path:
    """The size of the kept set along the sentence, beside the model's entropy."""
    figure, (upper, axes) = plt.subplots(
        2, 1, figsize=(11, 5.4), sharex=True, height_ratios=[1, 2.6], layout="constrained"
    )
    places = np.arange(len(words))
    upper.bar(places, entropies(logits), color=MUTED, width=0.7)
    upper.set_ylabel("entropy [nats]")
    colours = ("#8a93a6", "#2f6fb3", "#e07a3f", "#3c8d5a", "#8b4fa8")
    for settings, colour in zip(SIZES, colours, strict=True):
        sizes = sizes_along(logits, settings)
        label = f"{said(settings)} (median {np.median(sizes):g})"
        axes.step(places, sizes, where="mid", color=colour, label=label, linewidth=1.5)
    axes.set_yscale("log")
    axes.set_ylabel("tokens kept for the next place")
    axes.set_xticks(places, [word.strip() or "␣" for word in words], rotation=90, fontsize=7)
    axes.legend(ncol=3, frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0))
    for one in (upper, axes):
        one.spines[["top", "right"]].set_visible(False)
    return _save(figure, out / "sampling-sizes.png")


def draw(folder: Path, out: Path) -> list[Path]:
    """Write both pictures into `out` and return their paths."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK,
                         "axes.edgecolor": MUTED, "axes.labelcolor": INK, "xtick.color": MUTED,
                         "ytick.color": MUTED})  # fmt: skip
    words, logits = logits_along(folder)
    return [draw_settings(words, logits, out), draw_sizes(words, logits, out)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    chosen = parser.parse_args()
    for path in draw(chosen.folder, chosen.out):
        print(path)
