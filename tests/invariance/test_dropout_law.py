"""The law at every kind of site: a step's masks do not depend on how the step is run.

All kinds at once, in a GPT-2 and a Llama. Masks are compared exactly, losses and gradients to the order of
summation. Ranks are in `test_dropout_ranks`, single kinds and traps in `test_dropout_masks`.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.masks import masks_seen
from tests.support.rank_runs import EVERY
from tests.support.tiny_models import FAMILIES, ROWS, gradients, loss_of, tiny_model, tokens
from torch import nn

import twodice

TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}  # float32 sums of some thousand terms, added in another order
STEP = 5
Masks = dict[str, list[torch.Tensor]]
Result = tuple[torch.Tensor, dict[str, torch.Tensor], Masks]


def attach(model: nn.Module, plan: str = EVERY, **settings: Any) -> twodice.Handle:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # twins of one seed are what these tests are about
        return twodice.attach(model, plan, seed=11, **settings)


def run(
    family: str,
    *,
    rows: int = ROWS,
    order: torch.Tensor | None = None,
    plan: str = EVERY,
    checkpoint: dict[str, Any] | None = None,
    before: Callable[[nn.Module, twodice.Handle], None] | None = None,
) -> Result:
    """One step in micro-batches of `rows`, its examples in any order: loss, gradients, masks by call."""
    model, ids = tiny_model(family), tokens()
    if checkpoint is not None:
        model.activation_checkpointing_enable(checkpoint)
    handle = attach(model, plan)
    if before is not None:
        before(model, handle)
    order = torch.arange(ROWS) if order is None else order
    loss = torch.zeros(())
    with pytest.MonkeyPatch.context() as patch, masks_seen(patch) as seen:
        for slots in order.split(rows):
            with handle.step(STEP, examples=slots):
                part = loss_of(model, ids[slots]) * rows / ROWS
                part.backward()
            loss += part.detach()
    handle.detach()
    return loss, gradients(model), seen


def by_row(seen: Masks, order: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Masks by site in the order of their slots; those of weights, which all rows share, once."""
    found = {}
    for site, masks in seen.items():
        if site.endswith("#weight"):
            assert all(torch.equal(masks[0], mask) for mask in masks), site
            found[site] = masks[0]
        else:
            found[site] = torch.cat(masks)
            if order is not None:
                found[site] = found[site][order.argsort()]
    return found


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys() and len(one) >= 30
    assert not [site for site in one if not torch.equal(one[site], two[site])]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [4, 1])
