"""Recurrent modules: their own forward where nothing is dropped, a written-out one where something is."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from twodice.dropout.attach import attach
from twodice.dropout.functional import dropout
from twodice.dropout.recurrent import recurrent_forward
from twodice.errors import ConfigError, ShapeError
from twodice.random.keys import Key

KEY = Key(7).child("lstm")
KINDS = [nn.LSTM, nn.GRU, nn.RNN]
B, T, C, H = 3, 5, 4, 6
SLOTS = torch.tensor([9, 2, 4])


def made(kind: type[nn.RNNBase], **options: Any) -> nn.RNNBase:
    """A module with weights that need no generator."""
    module = kind(C, H, **{"num_layers": 3, **options})
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(torch.linspace(-0.7, 0.9, p.numel()).reshape(p.shape).sin() * (1 + 0.01 * i))
    return module


def given(module: nn.RNNBase) -> torch.Tensor:
    x = torch.linspace(-1, 1, B * T * C).reshape(B, T, C).mul(3).cos()
    return x if module.batch_first else x.transpose(0, 1).contiguous()


def close(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.allclose(a, b, atol=1e-6)
    return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True) if x is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_dropped_is_the_modules_own_forward(kind: type[nn.RNNBase]) -> None:
    for first, both, bias in product((False, True), (False, True), (False, True)):
        module = made(kind, batch_first=first, bidirectional=both, bias=bias)
        x = given(module)
        start = torch.linspace(-1, 1, 3 * (1 + both) * B * H).reshape(-1, B, H)
        for hidden in (None, (start, start.flip(0)) if kind is nn.LSTM else start):
            plain = module(x, hidden)
            zero = recurrent_forward(module, x, hidden, step=3, between=(0, KEY), weight=(0, KEY))
            assert all(
                torch.equal(a, b)
                for a, b in zip(
                    torch.utils._pytree.tree_leaves(zero), torch.utils._pytree.tree_leaves(plain), strict=True
                )
            )
            # One call a layer, where the rate is in a tensor and so not known to be zero.
            layered = recurrent_forward(module, x, hidden, step=3, between=(torch.tensor(0), KEY))
            assert close(layered, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_eval_is_bit_for_bit_the_plain_module_at_any_rate(kind: type[nn.RNNBase]) -> None:
    module = made(kind, dropout=0.5).eval()
    x = given(module)
    ours = recurrent_forward(module, x, step=3, between=(30000, KEY), weight=(30000, KEY))
    leaves = torch.utils._pytree.tree_leaves
    assert all(torch.equal(a, b) for a, b in zip(leaves(ours), leaves(module(x)), strict=True))


@pytest.mark.parametrize("noise", ["unit", "feature", "gaussian"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_between_the_layers_is_dropout_of_what_each_hands_on(
    kind: type[nn.RNNBase], both: bool, noise: str
) -> None:
    module = made(kind, batch_first=True, bidirectional=both)
    x = given(module)
    y, last = recurrent_forward(
        module, x, step=3, between=(20000, KEY, noise), examples=SLOTS, positions=torch.arange(4, 9)[None]
    )
    width = 2 if both else 1
    h, ends = x, []
    for layer in range(3):  # one-layer modules with the same weights
        one = kind(C if layer == 0 else H * width, H, bidirectional=both, batch_first=True)
        names = [n for n, _ in module.named_parameters() if f"_l{layer}" in n]
        with torch.no_grad():
            for name in names:
                getattr(one, name.replace(f"_l{layer}", "_l0")).copy_(getattr(module, name))
        if layer:
            h = dropout(
                h, 20000 / 65536, key=KEY.child("layer", layer), step=3, examples=SLOTS,
                positions=torch.arange(4, 9)[None], noise=noise,
            )  # fmt: skip
        h, end = one(h)
        ends.append(end)
    assert close(y, h)
    parts = zip(*ends, strict=True) if kind is nn.LSTM else [ends]
    assert close(last if kind is nn.LSTM else (last,), tuple(torch.cat(list(some)) for some in parts))
    assert not close(y, module(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_weight_drop_is_the_module_with_dropped_recurrent_matrices(kind: type[nn.RNNBase]) -> None:
    module = made(kind, bidirectional=True, num_layers=2)
    x, before = given(module), copy.deepcopy(module.state_dict())
    ours = recurrent_forward(module, x, step=3, weight=(20000, KEY))
    ours[0].sum().backward()
    twin = copy.deepcopy(module)
    masks = {}
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if name.startswith("weight_hh"):
                p.copy_(dropout(p, 20000 / 65536, key=KEY.child(name), step=3, layout="bc"))
                masks[name] = p != 0
    assert len(masks) == 4 and not torch.equal(*list(masks.values())[:2])
    assert close(ours, twin(x))
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())
    for name, mask in masks.items():
        grad = getattr(module, name).grad
        assert grad is not None and not grad[~mask].any() and grad[mask].any()
    mapped = recurrent_forward(module, x, step=3, weight={"weight_hh_l0": (20000, KEY.child("weight_hh_l0"))})
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.weight_hh_l0.mul_(masks["weight_hh_l0"] * 65536 / (65536 - 20000))
    assert close(mapped, twin(x))


def test_masks_do_not_depend_on_how_the_batch_is_cut() -> None:
    module = made(nn.LSTM, batch_first=True)
    x, options = given(module), {"step": 3, "between": (20000, KEY), "weight": (9000, KEY)}
    whole, _ = recurrent_forward(module, x, examples=SLOTS, **options)
    parts = [
        recurrent_forward(module, x[i : i + 1], examples=SLOTS[i : i + 1], **options)[0] for i in range(B)
    ]
    assert close(whole, torch.cat(parts))
    alone, _ = recurrent_forward(module, x[1], examples=SLOTS[1:2], **options)  # without a batch
    assert close(alone, whole[1])
    turned = made(nn.LSTM)
    assert close(
        recurrent_forward(turned, x.transpose(0, 1), examples=SLOTS, **options)[0].transpose(0, 1), whole
    )


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_packed_sequence_has_the_masks_of_the_padded_one(kind: type[nn.RNNBase]) -> None:
    module = made(kind, batch_first=True)
    x, lengths = given(module), torch.tensor([3, 5, 4])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    options = {"step": 3, "between": (20000, KEY), "weight": (9000, KEY)}
    for examples, positions in (
        (SLOTS, None),
        (None, torch.arange(15).reshape(B, T)),
        (SLOTS, torch.arange(4, 9)[None]),
    ):
        where = {"examples": examples, "positions": positions, **options}
        whole, _ = recurrent_forward(module, x, **where)
        ours, last = recurrent_forward(module, packed, **where)
        found, _ = pad_packed_sequence(ours, batch_first=True)
        for i, n in enumerate(lengths.tolist()):
            assert close(found[i, :n], whole[i, :n])
            end = last[0] if kind is nn.LSTM else last
            assert close(end[-1, i], whole[i, n - 1])
    plain, zero = module(packed), recurrent_forward(module, packed, step=3, between=(torch.tensor(0), KEY))
    assert close(zero[0].data, plain[0].data) and close(zero[1], plain[1])


def test_draws_of_the_rows() -> None:
    module = made(nn.GRU, batch_first=True)
    x, steps = given(module), torch.tensor([4, 0, 7])
    together, _ = recurrent_forward(module, x, step=steps, between=(20000, KEY))
    for i, step in enumerate(steps.tolist()):
        row = recurrent_forward(
            module, x[i : i + 1], step=step, between=(20000, KEY), examples=torch.tensor([i])
        )
        assert close(together[i : i + 1], row[0])
    packed = pack_padded_sequence(x, torch.tensor([5, 5, 5]), batch_first=True)
    ours, _ = recurrent_forward(module, packed, step=steps, between=(20000, KEY))
    assert close(pad_packed_sequence(ours, batch_first=True)[0], together)
    with pytest.raises(ShapeError, match="weights are shared"):
        recurrent_forward(module, x, step=steps, weight=(20000, KEY))


def test_gradcheck_at_a_fixed_key() -> None:
    module = made(nn.LSTM, num_layers=2).double()
    x = given(module).double()[:2].requires_grad_()
    weights = tuple(module.parameters())

    def run(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return recurrent_forward(module, x, step=3, between=(20000, KEY), weight=(20000, KEY))[0]

    assert torch.autograd.gradcheck(run, (x, *weights))


def test_own_dropout_is_left_alone_where_nothing_is_said_about_it() -> None:
    module = made(nn.LSTM, dropout=0.5)
    x = given(module)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = module(x)[0]
        torch.manual_seed(0)
        assert torch.equal(recurrent_forward(module, x, step=3)[0], plain)
        assert not torch.equal(recurrent_forward(module, x, step=3, between=(0, KEY))[0], plain)


def test_what_is_not_served_is_named() -> None:
    lstm = made(nn.LSTM)
    x = given(lstm)
    with pytest.raises(ConfigError, match="proj_size=2"):
        recurrent_forward(nn.LSTM(C, H, proj_size=2), x, step=0)
    with pytest.raises(ConfigError, match="got LSTMCell"):
        recurrent_forward(nn.LSTMCell(C, H), x, step=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'weight_hh_l0'"):
        recurrent_forward(lstm, x, step=0, weight={"weight_hh_0": (1, KEY)})
    with pytest.raises(ConfigError, match="only matrices"):
        recurrent_forward(lstm, x, step=0, weight={"bias_hh_l0": (1, KEY)})
    with pytest.raises(ShapeError, match="hidden state must have 3"):
        recurrent_forward(lstm, x, (x[0], x[0]), step=0)
    with pytest.raises(ShapeError, match="2 or 3 dimensions"):
        recurrent_forward(lstm, x[None], step=0)


def test_a_plan_may_name_the_recurrent_matrices_alone() -> None:
    model = nn.ModuleDict({"lstm": made(nn.LSTM, num_layers=2, batch_first=True)}).train()
    model.forward = lambda x: model["lstm"](x)[0]  # type: ignore[method-assign, assignment]
    recurrent = {
        f"lstm.weight_hh_l{i}": number for i, number in enumerate((2, 4))
    }  # the second and the fourth
    handle = attach(model, {f"weight.{name}": 0.5 for name in recurrent}, seed=7)
    with handle.step(3):
        ours = model(given(model["lstm"]))
    handle.detach()
    keys = {
        name.removeprefix("lstm."): (32768, Key(7).child("dropout", f"lstm#weight#{number}", 0, 0))
        for name, number in recurrent.items()
    }
    wanted = recurrent_forward(model["lstm"], given(model["lstm"]), step=3, weight=keys)[0]
    assert torch.equal(ours, wanted) and not torch.equal(ours, model(given(model["lstm"])))
    with pytest.raises(ConfigError, match=r"did you mean 'lstm\.weight_hh_l0'"):
        attach(model, "weight.lstm.weight_hh_0=0.5")
