"""One step is the same for every split into micro-batches, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.training_runs import PLAN, tiny_config, tiny_store

from twodice.text.store import TokenStore
from twodice.training.budget import resolve
from twodice.training.models import build_model
from twodice.training.step import TrainingStep, make_arithmetic

CPU = torch.device("cpu")
Make = Callable[..., TrainingStep]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return tiny_store(tmp_path_factory.mktemp("split") / "tokens")


@pytest.fixture
def step_of(store: TokenStore) -> Iterator[Callable[..., TrainingStep]]:
    """Makes a step, one at a time attached: each closes the one before."""
    made: list[TrainingStep] = []

    def make(**changes: Any) -> TrainingStep:
        config = resolve(tiny_config(**changes), store).config
        model, _ = build_model(config, store)
        for before in made:
            before.close()
        made.append(TrainingStep(config, store, model.train(), CPU, make_arithmetic(CPU, "float32")))
        return made[-1]

    yield make
    for step in made:
        step.close()


def gradients(step: TrainingStep, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    loss = step.gradients(number, lambda: False)
    return loss, torch.cat([p.grad.flatten() for p in step.parameters if p.grad is not None])


@pytest.mark.parametrize("model", ["gpt2-nano", "llama-nano"])
@pytest.mark.parametrize("dropout", ["none", PLAN])
def test_loss_and_gradients_are_the_same_for_any_split_into_micro_batches(
    step_of: Make, model: str, dropout: str
) -> None:
    """1 x 8, 2 x 4, 4 x 2 and 8 x 1: the same rows, the same masks, the sums in another order."""
    loss, whole = gradients(step_of(model=model, dropout=dropout, accumulate=1), 3)
    for accumulate in (2, 4, 8):
        other_loss, split = gradients(step_of(model=model, dropout=dropout, accumulate=accumulate), 3)
        assert torch.allclose(other_loss, loss, rtol=1e-6)
        # Relative to the largest gradient: 1e-6 is some ten units in the last place of float32.
        assert float((split - whole).abs().max() / whole.abs().max()) < 2e-6


def test_rows_numbered_within_the_micro_batch_would_be_found_out(step_of: Make) -> None:
    """Saboteur: every micro-batch takes the masks of the first one, the trap that others fall into."""
    _loss, whole = gradients(step_of(dropout=PLAN), 3)
    step = step_of(dropout=PLAN, accumulate=2)
    step.examples = [step.examples[0], step.examples[0]]
    _, split = gradients(step, 3)
    assert float((split - whole).abs().max() / whole.abs().max()) > 1e-2


def test_a_step_is_a_function_of_its_number_and_not_of_those_before(step_of: Make) -> None:
    """Without an update between them, step 5 gives the same gradients first or after others."""
    one, a = gradients(step_of(dropout=PLAN), 5)
    second = step_of(dropout=PLAN)
    for number in (0, 9, 2):
        gradients(second, number)
    two, b = gradients(second, 5)
    assert torch.equal(one, two) and torch.equal(a, b)


def test_seeds_give_other_weights_other_batches_and_other_masks(step_of: Make) -> None:
    one, two = step_of(dropout=PLAN, seed=0), step_of(dropout=PLAN, seed=1)
    assert not torch.equal(one.parameters[0], two.parameters[0])
    assert not torch.equal(one.batch(0)[0], two.batch(0)[0])


def test_the_plan_of_dropout_changes_neither_the_weights_nor_the_batches(step_of: Make) -> None:
    """Arms of a study are paired by seed: they differ in nothing but the plan."""
    one, two = step_of(), step_of(dropout=PLAN)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters, two.parameters, strict=True))
    for number in (0, 4):
        assert torch.equal(one.batch(number)[0], two.batch(number)[0])


def test_another_draw_of_dropout_changes_the_masks_and_nothing_else(step_of: Make) -> None:
    one, first = gradients(step_of(dropout=PLAN), 3)
    again = step_of(dropout=PLAN, dropout_draw=1)
    batch = again.batch(3)[0]
    two, second = gradients(again, 3)
    assert not torch.equal(one, two) and not torch.equal(first, second)
    without, other = step_of(), step_of(dropout_draw=1)
    assert torch.equal(batch, without.batch(3)[0])
    assert all(torch.equal(p, q) for p, q in zip(without.parameters, other.parameters, strict=True))
    assert torch.equal(gradients(without, 3)[1], gradients(other, 3)[1])


def test_the_callers_generator_is_left_as_it_was(store: TokenStore, tmp_path: Path) -> None:
    from twodice.training.loop import train

    before = torch.get_rng_state()
    train(tiny_config(steps=2, dropout=PLAN), store, tmp_path / "run", export=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_decay_is_on_matrices_only(step_of: Make) -> None:
    groups = step_of().optimizer.param_groups
    assert {p.ndim for p in groups[0]["params"]} == {2} and groups[0]["weight_decay"] == 0.1
    assert {p.ndim for p in groups[1]["params"]} == {1} and groups[1]["weight_decay"] == 0.0


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(step_of: Make) -> None:
    from twodice.errors import TwodiceError

    step = step_of()
    step(0, lambda: False)
    with torch.no_grad():
        step.parameters[0][0, 0] = float("nan")
    before = [p.clone() for p in step.parameters]
    with pytest.raises(TwodiceError, match="must be finite; at step 1 the loss is nan"):
        step(1, lambda: False)
    assert all(
        torch.equal(p, q) or torch.isnan(p).any() for p, q in zip(step.parameters, before, strict=True)
    )
