"""The order of the data: every window once an epoch, any step by itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twodice.errors import ConfigError
from twodice.random.keys import Key
from twodice.text.batches import BatchPlan


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 25), st.integers(0, 2**64 - 1), st.integers(1, 4))
def test_every_window_is_read_exactly_once_an_epoch(n: int, batch: int, seed: int, epochs: int) -> None:
    plan = BatchPlan(n, batch, Key(seed))
    steps = plan.steps_for(epochs)
    read = np.concatenate([plan.indices(step) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(read[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_a_step_is_a_function_of_key_and_step_alone() -> None:
    plan = BatchPlan(100_000, 7, Key(5))
    later = plan.indices(123_456)
    for step in (0, 99, 20_000):
        plan.indices(step)
    assert (plan.indices(123_456) == later).all() and later.dtype == np.int64
    assert (BatchPlan(100_000, 7, Key(5)).indices(123_456) == later).all()
    assert (BatchPlan(100_000, 7, Key(6)).indices(123_456) != later).any()


def test_epochs_are_in_different_orders_and_batches_cross_their_seam() -> None:
    plan = BatchPlan(10, 4, Key(0))
    read = np.concatenate([plan.indices(step) for step in range(5)])
    assert (read[:10] != read[10:]).any()
    assert plan.epoch(0) == 0 and plan.epoch(5) == 2 and plan.epoch(2) == 0.8


def test_one_batch_may_hold_many_epochs() -> None:
    assert sorted(BatchPlan(2, 6, Key(0)).indices(3)) == [0, 0, 0, 1, 1, 1]


def test_micro_batches_are_slices_of_the_batch() -> None:
    whole, half = BatchPlan(37, 8, Key(1)), BatchPlan(37, 4, Key(1))
    assert (np.concatenate([half.indices(6), half.indices(7)]) == whole.indices(3)).all()


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="the text is too short"):
        BatchPlan(0, 1, Key(0))
    with pytest.raises(ConfigError, match="batch must be at least 1"):
        BatchPlan(1, 0, Key(0))
    for call in (BatchPlan(1, 1, Key(0)).indices, BatchPlan(1, 1, Key(0)).epoch):
        with pytest.raises(ConfigError, match="step must be at least 0"):
            call(-1)
