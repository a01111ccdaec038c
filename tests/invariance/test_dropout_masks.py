"""The same masks for any split of the batch, any recomputation and any order; other masks for anything else.

Masks are compared exactly (through `Site.drop`'s inputs and outputs), losses and gradients to the order
of summation.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tests.support.masks import masks_seen
from tests.support.model_zoo import ZOO
from tests.support.tiny_models import ALL_KINDS, FAMILIES, ROWS, gradients, loss_of, tiny_model, tokens
from torch import nn

import twodice
from twodice.dropout.handle import Handle

TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}  # float32 sums of some thousand terms, added in another order


@contextmanager
def attached(
    model: nn.Module, plan: str = ALL_KINDS, seed: int = 11, total_steps: int | None = None
) -> Iterator[Handle]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # twins of one seed are what these tests are about
        handle = twodice.attach(model, plan, seed=seed, total_steps=total_steps)
    try:
        yield handle
    finally:
        handle.detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_and_gradients_are_the_same_for_any_microbatch_split(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens()
    results = []
    for rows in (8, 2, 1):
        model = tiny_model(family)
        with attached(model) as handle, masks_seen(monkeypatch) as seen:
            loss = torch.zeros(())
            for micro in range(ROWS // rows):
                slots = micro * rows + torch.arange(rows)
                with handle.step(5, examples=slots):
                    part = loss_of(model, ids[slots]) * rows / ROWS
                    part.backward()
                    loss = loss + part.detach()
        results.append((loss, gradients(model), {name: torch.cat(masks) for name, masks in seen.items()}))
    loss, grads, masks = results[0]
    assert len(masks) == 10
    for other_loss, other_grads, other_masks in results[1:]:
        assert all(torch.equal(masks[name], other_masks[name]) for name in masks)
        torch.testing.assert_close(other_loss, loss, **TOLERANCE)
        torch.testing.assert_close(other_grads, grads, **TOLERANCE)


def test_permuted_examples_keep_their_masks() -> None:
    ids, order = tokens(), torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    model = tiny_model()
    with attached(model) as handle:
        with handle.step(2, examples=torch.arange(ROWS)):
            straight = model(input_ids=ids).logits
        with handle.step(2, examples=order):
            permuted = model(input_ids=ids[order]).logits
    torch.testing.assert_close(permuted, straight[order], **TOLERANCE)


def test_left_padding_moves_no_mask() -> None:
    """Positions come from position_ids: a padded row has the masks of the bare one."""
    ids = tokens(2, 9)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for family in FAMILIES:
        for attention in ("sdpa", "eager"):
            model = tiny_model(family, attn_implementation=attention)
            with attached(model) as handle:
                with handle.step(2):
                    bare = model(input_ids=ids).logits
                with handle.step(2):
                    full = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
            torch.testing.assert_close(full[:, 3:], bare, **TOLERANCE)


def test_positions_stay_absolute_behind_a_cache() -> None:
    ids = tokens(2, 9)
    for family in FAMILIES:
        model = tiny_model(family)
        with attached(model) as handle:
            slots = [4, 2]
            with handle.step(2, examples=slots):
                whole = model(input_ids=ids, use_cache=True).logits
            with handle.step(2, examples=slots):
                first = model(input_ids=ids[:, :5], use_cache=True)
            with handle.step(2, examples=slots):
                second = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(first.logits, whole[:, :5], **TOLERANCE)
        torch.testing.assert_close(second.logits, whole[:, 5:], **TOLERANCE)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_forwards_before_one_backward_are_right_with_checkpointing(
    family: str, backward_inside: bool, reentrant: bool
) -> None:
    ids = tokens(4)
    found = []
    for checkpointed in (False, True):
        model = tiny_model(family)
        with attached(model) as handle:
            if checkpointed:
                model.activation_checkpointing_enable({"use_reentrant": reentrant})
            if backward_inside:
                with handle.step(3, examples=range(4)):
                    (loss_of(model, ids) + 2 * loss_of(model, ids.flip(0))).backward()
            else:
                with handle.step(3, examples=range(4)):
                    one = loss_of(model, ids)
                with handle.step(4, examples=range(4), draw=1):
                    two = loss_of(model, ids.flip(0))
                (one + 2 * two).backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_recomputation_with_other_masks_would_be_seen() -> None:
    """Saboteur: a recomputation that enters another step's frame changes the gradients."""
    model = tiny_model()
    with attached(model) as handle:
        model.activation_checkpointing_enable({"use_reentrant": False})
        found = []
        for broken in (False, True):
            model.zero_grad()
            with handle.step(3, examples=range(4)):
                loss = loss_of(model, tokens(4))
                if broken:
                    keys = handle._state.snapshot.keys  # type: ignore[union-attr]
                    keys.first = tuple(key.child("other") for key in keys.first)
                loss.backward()
            found.append(gradients(model))
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_a_smaller_rate_lie_within_those_of_a_larger(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = []
    for rate in (0.1, 0.2):
        model = tiny_model(family)
        with attached(model, ALL_KINDS.replace("0.1", str(rate))) as handle, masks_seen(monkeypatch) as seen:
            with handle.step(0):
                model(input_ids=tokens())
        dropped.append({name: ~masks[0] for name, masks in seen.items()})
    small, large = dropped
    for name in small:
        assert not (small[name] & ~large[name]).any(), name
        assert small[name].sum() < large[name].sum(), name


def test_masks_differ_by_step_seed_draw_site_and_example(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()

    def masks(seed: int, step: int, draw: int = 0, examples: object = None) -> dict[str, torch.Tensor]:
        with attached(model, "residual=0.5", seed) as handle, masks_seen(monkeypatch) as seen:
            with handle.step(step, examples=examples, draw=draw):
                model(input_ids=tokens(2))
        return {name: found[0] for name, found in seen.items()}

    first = masks(1, 0)
    assert len(first) == 4 and len({str(mask.tolist()) for mask in first.values()}) == 4
    assert all(not torch.equal(mask[0], mask[1]) for mask in first.values())
    again = masks(1, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in (masks(2, 0), masks(1, 1), masks(1, 0, draw=1), masks(1, 0, examples=[7, 8])):
        assert all(not torch.equal(first[name], other[name]) for name in first)


def test_attention_columns_are_positions_of_keys_and_heads_are_query_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    with attached(model, "attention=0.5") as handle, masks_seen(monkeypatch) as seen:
        with handle.step(0):
            model(input_ids=tokens(2, 6))
        with handle.step(0):
            model(input_ids=tokens(2, 4), position_ids=torch.arange(2, 6)[None])
    for whole, part in seen.values():
        assert whole.shape == (2, 4, 6, 6) and not torch.equal(whole[:, 0], whole[:, 1])
        assert torch.equal(part, whole[:, :, 2:, 2:])


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_path_is_the_model_s_own_attention_when_almost_nothing_drops(
    family: str, attention: str
) -> None:
    """p = 2^-16 drops one weight in 65536 (none of these, seed 1): what is left is the factor 1 + 2^-16."""
    window = {"sliding_window": 5} if family == "mistral" else {}
    ids, mask = tokens(4), torch.ones(4, 12, dtype=torch.int64)
    mask[1, :4] = 0
    model = tiny_model(family, attn_implementation=attention, **window)
    for given in (None, mask):
        plain = model(input_ids=ids, attention_mask=given).logits
        with attached(model, {"attention": 2.0**-16}, seed=1) as handle, handle.step(0):
            ours = model(input_ids=ids, attention_mask=given).logits
        where = mask.bool() if given is not None else torch.ones_like(mask).bool()
        torch.testing.assert_close(ours[where], plain[where], rtol=0, atol=2e-4)


def test_a_shared_module_has_other_masks_at_each_visit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.drop(x), self.drop(x)

    model, x = Twice(), torch.ones(2, 3, 64)
    with attached(model, "dropout=0.5", seed=7) as handle, handle.step(1):
        first, second = model(x)
    assert not torch.equal(first, second)
    for visit, y in enumerate((first, second)):
        key = twodice.Key(7).child("dropout", "drop#dropout", 0, visit)
        torch.testing.assert_close(y, twodice.dropout(x, 0.5, key=key, step=1), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_steps_have_the_masks_of_eager_ones_and_schedules_never_recompile(family: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    plan = (
        "embedding=linear(0.5, 0.0), attention=early(0.2, 5), residual=0.1, activation=late(0.2, 9), "
        "output=0.1"
    )
    model, ids = tiny_model(family, layers=1), tokens(4)
    with attached(model, plan, total_steps=20) as handle:
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter)
        for step in range(20):
            slots = 4 * step + torch.arange(4)
            found = []
            for called in (compiled, model) if step in (0, 4, 7, 12) else (compiled,):
                model.zero_grad()
                with handle.step(step, examples=slots):
                    loss = loss_of(called, ids)
                    loss.backward()
                found.append((loss.detach(), gradients(model)))
            torch.testing.assert_close(found[0], found[-1], **TOLERANCE)
        assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "BERT"])
def test_inductor_gives_the_masks_loss_and_gradients_of_eager(name: str) -> None:
    """The real compiler. What the last norm gives is dropped last, so that its mask stands in the last hidden
    states as zeros, and is compared exactly. Saboteur: another step.
    """
    model, batch = ZOO[name]()
    plan = "embedding=0.1, attention=0.1, residual=0.1, activation=0.1, output=0.3"
    with attached(model, plan) as handle:
        compiled = torch.compile(model)
        for step in range(3):
            found = []
            for called, at in ((model, step), (compiled, step), (model, step + 9)):
                model.zero_grad()
                with handle.step(at, examples=[5, 0, 8]):
                    result = called(**batch, output_hidden_states=True)
                    result.loss.backward()
                dropped = result.hidden_states[-1] == 0
                found.append((dropped, result.loss.detach(), gradients(model)))
            (eager, *numbers), (fast, *others), (sabotaged, *_) = found
            assert torch.equal(fast, eager) and 0.1 < eager.float().mean() < 0.5
            assert not torch.equal(sabotaged, eager)
            torch.testing.assert_close(others, numbers, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
