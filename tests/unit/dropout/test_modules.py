"""The modules for people's own models: no state but rate and key, and an error where the step is missing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import twodice
from twodice.dropout.functional import dropout, dropout_add
from twodice.errors import ConfigError, ContractError
from twodice.random.keys import Key

KEY = Key(7).child("test")
X = torch.linspace(-2, 2, 2 * 3 * 40).reshape(2, 3, 40)
SLOTS = torch.tensor([6, 4])


class Net(nn.Module):
    """Two blocks, as a reader would write them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 40), nn.Linear(40, 40)
        self.drop = twodice.nn.Dropout(0.3, key=KEY.child("first"), noise="feature")
        self.add = twodice.nn.DropoutAdd(torch.tensor(0.2), key=KEY.child("second"))

    def forward(self, x: torch.Tensor, at: twodice.nn.Step | None = None) -> torch.Tensor:
        x = self.drop(self.first(x).tanh(), at)
        return self.add(self.second(x), x, at)


def test_the_modules_are_the_functions() -> None:
    at = twodice.nn.Step(5, examples=SLOTS, positions=torch.arange(4, 7)[None])
    options = {"key": KEY, "step": 5, "examples": SLOTS, "positions": torch.arange(4, 7)[None]}
    for noise in ("unit", "feature", "gaussian", "block(8)"):
        ours = twodice.nn.Dropout(0.3, key=KEY, noise=noise)(X, at)
        assert torch.equal(ours, dropout(X, 0.3, noise=noise, **options))
        ours = twodice.nn.DropoutAdd(0.3, key=KEY, noise=noise)(X, X, at)
        assert torch.equal(ours, dropout_add(X, X, 0.3, noise=noise, **options))
    rows = twodice.nn.Dropout(0.3, key=KEY, layout="bc")(X[:, 0], at)  # positions mean nothing there
    assert torch.equal(rows, dropout(X[:, 0], 0.3, key=KEY, step=5, examples=SLOTS, layout="bc"))


def test_eval_is_the_identity_and_needs_no_step() -> None:
    layer, add = twodice.nn.Dropout(0.3, key=7).eval(), twodice.nn.DropoutAdd(0.3, key=7).eval()
    assert layer(X) is X
    assert torch.equal(add(X, 2 * X), 2 * X + X)


def test_train_without_a_step_says_what_to_write() -> None:
    with pytest.raises(ContractError, match=r"layer\(x, twodice.nn.Step\(step, examples=...\)\)"):
        twodice.nn.Dropout(0.3, key=7)(X)
    with pytest.raises(ContractError, match=r"layer\(x, residual, twodice.nn.Step"):
        twodice.nn.DropoutAdd(0.0, key=7)(X, X)
    with pytest.raises(ContractError, match="got 17"):
        twodice.nn.Dropout(0.3, key=7)(X, 17)


def test_a_rate_a_noise_or_a_draw_that_cannot_be_meant_is_an_error() -> None:
    for wrong in ({"p": 1.2}, {"p": 0.1, "noise": "features"}, {"p": 0.1, "key": "x"}):
        with pytest.raises(ConfigError):
            twodice.nn.Dropout(**{"key": 7, **wrong})
    for wrong in (-1, 2**63, True):
        with pytest.raises(ConfigError, match="a draw must be"):
            twodice.nn.Step(1, draw=wrong)


def test_another_draw_drops_other_units_and_draw_0_is_the_key_itself() -> None:
    layer, at = twodice.nn.Dropout(0.5, key=KEY), twodice.nn.Step(5)
    assert torch.equal(layer(X, at), layer(X, at)) and not torch.equal(layer(X, at), layer(X, at.again(1)))
    assert torch.equal(layer(X, at.again(3)), dropout(X, 0.5, key=KEY.child("draw", 3), step=5))


def test_a_step_does_not_change_with_what_it_was_made_of() -> None:
    step, slots = torch.tensor(5), SLOTS.clone()
    at = twodice.nn.Step(step, examples=slots)
    step += 1
    slots += 1
    layer = twodice.nn.Dropout(0.5, key=KEY)
    assert torch.equal(layer(X, at), dropout(X, 0.5, key=KEY, step=5, examples=SLOTS))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_computes_the_same_gradients_whenever_it_runs_again(reentrant: bool) -> None:
    net = Net()
    gradients = []
    for wrapped in (False, True):
        net.zero_grad()
        losses = []
        for step in (4, 5):  # two forwards before one backward
            at, x = twodice.nn.Step(step, examples=SLOTS), X.clone().requires_grad_()
            y = checkpoint(net, x, at, use_reentrant=reentrant) if wrapped else net(x, at)
            losses.append(y.square().sum())
        sum(losses).backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiled_code_has_the_bits_of_eager_in_one_graph() -> None:
    torch._dynamo.reset()
    graphs = 0

    def counting(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    net = Net()
    run = torch.compile(net, backend=counting, fullgraph=True)
    for step in range(10):
        net.add.p.fill_(step / 20)
        at = twodice.nn.Step(step, examples=SLOTS)
        assert torch.equal(run(X, at), net(X, at))
    assert graphs == 1
    for draw in (2, 3, 2**40):
        at = twodice.nn.Step(3, examples=SLOTS, draw=draw)
        assert torch.equal(run(X, at), net(X, at))
    assert graphs == 2  # one for all other draws


def test_nothing_is_in_the_state_and_a_copy_drops_the_same() -> None:
    layer = twodice.nn.Dropout(0.5, key=KEY)
    assert not layer.state_dict() and not list(layer.parameters()) and "noise='unit'" in repr(layer)
    assert torch.equal(copy.deepcopy(layer)(X, twodice.nn.Step(5)), layer(X, twodice.nn.Step(5)))
