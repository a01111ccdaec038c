"""The pictures of the docs come out of their script, from real masks and a real model's belief."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from twodice.dropout.plan import KINDS, DropoutPlan

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    return script("pictures")


@pytest.fixture(scope="module")
def of_dropout() -> ModuleType:
    return script("pictures_dropout")


@pytest.fixture(scope="module")
def masks(of_dropout: ModuleType) -> dict[str, dict[str, torch.Tensor]]:
    """Plan of a panel -> site -> mask."""
    plans = [panel.plan for panel in of_dropout.PANELS]
    return dict(zip(plans, of_dropout.masks_of_all(), strict=True))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from twodice.training.config import TrainConfig
    from twodice.training.loop import train
    from twodice.training.tokens import store_for

    folder = tmp_path_factory.mktemp("trained")
    config = TrainConfig(
        data=("python-docs",), share=0.05, model="gpt2-pico", vocabulary=512, context=32, batch=2, steps=2
    )
    return train(config, store_for(config, folder / "text", begun=False), folder / "run").model


def test_the_masks_shown_are_nested_and_fall_at_their_rates(pictures: ModuleType) -> None:
    levels = pictures.dropped_levels(64, 512)
    assert set(np.unique(levels)) == {0, 1, 2}
    # 32,768 decisions: the standard deviation is below 0.0023, so ten of them is never reached by chance.
    assert abs((levels == 2).mean() - 0.1) < 0.023 and abs((levels >= 1).mean() - 0.2) < 0.023


def test_two_dice_is_drawn_from_a_model_that_was_trained(
    pictures: ModuleType, model: Path, tmp_path: Path
) -> None:
    words, probabilities = pictures.next_token_belief(model, pictures.PROMPT)
    assert len(words) == 12 and probabilities[0] == probabilities.max()
    assert probabilities.sum() == pytest.approx(1.0)
    path = pictures.draw(model, tmp_path / "images")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_the_pictures_of_sampling_show_what_is_drawn_from(model: Path, tmp_path: Path) -> None:
    sampling = script("pictures_sampling")
    _words, logits = sampling.logits_along(model)
    for settings in sampling.PANELS:
        drawn, found = sampling.drawn_from(logits[5], settings)
        assert float(drawn.sum()) == pytest.approx(1.0) and int((drawn > 0).sum()) == found.kept
        assert float(-(drawn * drawn.clamp(min=1e-300).log()).sum()) == pytest.approx(found.entropy, rel=1e-9)
    for settings in sampling.SIZES:
        assert sampling.sizes_along(logits, settings)[5] == sampling.drawn_from(logits[5], settings)[1].kept
    paths = sampling.draw(model, tmp_path / "images")
    assert [path.name for path in paths] == ["sampling-settings.png", "sampling-sizes.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_the_pictures_that_the_docs_show_are_there() -> None:
    assert (ROOT / "docs/images/two-dice.png").stat().st_size < 300_000
    assert (ROOT / "docs/images/report.png").stat().st_size < 300_000
    assert (ROOT / "docs/images/dropout-kinds.png").stat().st_size < 100_000
    for name in ("sampling-settings", "sampling-sizes"):
        assert (ROOT / f"docs/images/{name}.png").stat().st_size < 150_000


def test_every_kind_and_every_noise_has_a_panel(of_dropout: ModuleType) -> None:
    entries = [DropoutPlan.parse(panel.plan).entries[0] for panel in of_dropout.PANELS]
    assert {entry.kind for entry in entries} == set(KINDS)
    assert {"", "feature", "block(8)", "gaussian"} == {entry.noise for entry in entries}


# What one decision counts for in (B, T, C), (B, H, T, S) or a matrix: decisions of one mask of 16 examples.
DECISIONS = {
    "embedding=0.2": 16 * 16 * 32,
    "token=0.2": 16 * 16,
    "word=0.2": 16 * 8,
    "output=0.2": 16 * 16 * 32,
    "attention=0.2": 16 * 4 * 16 * 16,
    "key=0.2": 16 * 4 * 16 * 16,
    "head=0.2": 16 * 4,
    "residual=0.2": 16 * 16 * 32,
    "activation=0.2": 16 * 16 * 32,
    "skip=0.2": 16 * 16 * 32,
    "weight=0.2": 32 * 32,
    "dropout=0.2": 16 * 16 * 32,
    "residual:feature=0.2": 16 * 32,
    "residual:block(8)=0.2": 16 * 16 * 4,
}


def within(share: float, p: float, decisions: int) -> bool:
    """Whether a share is within five standard deviations of its rate (1e-6 by chance; the seed is fixed)."""
    return abs(share - p) < 5 * (p * (1 - p) / decisions) ** 0.5


def test_what_is_drawn_falls_at_the_rates_of_its_plan(
    of_dropout: ModuleType, masks: dict[str, dict[str, torch.Tensor]]
) -> None:
    site = {panel.plan: panel.site for panel in of_dropout.PANELS}
    for plan, decisions in DECISIONS.items():
        mask = masks[plan][site[plan]]
        if plan == "word=0.2":  # a word counts once, however often it stands there
            first = [of_dropout.WORDS.index(word) for word in sorted(set(of_dropout.WORDS))]
            mask = mask[:, first]
        assert within(1 - mask.double().mean().item(), 0.2, decisions), plan
    assert not within(0.2 + 0.04, 0.2, DECISIONS["residual=0.2"]), "a rate of 0.24 would be found"
    of_layer = [masks["layer=depth(0.0, 0.5)"][f"transformer.h.{i}#layer"] for i in range(1, 8)]
    shares = [1 - mask[:, 0, 0].double().mean().item() for mask in of_layer]
    assert within(sum(shares) / 7, 0.5 * 4 / 7, 7 * 16) and sum(shares[:3]) < sum(shares[4:])
    factors = masks["residual:gaussian=0.2"][site["residual:gaussian=0.2"]].double()
    deviation = 0.5 / factors.numel() ** 0.5  # s^2 = 0.2 / 0.8
    assert abs(factors.mean() - 1) < 5 * deviation and abs(factors.var() - 0.25) < 5 * 0.71 * deviation


def test_what_is_drawn_falls_together_where_its_panel_says_so(
    of_dropout: ModuleType, masks: dict[str, dict[str, torch.Tensor]]
) -> None:
    drawn = {p.plan: of_dropout.shown(p, masks[p.plan]) for p in of_dropout.PANELS}
    words = np.array(of_dropout.WORDS)
    for plan in ("token=0.2", "word=0.2"):
        assert (drawn[plan] == drawn[plan][:, :1]).all(), "a position falls with all its columns"
    fallen = set(words[drawn["word=0.2"][:, 0] == 1])
    assert fallen and not fallen & set(words[drawn["word=0.2"][:, 0] == 0]), "a word falls wherever it stands"
    for plan in ("head=0.2", "residual:feature=0.2"):
        assert (drawn[plan] == drawn[plan][:1]).all(), "a column falls at all positions"
    for plan in ("head=0.2", "residual:block(8)=0.2"):
        blocks = drawn[plan].reshape(16, 4, 8)
        assert (blocks == blocks[..., :1]).all(), "eight columns fall together"
    for plan in ("attention=0.2", "key=0.2"):
        assert (np.isnan(drawn[plan]) == ~np.tril(np.ones((16, 16), bool))).all(), "the future is not there"
    assert not (drawn["residual:gaussian=0.2"] == 1).any(), "Gaussian noise drops nothing"
    per_unit = drawn["residual=0.2"].reshape(16, 4, 8)
    assert not (per_unit == per_unit[..., :1]).all() and not (per_unit == per_unit[:1]).all()


def test_the_picture_in_the_docs_is_that_of_today_s_masks(
    of_dropout: ModuleType, masks: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    path = of_dropout.draw(list(masks.values()), tmp_path)
    drawn = of_dropout.digest_of(path)
    assert drawn == of_dropout.digest_of(ROOT / "docs" / "images" / of_dropout.NAME), (
        "run python docs/pictures_dropout.py"
    )
    with Image.open(path) as image:
        assert min(image.size) > 1000 and len(image.convert("RGB").getcolors(1 << 20) or []) > 8