def test_every_kind_has_the_same_masks_in_micro_batches_of_permuted_examples(family: str, rows: int) -> None:
    """8 x 1 in order against 4 x 2 and 1 x 8 with the examples in another order."""
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    loss, grads, seen = run(family)
    other_loss, other_grads, other_seen = run(family, rows=rows, order=order)
    assert_same(by_row(seen), by_row(other_seen, order))
    torch.testing.assert_close(other_loss, loss, **TOLERANCE)
    torch.testing.assert_close(other_grads, grads, **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_every_kind_is_recomputed_with_its_masks_without_a_generator_state(
    family: str, reentrant: bool
) -> None:
    """The recomputation is seen to happen: sites of blocks have two calls, with one mask."""
    loss, grads, seen = run(family)
    checkpoint = {"use_reentrant": reentrant, "preserve_rng_state": False}
    other_loss, other_grads, other_seen = run(family, checkpoint=checkpoint)
    assert torch.equal(other_loss, loss)
    # A reentrant checkpoint adds the gradients of its two branches in another order.
    torch.testing.assert_close(other_grads, grads, **(TOLERANCE if reentrant else {"rtol": 0, "atol": 0}))
    twice = 0
    for site, masks in other_seen.items():
        assert all(torch.equal(mask, seen[site][0]) for mask in masks), site
        twice += len(masks) == 2 * len(seen[site])
    assert twice >= 24


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_has_the_same_masks_in_the_readable_twins(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native against reference: masks exactly, sums to their order."""
    from twodice.kernels import dispatch, dropout, noise

    if dispatch.native is None:
        pytest.skip("there are no native kernels to compare")
    loss, grads, seen = run(family)
    from twodice.kernels import attention_blocks

    monkeypatch.setattr(dispatch, "native", None)
    for module in (dropout, noise, attention_blocks):
        if hasattr(module, "_native"):
            monkeypatch.setattr(module, "_native", None)
    other_loss, other_grads, other_seen = run(family)
    assert_same(by_row(seen), by_row(other_seen))
    torch.testing.assert_close(other_loss, loss, **TOLERANCE)
    torch.testing.assert_close(other_grads, grads, **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_has_its_masks_whatever_ran_before(family: str) -> None:
    """What a resume rests on: nothing is counted. In one of the two, other steps, another draw, a step that
    fails and an evaluation come before.
    """

    def busy(model: nn.Module, handle: twodice.Handle) -> None:
        for step, draw in ((0, 0), (STEP, 1), (9, 0)):
            with handle.step(step, examples=torch.arange(3), draw=draw):
                model(input_ids=tokens(3))
        with pytest.raises(RuntimeError, match="in the middle"), handle.step(STEP):
            raise RuntimeError("in the middle")
        model.eval()(input_ids=tokens(2))
        model.train()

    loss, grads, seen = run(family)
    other_loss, other_grads, other_seen = run(family, before=busy)
    assert_same(by_row(seen), by_row(other_seen))
    assert torch.equal(other_loss, loss)
    torch.testing.assert_close(other_grads, grads, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_compiled_has_the_loss_and_gradients_of_eager(family: str) -> None:
    """aot_eager: the graph with its own autograd. Saboteur: another step."""
    model, ids = tiny_model(family, layers=1), tokens(4)
    handle = attach(model)
    compiled = torch.compile(model, backend="aot_eager")
    found = []
    for called, step in ((model, 3), (compiled, 3), (compiled, 4)):
        model.zero_grad()
        with handle.step(step, examples=[9, 2, 4, 7]):
            loss = loss_of(called, ids)
            loss.backward()
        found.append((loss.detach(), gradients(model)))
    handle.detach()
    torch._dynamo.reset()
    torch.testing.assert_close(found[1], found[0], **TOLERANCE)
    assert not any(torch.allclose(g, found[0][1][name], rtol=1e-2) for name, g in found[2][1].items())


def packed(ids: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    """The first `lengths` tokens of each row, one after the other in a single row."""
    row = torch.cat([ids[i, :n] for i, n in enumerate(lengths)])[None]
    example = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    allowed = (example[0][:, None] == example[0]) & (position[0][:, None] >= position[0])
    return {"ids": row, "examples": example, "positions": position, "mask": allowed[None, None]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sequences_have_the_masks_of_padded_ones(family: str, attention: str) -> None:
    """Examples (B, T) and positions (B, T), not places in memory: each sequence of a packed row has the
    logits that it has in a row of its own. Saboteur: one example for the whole row.
    """
    ids, lengths, slots = tokens(3), [5, 9, 7], torch.tensor([6, 1, 4])
    model = tiny_model(family, attn_implementation=attention)
    handle = attach(model, EVERY if attention == "sdpa" else EVERY.replace("key=0.1, ", ""))
    with handle.step(STEP, examples=slots):
        alone = model(input_ids=ids, use_cache=False).logits
    row = packed(ids, lengths)
    mask = row["mask"]
    if attention == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)

    def together(examples: torch.Tensor) -> torch.Tensor:
        with handle.step(STEP, examples=examples):
            found = model(
                input_ids=row["ids"], attention_mask=mask, position_ids=row["positions"], use_cache=False
            )
        return found.logits[0]

    logits = together(slots[row["examples"]]).split(lengths)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(logits[i], alone[i, :n], **TOLERANCE)
    wrong = together(slots[:1, None].expand_as(row["examples"])).split(lengths)
    torch.testing.assert_close(wrong[0], alone[0, :5], **TOLERANCE)
    assert not torch.allclose(wrong[2], alone[2, :7], rtol=1e-2)
    handle.detach()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropped_keys_show_no_hidden_ones(attention: str) -> None:
    """Where all keys that a query may see are dropped, it must not see the future instead."""
    model, ids = tiny_model("llama", attn_implementation=attention), tokens(4)
    other = ids.clone()
    other[:, 6:] = 3
    handle = attach(model, "key=0.5")
    found = []
    for given in (ids, other):
        with handle.step(0, examples=range(4)):
            found.append(model(input_ids=given, use_cache=False).logits[:, :6])
    handle.detach()
    assert torch.equal(*found)


NESTED = (
    EVERY,
    "residual:feature=0.1, activation:block(8)=0.1, embedding:feature+block(4)=0.1, layer:batch=0.1",
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", NESTED)
def test_what_a_smaller_rate_drops_a_larger_drops_too_at_every_kind_of_site(family: str, plan: str) -> None:
    """p = 0.1 against 0.2 and 0.6, at all kinds and noises but the Gaussian, which drops nothing."""
    dropped: list[dict[str, torch.Tensor]] = []
    for rate in ("0.1", "0.2", "0.6"):
        model = tiny_model(family)
        handle = attach(model, plan.replace("0.1", rate))
        with pytest.MonkeyPatch.context() as patch, masks_seen(patch) as seen:
            for step in range(3):
                with handle.step(step, examples=range(ROWS)):
                    model(input_ids=tokens())
        handle.detach()
        dropped.append({site: ~torch.stack(masks) for site, masks in seen.items() if len(masks) == 3})
    grown = set()
    for small, large in itertools.pairwise(dropped):
        for site in small.keys() & large.keys():
            assert not (small[site] & ~large[site]).any(), site
            if small[site].sum() < large[site].sum():
                grown.add(site.rpartition("#")[2])
    assert grown >= {entry.partition("=")[0].partition(":")[0].strip() for entry in plan.split(",")} - {
        "layer"
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_layers_that_a_smaller_rate_leaves_out_a_larger_leaves_out_too(family: str) -> None:
    """`layer:batch` leaves no mask behind: seen by the gradients of its parameters."""

    def out(rate: float) -> set[tuple[int, str]]:
        found = set()
        model = tiny_model(family, layers=4)
        handle = attach(model, f"layer:batch={rate}")
        for step in range(8):
            model.zero_grad()
            with handle.step(step):
                loss_of(model, tokens(2)).backward()
            for name, grad in gradients(model).items():
                if name.endswith(("mlp.c_fc.weight", "mlp.up_proj.weight")) and not grad.any():
                    found.add((step, name))
        handle.detach()
        return found

    small, large = out(0.2), out(0.6)
    assert small < large and 0 < len(small) < len(large) < 32
