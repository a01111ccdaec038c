"""Draws docs/images/dropout-kinds.png: what each kind and each noise drops, from the masks of a model.

A tiny GPT-2 made from a config is attached once for each panel and run once in train mode; the masks are
those that its sites have used (`masks_seen` of the tests watches them). Every panel shows example 0 of the
batch, but for `layer`, which shows all. The picture carries a digest of what it shows, and a test holds the
one in the docs against the masks of today.
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
from matplotlib.patches import Patch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from transformers import GPT2Config, GPT2LMHeadModel

import twodice

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.masks import masks_seen

INK, MUTED, KEPT, LOUD = "#1d2433", "#6b7485", "#e3e8f0", "#e0902f"
WORDS = "the cat sat on the mat and the dog sat by the cat and the mat".split()
WIDTH, HEADS, LAYERS, EXAMPLES, STEP, SEED = 32, 4, 8, 16, 3, 112
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
    Panel("word=0.2", "transformer.wte#word", "whole words, wherever they stand", ("column", "")),
    Panel("output=0.2", "transformer.ln_f#output", "units of what the last norm gives"),
    Panel("attention=0.2", f"{BLOCK}.attn#attention", "weights, after the softmax", ("key", "query")),
    Panel("key=0.2", f"{BLOCK}.attn#key", "keys, before the softmax, without scale", ("key", "query")),
    Panel(
        "head=0.2", f"{BLOCK}.attn#head", "whole heads, at all positions", ("column (8 a head)", "position")
    ),
    Panel("layer=depth(0.0, 0.5)", "#layer", "whole layers, for each example", ("layer", "example")),
    Panel("residual=0.2", f"{BLOCK}.mlp#residual", "units of what a branch adds"),
    Panel("activation=0.2", f"{BLOCK}.mlp#activation", "units inside the feed-forward"),
    Panel("skip=0.2", f"{BLOCK}.mlp#skip", "units of the stream beside a branch"),
    Panel("weight=0.2", f"{BLOCK}.mlp.c_fc#weight", "entries of a matrix", ("input unit", "output unit")),
    Panel("dropout=0.2", f"{BLOCK}.mlp.dropout#dropout", "units, where the model has nn.Dropout"),
    Panel("residual:feature=0.2", f"{BLOCK}.mlp#residual", "one decision for all positions"),
    Panel("residual:block(8)=0.2", f"{BLOCK}.mlp#residual", "one decision for 8 columns"),
    Panel("residual:gaussian=0.2", f"{BLOCK}.mlp#residual", "factors of mean 1, nothing is zero"),
)


def masks_of_all() -> list[dict[str, torch.Tensor]]:
    """For each panel the mask of every site of its plan in one forward: True where something stays, or the
    factors.
    """
    kinds = sorted(set(WORDS))
    config = GPT2Config(
        vocab_size=len(kinds), n_embd=WIDTH, n_inner=WIDTH, n_head=HEADS, n_layer=LAYERS,
        n_positions=len(WORDS), bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    ids = torch.tensor([kinds.index(word) for word in WORDS]).expand(EXAMPLES, -1)
    found = []
    for panel in PANELS:
        handle = twodice.attach(model, panel.plan, seed=SEED)
        try:
            with pytest.MonkeyPatch.context() as patch, masks_seen(patch) as seen, handle.step(STEP):
                model(input_ids=ids)
        finally:
            handle.detach()
        found.append({site: masks[0] for site, masks in seen.items()})
    return found


def shown(panel: Panel, masks: dict[str, torch.Tensor]) -> np.ndarray:
    """One minus the factor of each cell: 1 where it is dropped, 0 where it stays, NaN where nothing is.

    The scale 1 / (1 - p) of what stays is left out, but for Gaussian noise, whose factors are cut at 2.
    """
    if panel.site == "#layer":  # the first layer has rate 0, and so no mask
        of_layer = [masks.get(f"transformer.h.{i}#layer") for i in range(LAYERS)]
        columns = [torch.ones(EXAMPLES, dtype=torch.bool) if m is None else m[:, 0, 0] for m in of_layer]
        return 1.0 - torch.stack(columns, 1).double().numpy()
    mask = masks[panel.site]
    if mask.is_floating_point():
        return (1 - mask[0].double()).clamp(min=-1).numpy()
    if mask.dim() == 4:
        mask = mask[0, 0]
        seen = torch.ones_like(mask).tril()
        if panel.site.endswith("#key"):  # a query that would lose all its keys keeps them
            mask = mask | ~(mask & seen).any(-1, keepdim=True)
        return torch.where(seen, (~mask).double(), torch.nan).numpy()
    return (~(mask if mask.dim() == 2 else mask[0])).double().numpy()


def digest(cells: list[np.ndarray]) -> str:
    """A SHA-256 of what the panels show and say."""
    whole = hashlib.sha256()
    for panel, cell in zip(PANELS, cells, strict=True):
        whole.update(f"{panel} {cell.shape}".encode())
        # In 127 steps: the factors of Gaussian noise are exact, but need not be so for a picture.
        whole.update(np.nan_to_num(np.round(cell * 127), nan=-128).astype(np.int8).tobytes())
    return whole.hexdigest()


def digest_of(path: Path) -> str:
    """The digest of the masks that a picture was drawn from."""
    with Image.open(path) as image:
        return str(image.info["Description"])


def draw(masks: list[dict[str, torch.Tensor]], out: Path) -> Path:
    """Write the picture into `out` and return its path."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 8, "text.color": INK})
    figure, grid = plt.subplots(4, 4, figsize=(10.5, 9.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06, hspace=0.05, wspace=0.03)
    colours = LinearSegmentedColormap.from_list("dropped", [LOUD, KEPT, INK])
    cells = [shown(panel, of) for panel, of in zip(PANELS, masks, strict=True)]
    for panel, cell, axes in zip(PANELS, cells, grid.flat, strict=True):
        axes.pcolormesh(cell[::-1], cmap=colours, vmin=-1, vmax=1, edgecolors="white", linewidth=0.5)
        axes.set_title(panel.plan, loc="left", fontsize=9.5, fontweight="bold", color=INK, pad=16)
        axes.text(0, 1.03, panel.said, transform=axes.transAxes, color=MUTED)
        axes.set_xlabel(panel.axes[0], color=MUTED, labelpad=3)
        axes.set_ylabel(panel.axes[1], color=MUTED, labelpad=3)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        if panel.plan.startswith("word"):
            axes.set_yticks(np.arange(len(WORDS)) + 0.5, WORDS[::-1], fontsize=6.5)
            axes.tick_params(length=0, pad=1, colors=MUTED)
    legend = [
        Patch(color=INK, label="dropped: times 0"),
        Patch(color=KEPT, label="kept: times 1 / (1 - p)"),
        Patch(color=LOUD, label="Gaussian noise alone: times 2 or more"),
    ]
    figure.legend(
        handles=legend, loc="outside upper left", ncols=3, frameon=False, handlelength=1, handleheight=1
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / NAME
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    with Image.open(path) as image:  # a few colours are enough, and a quarter of the bytes
        small = image.convert("RGB").quantize(48, dither=Image.Dither.NONE)
    told = PngInfo()
    told.add_text("Description", digest(cells))
    small.save(path, optimize=True, pnginfo=told)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    print(draw(masks_of_all(), parser.parse_args().out))
