"""Dropout inside the experts of a mixture: against one row at a time, and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.model_zoo import ZOO, gpt_oss
from tests.support.tiny_models import gradients
from torch import nn

import twodice

pytestmark = pytest.mark.filterwarnings("ignore:another model is attached")
MADE = {"Mixtral": ZOO["Mixtral"], "DeepSeek-V3": ZOO["DeepSeek-V3"], "GPT-OSS": gpt_oss}
ONE_LAYER = {"num_hidden_layers": 1}
SHAPES = {"DeepSeek-V3": {**ONE_LAYER, "first_k_dense_replace": 0}}
ROADS = ["eager", "grouped_mm", "batched_mm"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def made(name: str, road: str = "grouped_mm") -> tuple[nn.Module, dict[str, torch.Tensor], Any]:
    """A model of one layer, its batch, and its experts."""
    model, batch = MADE[name](**SHAPES.get(name, ONE_LAYER), experts_implementation=road)
    assert model.config._experts_implementation == road  # type: ignore[union-attr]
    (experts,) = [m for path, m in model.named_modules() if path.endswith(".experts")]
    return model, batch, experts


def one_by_one(
    experts: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, places: torch.Tensor,
    noise: str, key: twodice.Key, own_columns: bool = True,
) -> torch.Tensor:  # fmt: skip
    """The experts as their definition has them: one row, one expert, its own columns of the mask."""
    turned, rows = experts.is_transposed, []

    def product(name: str, e: int, v: torch.Tensor) -> torch.Tensor:
        weight, bias = getattr(experts, name)[e], getattr(experts, f"{name}_bias", None)
        out = v @ (weight if turned else weight.t())
        return out if bias is None else out + bias[e]

    for n, (example, position) in enumerate(places.tolist()):
        total = torch.zeros_like(x[n])
        for e, share in zip(index[n].tolist(), weights[n], strict=True):
            inner = experts._apply_gate(product("gate_up_proj", e, x[n]))
            first = e * inner.shape[0] if own_columns else 0
            inner = twodice.dropout(
                inner[None, None, None], 0.4, key=key, step=3, noise=noise, layout="bhts", examples=[example],
                positions=[[position]], key_positions=torch.arange(first, first + inner.shape[0])[None],
            )[0, 0, 0]  # fmt: skip
            total = total + product("down_proj", e, inner) * share
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("road", ROADS)
def test_experts_are_those_of_one_row_after_the_other(name: str, road: str) -> None:
    """Result and gradients, with each form of noise; packed rows too. Saboteur: all experts share columns."""
    model, batch, experts = made(name, road)
    seen: list[Any] = []

    def leaves(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, index, weights = (a.detach() for a in args)
        return x.requires_grad_(), index, weights.requires_grad_()

    experts.register_forward_pre_hook(leaves)
    experts.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    places = torch.cartesian_prod(torch.tensor([6, 1, 9]), torch.arange(7))
    packed = torch.arange(21).view(3, 7) // 4
    for noise in ("unit", "feature", "block(3)", "gaussian"):
        handle = twodice.attach(model, f"activation:{noise}=0.4", seed=8)
        site = next(r.site for r in handle.audit().sites if r.site.endswith("experts#activation"))
        key = twodice.Key(8).child("dropout", site, 0, 0)
        for examples in (torch.tensor([6, 1, 9]), packed):
            seen.clear()
            with handle.step(3, examples=examples):
                model(**batch)
            (((x, index, weights), out),) = seen
            at = places.clone()
            if examples.dim() == 2:
                at[:, 0] = examples.flatten()
            ours = torch.autograd.grad(out.pow(2).sum(), [x, weights, *experts.parameters()])
            wanted = one_by_one(experts, x, index, weights, at, noise, key)
            torch.testing.assert_close(out, wanted, **CLOSE)
            theirs = torch.autograd.grad(wanted.pow(2).sum(), [x, weights, *experts.parameters()])
            for our, their in zip(ours, theirs, strict=True):
                torch.testing.assert_close(our, their, rtol=0, atol=1e-5 * float(their.abs().max()))
            broken = one_by_one(experts, x, index, weights, at, noise, key, own_columns=False)
            assert not torch.allclose(out, broken, rtol=1e-2)
        handle.detach()


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3", pytest.param("GPT-OSS", marks=pytest.mark.slow)])
def test_experts_are_one_compiled_graph_for_a_schedule_of_a_hundred_rates(name: str) -> None:
    """Whichever experts the router chooses; `fullgraph=True` refuses any break."""
    model, batch, _ = made(name)
    plan = "activation=linear(0.1, 0.9), residual=cosine(0.1, 0.6)"
    handle = twodice.attach(model, plan, seed=5, total_steps=100)
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(model, backend=counting, fullgraph=True)
    losses = set()
    for step in range(100):
        with torch.no_grad():
            ids = (batch["input_ids"] + step) % 43
            with handle.step(step):
                loss = run(**{**batch, "input_ids": ids})["loss"].item()
            if step % 25 == 0:
                with handle.step(step):
                    plain = model(**{**batch, "input_ids": ids})["loss"].item()
                assert loss == pytest.approx(plain, rel=1e-5)
        losses.add(loss)
    assert len(losses) > 95
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "road"),
    [
        ("Mixtral", "eager"),
        ("DeepSeek-V3", "grouped_mm"),
        pytest.param("GPT-OSS", "batched_mm", marks=pytest.mark.slow),
    ],
)
def test_compiled_experts_have_the_loss_and_gradients_of_eager_ones(name: str, road: str) -> None:
    """Saboteur: another step."""
    model, batch, _ = made(name, road)
    handle = twodice.attach(model, "activation=0.4", seed=4)
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for called, step in ((model, 3), (run, 3), (run, 4)):
        model.zero_grad()
        with handle.step(step, examples=[9, 2, 4]):
            loss = called(**batch)["loss"]
            loss.backward()
        found.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    assert not torch.allclose(found[2][0], found[0][0], rtol=1e-4)
    torch._dynamo.reset()
