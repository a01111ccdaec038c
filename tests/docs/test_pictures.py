"""The pictures of the docs come out of their script, from real masks and a real model's belief."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_masks_shown_are_nested_and_fall_at_their_rates(pictures: ModuleType) -> None:
    levels = pictures.dropped_levels(64, 512)
    assert set(np.unique(levels)) == {0, 1, 2}
    # 32,768 decisions: the standard deviation is below 0.0023, so ten of them is never reached by chance.
    assert abs((levels == 2).mean() - 0.1) < 0.023 and abs((levels >= 1).mean() - 0.2) < 0.023


def test_two_dice_is_drawn_from_a_model_that_was_trained(pictures: ModuleType, tmp_path: Path) -> None:
    from twodice.training.config import TrainConfig
    from twodice.training.loop import train
    from twodice.training.tokens import store_for

    config = TrainConfig(
        data=("python-docs",), share=0.05, model="gpt2-pico", vocabulary=512, context=32, batch=2, steps=2
    )
    store = store_for(config, tmp_path / "text", begun=False)
    result = train(config, store, tmp_path / "run")
    words, probabilities = pictures.next_token_belief(result.model, pictures.PROMPT)
    assert len(words) == 12 and probabilities[0] == probabilities.max()
    assert probabilities.sum() == pytest.approx(1.0)
    path = pictures.draw(result.model, tmp_path / "images")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_the_pictures_that_the_docs_show_are_there() -> None:
    assert (ROOT / "docs/images/two-dice.png").stat().st_size < 300_000
    assert (ROOT / "docs/images/report.png").stat().st_size < 300_000
