"""Draws the pictures of the docs from real masks and a real model's belief.

Run: python docs/pictures.py RUN_OR_MODEL_FOLDER [--out docs/images]
Needs the folder of a model made by `twodice train` or `twodice study` (such as runs/demo/best).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from transformers import AutoModelForCausalLM, AutoTokenizer

import twodice
from twodice.random.keys import Key

INK, MUTED, LOW, HIGH, KEPT = "#1d2433", "#8a93a6", "#e07a3f", "#f3c9ae", "#2f6fb3"
PROMPT = "the value of the"


def dropped_levels(rows: int = 24, columns: int = 40) -> np.ndarray:
    """0 where nothing falls, 1 where a unit falls at p = 0.2 only, 2 where it falls at p = 0.1 as well."""
    ones, key = torch.ones(1, rows, columns), Key(0).child("dropout", "picture#residual")
    low, high = (twodice.dropout(ones, p, key=key, step=0) == 0 for p in (0.1, 0.2))
    assert bool((high | ~low).all()), "what falls at 0.1 falls at 0.2 too"
    return (low.int() + high.int())[0].numpy()


def next_token_belief(folder: Path, prompt: str) -> tuple[list[str], np.ndarray]:
    """The tokens after `prompt` by falling probability, and the probabilities."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.inference_mode():
        probabilities = torch.softmax(model(ids).logits[0, -1].double(), -1)
    order = torch.argsort(probabilities, descending=True)
    return [tokenizer.decode([i]) for i in order[:12].tolist()], probabilities[order].numpy()


def draw(folder: Path, out: Path, k: int = 10) -> Path:
    """Write `two-dice.png` into `out` and return its path."""
    plt.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "text.color": INK,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
        }
    )
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10.6, 4.3), width_ratios=[1.15, 1], layout="constrained"
    )
    levels = dropped_levels()
    left.pcolormesh(
        levels[::-1], cmap=ListedColormap(["#eef1f6", HIGH, LOW]), edgecolors="white", linewidth=0.6
    )
    left.set_aspect("equal")
    left.set_xticks([])
    left.set_yticks([])
    left.set_xlabel("column (unit)")
    left.set_ylabel("position in the text")
    left.set_title(
        "The training die: units dropped in one step", loc="left", fontsize=11, fontweight="bold", color=INK
    )
    for spine in left.spines.values():
        spine.set_visible(False)
    shares = [(levels == 2).mean(), (levels >= 1).mean()]
    handles = [plt.Rectangle((0, 0), 1, 1, color=LOW), plt.Rectangle((0, 0), 1, 1, color=HIGH)]
    labels = [f"at p = 0.1 (here {shares[0]:.1%})", f"at p = 0.2 as well (together {shares[1]:.1%})"]
    left.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncol=2, frameon=False)

    words, probabilities = next_token_belief(folder, PROMPT)
    ranks = np.arange(1, min(60, len(probabilities)) + 1)
    shown = probabilities[: len(ranks)]
    right.bar(ranks, shown, color=[KEPT if r <= k else "#d3d9e4" for r in ranks], width=0.8)
    right.axvline(k + 0.5, color=KEPT, linewidth=1)
    likeliest = "  ".join(f"“{word.strip() or repr(word)[1:-1]}”" for word in words[:6]).replace("$", r"\$")
    told = (
        (f"top-k = {k} keeps {probabilities[:k].sum():.0%} of the probability:", KEPT),
        (f"{likeliest}  …", KEPT),
        (f"the tail: {len(probabilities) - k:,} tokens with {probabilities[k:].sum():.0%}", MUTED),
    )
    for line, (text, colour) in enumerate(told):
        right.annotate(
            text,
            (k + 0.5, shown[0] * (0.9 - 0.09 * line)),
            xytext=(7, 0),
            textcoords="offset points",
            color=colour,
        )
    right.set_xlabel("rank of the token")
    right.set_ylabel("probability")
    right.set_title(
        f"The generation die: after “{PROMPT}”", loc="left", fontsize=11, fontweight="bold", color=INK
    )
    right.spines[["top", "right"]].set_visible(False)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "two-dice.png"
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    chosen = parser.parse_args()
    print(draw(chosen.folder, chosen.out))
