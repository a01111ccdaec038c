"""Two models, or two passes of one, share masks by sharing key and step, and do not where that is not meant.

The preference loss is that of Rafailov et al. 2023, "Direct Preference Optimization", equation 7:
``-log sigmoid(beta (log pi(w)/ref(w) - log pi(l)/ref(l)))``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.support.tiny_models import ALL_KINDS, FAMILIES, gradients, loss_of, tiny_model, tokens
from torch import nn

import twodice
from twodice.errors import ConfigError

BETA = 0.5
PAIRS = 4


@pytest.fixture(autouse=True)
def attached(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Takes out, after each test, what it attached: twins of one seed warn as long as they are there."""
    handles = []
    true = twodice.attach

    def attach(*args: Any, **kwargs: Any) -> twodice.Handle:
        handles.append(true(*args, **kwargs))
        return handles[-1]

    monkeypatch.setattr(twodice, "attach", attach)
    yield
    for handle in handles:
        handle.detach()


def log_chances(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The log-probability of each row."""
    beliefs = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    return beliefs.gather(-1, ids[:, 1:, None])[..., 0].sum(-1)


def preference(policy: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and log-ratios of rows that are first the chosen, then the rejected."""
    ratios = policy - reference
    chosen, rejected = ratios.chunk(2)
    return -nn.functional.logsigmoid(BETA * (chosen - rejected)).mean(), ratios


def of_step(policy: nn.Module, reference: nn.Module, handles: Any, step: int) -> tuple[torch.Tensor, Any]:
    ids = torch.cat([tokens(PAIRS), tokens(PAIRS).flip(0)])
    slots = torch.arange(2 * PAIRS)
    with handles[0].step(step, examples=slots), handles[1].step(step, examples=slots):
        with torch.no_grad():
            fixed = log_chances(reference, ids)
        loss, ratios = preference(log_chances(policy, ids), fixed)
        loss.backward()
    return loss, ratios.detach()


def pair(family: str) -> tuple[nn.Module, nn.Module]:
    policy = tiny_model(family)
    return policy, copy.deepcopy(policy)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_weights_with_shared_masks_have_a_log_ratio_of_exactly_nothing(family: str) -> None:
    """In every step, so that all that the loss sees is what the policy has learned."""
    policy, reference = pair(family)
    first = twodice.attach(policy, ALL_KINDS, seed=333)
    second = twodice.attach(reference, ALL_KINDS, seed=333, share=first)
    for step in range(6):
        loss, ratios = of_step(policy, reference, (first, second), step)
        assert not ratios.any()
        torch.testing.assert_close(loss, torch.tensor(2.0).log())


@pytest.mark.parametrize("family", FAMILIES)
def test_without_shared_masks_the_log_ratio_is_noise(family: str) -> None:
    """Saboteur: a reference with a seed of its own, and one that does not drop."""
    policy, reference = pair(family)
    first = twodice.attach(policy, ALL_KINDS, seed=333)
    second = twodice.attach(reference, ALL_KINDS, seed=444)
    for step in range(6):
        _, ratios = of_step(policy, reference, (first, second), step)
        assert ratios.all() and ratios.abs().mean() > 1e-2
    reference.eval()
    _, ratios = of_step(policy, reference, (first, second), 0)
    assert ratios.all() and ratios.abs().mean() > 1e-2


def test_shared_masks_leave_in_the_log_ratio_what_was_learned() -> None:
    """After training, its spread over steps (chance) is a small part of that without shared masks."""
    spreads = []
    for seed in (333, 444):
        policy, reference = pair("gpt2")
        first = twodice.attach(policy, ALL_KINDS, seed=333)
        second = twodice.attach(reference, ALL_KINDS, seed=seed, share=first if seed == 333 else None)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.005)
        of_step(policy, reference, (first, second), 0)
        optimizer.step()
        found = torch.stack([of_step(policy, reference, (first, second), step)[1] for step in range(1, 9)])
        spreads.append(float(found.std(0).mean()))
        first.detach()
        second.detach()
    assert spreads[0] < 0.2 * spreads[1]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_model_is_its_own_reference_with_the_masks_of_the_same_step(checkpointed: bool) -> None:
    """As with adapters that are switched off for the reference: a second forward in a step repeats the masks,
    and another draw does not.
    """
    model = tiny_model("llama")
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    handle = twodice.attach(model, ALL_KINDS, seed=333)
    ids, slots = tokens(4), torch.arange(4)
    with handle.step(2, examples=slots):
        with torch.no_grad():
            fixed = log_chances(model, ids)
        ratios = log_chances(model, ids) - fixed
        ratios.sum().backward()
    assert not ratios.any()
    with handle.step(2, examples=slots, draw=1), torch.no_grad():
        assert (log_chances(model, ids) - fixed).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_two_draws_of_r_drop_are_the_same_checkpointed_or_not(family: str) -> None:
    """R-Drop: two draws of one step, their losses and their divergence, one backward pass."""
    ids, slots, found = tokens(4), torch.arange(4), []
    for checkpointed in (False, True):
        model = tiny_model(family)
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        handle = twodice.attach(model, ALL_KINDS, seed=333)
        logits = []
        for draw in (0, 1):
            with handle.step(2, examples=slots, draw=draw):
                logits.append(model(input_ids=ids, use_cache=False).logits)
        loss = twodice.r_drop_loss(logits[0][:, :-1], logits[1][:, :-1], ids[:, 1:], 4.0)
        loss.backward()
        assert not torch.allclose(logits[0], logits[1], rtol=1e-2)
        found.append((loss.detach(), gradients(model)))
        handle.detach()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_consistency_between_two_inputs_keeps_the_masks_apart_from_the_input() -> None:
    """Two views of one example in one step differ by what they are, not by chance."""
    model = tiny_model()
    handle = twodice.attach(model, ALL_KINDS, seed=333)
    with handle.step(2, examples=[4, 4, 5]):
        logits = model(input_ids=tokens(1).expand(3, -1), use_cache=False).logits
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)
    assert not torch.allclose(logits[0], logits[2], rtol=1e-2)


def test_sharing_needs_one_seed_and_an_attached_model() -> None:
    policy, reference = pair("gpt2")
    first = twodice.attach(policy, ALL_KINDS, seed=333)
    with pytest.raises(ConfigError, match="need one seed; got 444 and 333"):
        twodice.attach(reference, ALL_KINDS, seed=444, share=first)
    with pytest.raises(ConfigError, match="share must be an attached model"):
        twodice.attach(reference, ALL_KINDS, seed=333, share=tiny_model())
    with pytest.warns(UserWarning, match="share=other"):
        twodice.attach(reference, ALL_KINDS, seed=333)


def test_the_loss_of_the_two_handles_is_linear_in_their_gradients() -> None:
    """Two forwards under two handles before one backward: each recomputes its own."""
    found = []
    for checkpointed in (False, True):
        policy, reference = pair("llama")
        if checkpointed:
            for model in (policy, reference):
                model.activation_checkpointing_enable({"use_reentrant": False})
        first = twodice.attach(policy, ALL_KINDS, seed=333)
        second = twodice.attach(reference, ALL_KINDS, seed=333, share=first)
        with first.step(1, examples=range(4)), second.step(7, examples=range(4)):
            (loss_of(policy, tokens(4)) + 2 * loss_of(reference, tokens(4))).backward()
        found.append((gradients(policy), gradients(reference)))
        first.detach()
        second.detach()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
