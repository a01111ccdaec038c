"""The pictures of the docs come out of their script, from real masks and a real model's belief."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    return script("pictures")


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
    for name in ("sampling-settings", "sampling-sizes"):
        assert (ROOT / f"docs/images/{name}.png").stat().st_size < 150_000
