"""Draws docs/images/dropout-kinds.png: what each kind and each form of noise drops, from the masks of a model.

A tiny GPT-2 made from a config is attached once for each panel and run once in train mode; the masks are those
that its sites have used (`masks_seen` of the tests watches them). The picture carries a digest of its masks.
Run: python docs/pictures_dropout.py [--out docs/images]
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel

import twodice

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.masks import masks_seen

INK, MUTED, KEPT, HIDDEN = "#1d2433", "#6b7485", "#e6eaf1", "#ffffff"
WORDS = "the cat sat on the mat and the dog sat by the cat and the mat".split()
WIDTH, LAYERS, EXAMPLES, STEP, SEED = 32, 8, 16, 3, 4
NAME = "dropout-kinds.png"


@dataclass(frozen=True)
class Panel:
    """One panel: a plan for the model, the site whose mask is shown, and what the axes are."""

    plan: str
    site: str
    said: str
    axes: tuple[str, str] = ("column", "position")


BLOCK = "transformer.h.0"
PANELS = (
    Panel("embedding=0.2", "transformer#embedding", "units of what enters the first layer"),
    Panel("token=0.2", "transformer#token", "whole positions"),
    Panel("word=0.3", "transformer.wte#word", "whole words, wherever they stand", ("column", "")),
    Panel("attention=0.2", f"{BLOCK}.attn#attention", "weights after the softmax", ("key", "query")),
    Panel("key=0.2", f"{BLOCK}.attn#key", "keys before the softmax", ("key", "query")),
    Panel("head=0.3", f"{BLOCK}.attn#head", "heads, at all positions", ("column (8 a head)", "position")),
    Panel("residual=0.2", f"{BLOCK}.mlp#residual", "units of what a branch adds"),
    Panel("activation=0.2", f"{BLOCK}.mlp#activation", "units inside the feed-forward"),
    Panel("skip=0.2", f"{BLOCK}.mlp#skip", "units of the stream beside a branch"),
    Panel("layer=depth(0.0, 0.5)", "#layer", "layers, for each example", ("layer", "example")),
    Panel("output=0.2", "transformer.ln_f#output", "units of what the last norm gives"),
    Panel("weight=0.2", f"{BLOCK}.mlp.c_fc#weight", "entries of a matrix", ("input unit", "output unit")),
    Panel("dropout=0.2", f"{BLOCK}.mlp.dropout#dropout", "where the model has nn.Dropout"),
    Panel("residual:feature=0.2", f"{BLOCK}.mlp#residual", "one decision for all positions"),
    Panel("residual:block(8)=0.2", f"{BLOCK}.mlp#residual", "one for 8 columns"),
    Panel("residual:gaussian=0.2", f"{BLOCK}.mlp#residual", "factors of mean 1, dark: far from it"),
)


def model_and_ids() -> tuple[GPT2LMHeadModel, torch.Tensor]:
    """A tiny GPT-2 and one batch: the same sentence in every row."""
    kinds = sorted(set(WORDS))
    config = GPT2Config(
        vocab_size=len(kinds), n_embd=WIDTH, n_inner=WIDTH, n_head=4, n_layer=LAYERS, n_positions=len(WORDS),
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = torch.tensor([kinds.index(word) for word in WORDS])
    return GPT2LMHeadModel(config).train(), ids.expand(EXAMPLES, -1)


def masks_of(model: GPT2LMHeadModel, ids: torch.Tensor, plan: str) -> dict[str, torch.Tensor]:
    """The mask of every site of a plan in one forward: True where something stays, or the factors."""
    handle = twodice.attach(model, plan, seed=SEED)
    try:
        with pytest.MonkeyPatch.context() as patch, masks_seen(patch) as seen, handle.step(STEP):
            model(input_ids=ids)
    finally:
        handle.detach()
    return {site: masks[0] for site, masks in seen.items()}


def shown(panel: Panel, masks: dict[str, torch.Tensor]) -> np.ndarray:
    """How dark each cell of a panel is: 1 where it is dropped, 0 where it stays, NaN where nothing is."""
    if panel.site == "#layer":
        of_layer = [masks.get(f"transformer.h.{i}#layer") for i in range(LAYERS)]
        columns = [torch.ones(EXAMPLES, dtype=torch.bool) if m is None else m[:, 0, 0] for m in of_layer]
        return 1.0 - torch.stack(columns, 1).numpy()
    mask = masks[panel.site]
    if mask.is_floating_point():
        return (mask[0] - 1).abs().clamp(max=1).double().numpy()
    if mask.dim() == 4:
        mask = mask[0, 0]
        seen = torch.ones_like(mask).tril()
        if panel.site.endswith("#key"):  # a query that would lose all its keys keeps them
            mask = mask | ~(mask & seen).any(-1, keepdim=True)
        return torch.where(seen, (~mask).double(), torch.nan).numpy()
    return (~(mask if mask.dim() == 2 else mask[0])).double().numpy()


def everything() -> list[np.ndarray]:
    """What all panels show."""
    model, ids = model_and_ids()
    return [shown(panel, masks_of(model, ids, panel.plan)) for panel in PANELS]


def digest(shades: list[np.ndarray]) -> str:
    """A SHA-256 of what the panels show and say."""
    whole = hashlib.sha256()
    for panel, shade in zip(PANELS, shades, strict=True):
        whole.update(f"{panel} {shade.shape}".encode())
        # In 254 steps: the factors of Gaussian noise are exact, but need not be so for a picture.
        whole.update(np.nan_to_num(np.round(shade * 254), nan=255).astype(np.uint8).tobytes())
    return whole.hexdigest()


def digest_of(path: Path) -> str:
    """The digest of the masks that a picture was drawn from."""
    with Image.open(path) as image:
        return str(image.info["Description"])


def draw(out: Path) -> Path:
    """Write the picture into `out` and return its path."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 8, "text.color": INK})
    figure, grid = plt.subplots(4, 4, figsize=(10, 8.6), layout="constrained")
    figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
    colours = LinearSegmentedColormap.from_list("dropped", [KEPT, INK])
    colours.set_bad(HIDDEN)
    shades = everything()
    for panel, shade, axes in zip(PANELS, shades, grid.flat, strict=True):
        rows, columns = shade.shape
        axes.pcolormesh(shade[::-1], cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=0.4)
        axes.set_title(panel.plan, loc="left", fontsize=9.5, fontweight="bold", color=INK, pad=15)
        axes.text(0, 1.03, panel.said, transform=axes.transAxes, color=MUTED)
        axes.set_xlabel(panel.axes[0], color=MUTED, labelpad=3)
        axes.set_ylabel(panel.axes[1], color=MUTED, labelpad=3)
        axes.set_xticks([])
        axes.set_yticks([])
        if panel.plan.startswith("word"):
            axes.set_yticks(np.arange(rows) + 0.5, WORDS[::-1], fontsize=6)
            axes.tick_params(length=0, pad=1, colors=MUTED)
        for spine in axes.spines.values():
            spine.set_visible(False)
    out.mkdir(parents=True, exist_ok=True)
    path = out / NAME
    figure.savefig(path, dpi=110, metadata={"Software": None, "Description": digest(shades)})
    plt.close(figure)
    with Image.open(path) as image:  # a few colours are enough, and a quarter of the bytes
        small = image.convert("RGB").quantize(32, dither=Image.Dither.NONE)
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_text("Description", digest(shades))
    small.save(path, optimize=True, pnginfo=told)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    print(draw(parser.parse_args().out))
