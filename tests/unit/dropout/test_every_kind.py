"""Every kind of dropout in every model of the zoo, through `attach`, and what each kind means."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tests.support.masks import masks_seen
from tests.support.model_zoo import ZOO
from tests.support.tiny_models import gradients, loss_of, tiny_model, tokens
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import twodice
from twodice.dropout.handle import Handle
from twodice.dropout.sites import find
from twodice.dropout.step import MONTE_CARLO, Keys, later_key
from twodice.errors import ConfigError, ContractError

pytestmark = pytest.mark.filterwarnings("ignore:another model is attached")


def loss_in(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    result: Any = model(**batch)
    return result["loss"]


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in model.modules()
    )


@pytest.mark.parametrize("name", ZOO)
def test_each_kind_changes_the_loss_and_leaves_no_trace(name: str) -> None:
    model, batch = ZOO[name]()
    plain = loss_in(model, batch).item()
    names, before = list(model.state_dict()), hooks_of(model)
    model.eval()
    calm = loss_in(model, batch)
    model.train()
    kinds = find(model).kinds
    assert kinds
    for kind in [*kinds, *(["layer:batch"] if "layer" in kinds else [])]:
        handle = twodice.attach(model, f"{kind}=0.5", seed=3)
        losses = []
        for _ in range(2):
            with handle.step(0):
                loss = loss_in(model, batch)
                model.zero_grad()
                loss.backward()
                losses.append(loss.item())
        assert losses[0] == losses[1] != plain, kind
        assert list(model.state_dict()) == names, kind
        model.eval()
        assert torch.equal(loss_in(model, batch), calm), kind
        model.train()
        handle.detach()
        assert hooks_of(model) == before, kind
        assert loss_in(model, batch).item() == plain, kind


@pytest.mark.parametrize("name", ZOO)
def test_a_kind_that_a_model_of_the_zoo_lacks_is_refused(name: str) -> None:
    model, _ = ZOO[name]()
    missing = [
        kind for kind in ("key", "skip", "output", "head", "residual") if kind not in find(model).kinds
    ]
    before = hooks_of(model)
    for kind in missing:
        with pytest.raises(ConfigError, match=f"'{kind}' has no site"):
            twodice.attach(model, f"{kind}=0.1")
    assert hooks_of(model) == before


# Of the models of transformers ALBERT alone does not support checkpointing.
CHECKPOINTED = [name for name in ZOO if not name.startswith(("nn.", "convolutional", "MLP", "ALBERT"))]
ALL = "embedding, token, word, attention, key, head, residual, activation, output, layer, weight, skip"


def plan_of(model: nn.Module, rate: float = 0.2) -> str:
    there = find(model).kinds
    return ", ".join(f"{kind}={rate}" for kind in ALL.split(", ") if kind in there)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_gives_the_same_loss_and_gradients(name: str) -> None:
    results = []
    for checkpointed in (False, True):
        model, batch = ZOO[name]()
        if checkpointed:
            model.gradient_checkpointing_enable(  # type: ignore[operator]
                {"use_reentrant": False, "preserve_rng_state": False}
            )
        handle = twodice.attach(model, plan_of(model), seed=4)
        with handle.step(2):
            loss = loss_in(model, batch)
            loss.backward()
        results.append((loss, gradients(model)))
    (loss, grads), (again, others) = results
    assert torch.equal(loss, again)
    assert grads.keys() == others.keys()
    for parameter, grad in grads.items():
        assert torch.allclose(grad, others[parameter], rtol=1e-5, atol=1e-7), parameter


def test_checkpoints_in_compiled_code_have_the_masks_of_eager_code_and_no_rate_compiles_anew() -> None:
    """Each checkpoint breaks the graph; with `fullgraph=True` that is said."""
    results: list[list[dict[str, torch.Tensor]]] = []
    plan = "embedding=0.2, attention=linear(0.1, 0.5), residual=linear(0.4, 0.1), activation=0.2, layer=0.2"
    for compiled in (False, True):
        model, batch = ZOO["GPT-2"](n_layer=1)
        if compiled:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        handle = twodice.attach(model, plan, seed=4, total_steps=10)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        run = torch.compile(model, backend=counter) if compiled else model
        results.append([])
        graphs = set()
        for step in range(4):
            model.zero_grad()
            with handle.step(step):
                loss_in(run, batch).backward()  # type: ignore[arg-type]
            results[-1].append(gradients(model))
            graphs.add(counter.frame_count)
        assert len(graphs) == 1
    for plain, others in zip(*results, strict=True):
        torch.testing.assert_close(others, plain, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with handle.step(0), pytest.raises(Exception, match="leave it out, or switch checkpointing off"):
        loss_in(whole, batch)  # type: ignore[arg-type]
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_compiled_models_have_the_same_loss_and_gradients(name: str) -> None:
    results = []
    for compiled in (False, True):
        model, batch = ZOO[name]()
        handle = twodice.attach(model, plan_of(model) or "dropout=0.2", seed=4)
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        with handle.step(2):
            loss = loss_in(run, batch)  # type: ignore[arg-type]
            loss.backward()
        results.append((loss, gradients(model)))
    (loss, grads), (again, others) = results
    assert torch.allclose(loss, again, rtol=1e-5, atol=1e-6)
    for parameter, grad in grads.items():
        assert torch.allclose(grad, others[parameter], rtol=1e-4, atol=1e-5), parameter


# ---- what each kind means, on a model where it can be seen -------------------------------------------------


def attached(plan: str, **rest: Any) -> tuple[nn.Module, Handle]:
    model = tiny_model("llama", layers=3)
    return model, twodice.attach(model, plan, seed=5, **rest)


def test_tokens_are_dropped_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, handle = attached("token=0.5")
    with masks_seen(monkeypatch) as seen, handle.step(0):
        model(input_ids=tokens())
    (mask,) = seen["model#token"]
    assert torch.equal(mask, mask[..., :1].expand_as(mask))
    assert 0.3 < mask[..., 0].float().mean() < 0.7


def test_a_word_is_dropped_wherever_it_stands_in_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    model, handle = attached("word=0.5")
    ids = tokens()
    ids[:, 6:] = ids[:, :6]
    with masks_seen(monkeypatch) as seen, handle.step(0):
        model(input_ids=ids)
    (mask,) = seen["model.embed_tokens#word"]
    assert torch.equal(mask, mask[..., :1].expand_as(mask))
    assert torch.equal(mask[:, 6:], mask[:, :6])
    assert not torch.equal(mask[0], mask[1])  # one mask an example, not one a batch


def test_heads_are_dropped_whole_and_at_every_position(monkeypatch: pytest.MonkeyPatch) -> None:
    model, handle = attached("head[1]=0.5")
    with masks_seen(monkeypatch) as seen, handle.step(0):
        model(input_ids=tokens())
    assert list(seen) == ["model.layers.1.self_attn#head"]
    (mask,) = seen["model.layers.1.self_attn#head"]
    heads = mask.unflatten(-1, (4, 8))
    assert torch.equal(heads, heads[:, :1, :, :1].expand_as(heads))
    assert 0.2 < heads[:, 0, :, 0].float().mean() < 0.8


def test_features_are_locked_over_positions_and_blocks_share_a_decision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, handle = attached("residual.mlp:feature=0.5, embedding:block(4)=0.5")
    with masks_seen(monkeypatch) as seen, handle.step(0):
        model(input_ids=tokens())
    (locked,) = seen["model.layers.0.mlp#residual"]
    assert torch.equal(locked, locked[:, :1].expand_as(locked)) and locked.any() and not locked.all()
    (blocks,) = seen["model#embedding"]
    four = blocks.unflatten(-1, (8, 4))
    assert torch.equal(four, four[..., :1].expand_as(four)) and not torch.equal(blocks[:, 0], blocks[:, 1])


def test_dropped_weights_stand_only_within_the_call() -> None:
    model, handle = attached("weight.model.layers.0.mlp.down_proj=0.5")
    linear = model.model.layers[0].mlp.down_proj  # type: ignore[union-attr, index]
    seen = []
    inner = linear.register_forward_pre_hook(lambda module, args: seen.append(module.weight.detach().clone()))
    with handle.step(3):
        model(input_ids=tokens())
        assert linear.weight is linear._parameters["weight"]
    inner.remove()
    key = twodice.Key(5).child("dropout", "model.layers.0.mlp.down_proj#weight", 0, 0)
    assert torch.equal(seen[0], twodice.dropout(linear.weight.detach(), 0.5, key=key, step=3, layout="bc"))


def test_a_tied_weight_is_dropped_in_the_lookup_unless_both_are_meant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()  # GPT-2 ties its head to its lookup
    handle = twodice.attach(model, "weight=0.5", seed=5)
    audit = handle.audit()
    assert "transformer.wte#weight" in [record.site for record in audit.live]
    (left,) = [record for record in audit.sites if record.site == "lm_head"]
    assert not left.live and "weight:tied" in left.why
    handle.detach()
    handle = twodice.attach(model, "weight:tied=0.5", seed=5)
    read = []
    for module in (model.transformer.wte, model.lm_head):  # type: ignore[union-attr]
        module.register_forward_pre_hook(lambda m, args: read.append(m.weight.detach().clone()))
    with handle.step(0):
        model(input_ids=tokens())
    assert torch.equal(read[0], read[1]) and (read[0] == 0).float().mean() > 0.4


def layers_run(model: nn.Module, handle: Handle, step: int) -> list[int]:
    run = []
    blocks = model.model.layers  # type: ignore[union-attr]
    hooks = [
        block.self_attn.register_forward_pre_hook(lambda m, args, i=i: run.append(i))
        for i, block in enumerate(blocks)  # type: ignore[arg-type]
    ]
    with handle.step(step, examples=range(8)):
        model.zero_grad()
        loss_of(model, tokens()).backward()
    for hook in hooks:
        hook.remove()
    return run


def test_layers_left_out_for_the_batch_do_not_run_and_have_zero_gradients() -> None:
    model, handle = attached("layer:batch=0.5")
    seen: set[tuple[int, ...]] = set()
    learned: set[int] = set()
    for step in range(1, 13):
        run = layers_run(model, handle, step)
        kept = [
            layer
            for layer in range(3)
            if bool(
                twodice.dropout(
                    torch.ones(1, 1),
                    0.5,
                    key=twodice.Key(5).child("dropout", f"model.layers.{layer}#layer", 0, 0),
                    step=step,
                    layout="bc",
                ).any()
            )
        ]
        # The first block that is left out is run once, to see what a block returns.
        assert set(run) & (learned | set(kept)) == set(kept)
        learned |= {0, 1, 2} - set(kept)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            if name.startswith("model.layers."):
                is_zero = not parameter.grad.any()
                assert is_zero == (int(name.split(".")[2]) not in kept), (step, name)
        seen.add(tuple(kept))
    assert len(seen) > 3


def test_a_shared_layer_that_is_left_out_counts_its_visit_whatever_ran_before() -> None:
    """What a resume rests on. A block that was run once to see what it returns must not move the masks of
    the visits after it.
    """

    def losses(steps: range) -> dict[int, float]:
        model, batch = ZOO["ALBERT"](num_hidden_layers=4)
        handle = twodice.attach(model, "layer:batch=0.5, residual=0.3", seed=3)
        found = {}
        for step in steps:
            with handle.step(step):
                found[step] = loss_in(model, batch).item()
        return found

    whole = losses(range(6))
    assert len(set(whole.values())) == 6
    for step in range(6):
        assert losses(range(step, step + 1))[step] == whole[step], step


def test_looking_at_a_layer_that_is_left_out_moves_no_generator() -> None:
    """A step in which layers are looked at draws its own dropout as one in which they are not."""
    state = []
    for before in (False, True):
        model = tiny_model(resid_pdrop=0.5)
        handle = twodice.attach(model, "layer:batch=0.9", seed=5)
        if before:  # here the layers are looked at
            with handle.step(0):
                model(input_ids=tokens())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            with handle.step(0):
                model(input_ids=tokens())
            state.append(torch.get_rng_state())
        assert all(module.training for module in model.modules())
    assert torch.equal(*state)


def test_layers_dropped_for_an_example_hand_it_on_unchanged() -> None:
    model, handle = attached("layer[1]=0.5")
    block = model.model.layers[1]  # type: ignore[union-attr, index]
    tensors: dict[str, torch.Tensor] = {}
    block.register_forward_pre_hook(lambda m, args: tensors.__setitem__("in", args[0].detach()))
    block.register_forward_hook(lambda m, args, out: tensors.__setitem__("out", out.detach()))
    with handle.step(0):
        model(input_ids=tokens())
    same = (tensors["in"] == tensors["out"]).flatten(1).all(1)
    assert same.any() and not same.all()


def test_the_skip_path_is_dropped_and_the_branch_is_not() -> None:
    model, handle = attached("skip.mlp[2]=0.5")
    block = model.model.layers[2]  # type: ignore[union-attr, index]
    tensors: dict[str, torch.Tensor] = {}
    norm = block.post_attention_layernorm
    norm.register_forward_pre_hook(lambda m, args: tensors.__setitem__("stream", args[0].detach()))
    block.mlp.register_forward_pre_hook(lambda m, args: tensors.__setitem__("inside", args[0].detach()))
    block.register_forward_hook(lambda m, args, out: tensors.__setitem__("out", out.detach()))
    with handle.step(0):
        model(input_ids=tokens())
    key = twodice.Key(5).child("dropout", "model.layers.2.mlp#skip", 0, 0)
    stream = twodice.dropout(tensors["stream"], 0.5, key=key, step=0)
    gate, up, down = (getattr(block.mlp, f"{name}_proj") for name in ("gate", "up", "down"))
    inside = tensors["inside"]
    branch = down(nn.functional.silu(gate(inside)) * up(inside)).detach()
    assert torch.allclose(tensors["out"], stream + branch, atol=1e-5)


def test_experts_drop_by_example_position_and_their_own_columns() -> None:
    model, batch = ZOO["Mixtral"]()
    results = []
    for rows in (3, 1):
        handle = twodice.attach(model, "activation=0.4", seed=8)
        model.zero_grad()
        parts = []
        for first in range(0, 3, rows):
            part = {
                n: v[first : first + rows] if isinstance(v, torch.Tensor) else v for n, v in batch.items()
            }
            part.pop("labels")
            with handle.step(1, examples=range(first, first + rows)):
                parts.append(model(**part).logits.detach())
        results.append(torch.cat(parts))
        handle.detach()
    assert torch.allclose(results[0], results[1], atol=1e-5)


def test_a_depth_profile_gives_each_layer_its_own_rate() -> None:
    _, handle = attached("residual=depth(0.0, 0.2), layer=layers(0.0, 0.1, 0.3)")
    rates = {record.site: (record.rate, record.live) for record in handle.audit().sites}
    assert rates["model.layers.0.mlp#residual"] == (0.0, False)
    assert rates["model.layers.1.mlp#residual"] == (pytest.approx(0.1), True)
    assert rates["model.layers.2.self_attn#residual"] == (0.2, True)
    assert [rates[f"model.layers.{i}#layer"][0] for i in range(3)] == [0.0, 0.1, 0.3]
    with pytest.raises(ConfigError, match="each of the 3 layers; got 2"):
        attached("layer=layers(0.0, 0.1)")


def test_a_plateau_follows_the_losses_that_were_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, handle = attached("embedding=plateau(0.1, 4.0, 1, 0.8)")

    def rate(step: int) -> float:
        with masks_seen(monkeypatch) as seen, handle.step(step):
            model(input_ids=tokens())
        return 1 - seen["model#embedding"][0].float().mean().item()

    handle.observe(0, 3.0)
    assert rate(1) == pytest.approx(0.1, abs=0.03)
    handle.observe(10, 3.5)
    handle.observe(10, 3.5)  # the same again, as a resumed run tells it
    assert rate(9) == pytest.approx(0.1, abs=0.03)
    assert rate(10) == pytest.approx(0.4, abs=0.04)
    with pytest.raises(ConfigError, match="by rising step"):
        handle.observe(5, 1.0)
    with pytest.raises(ConfigError, match="finite"):
        handle.observe(11, float("nan"))


def test_own_rates_that_feed_several_sites_are_not_half_replaced() -> None:
    model, _ = ZOO["BART"](dropout=0.1)
    before = hooks_of(model)
    with pytest.raises(ConfigError, match=r"'dropout'.*speak of all of them"):
        twodice.attach(model, "residual.decoder.mlp=0.1")
    assert hooks_of(model) == before


def test_packed_rows_need_a_slot_for_each_token() -> None:
    model, handle = attached("residual=0.1")
    positions = torch.cat((torch.arange(6), torch.arange(6)))[None].expand(8, -1)
    with handle.step(0), pytest.raises(ContractError, match=r"examples \(B, T\)"):
        model(input_ids=tokens(), position_ids=positions)
    slots = torch.arange(16).repeat_interleave(6).view(8, 12)
    with handle.step(0, examples=slots):
        model(input_ids=tokens(), position_ids=positions)


def test_an_attach_that_fails_leaves_nothing() -> None:
    model = tiny_model("llama")
    before = hooks_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError):
            twodice.attach(model, "embedding=0.1, layer=layers(0.1)")
    assert hooks_of(model) == before


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "ALBERT", "nn.Transformer"])
def test_a_schedule_of_a_hundred_rates_is_one_compiled_graph(name: str) -> None:
    """Rates and steps are tensors, and the keys of later visits (ALBERT's one layer, the lookup that encoder
    and decoder share) come from outside the graph; graphs are counted by a backend of our own.
    """
    shapes = {"GPT-2": {"n_layer": 1}, "Llama": {"num_hidden_layers": 1}, "ALBERT": {"num_hidden_layers": 3}}
    model, batch = ZOO[name](**shapes.get(name, {}))
    plan = {
        "embedding": "linear(0.1, 0.9)", "attention": "linear(0.0, 0.5)",
        "residual:feature": "cosine(0.1, 0.6)", "head": "linear(0.1, 0.3)",
        "activation:gaussian": "linear(0.1, 0.4)", "weight": "linear(0.0, 0.2)",
    }  # fmt: skip
    handle = twodice.attach(model, plan, seed=5, total_steps=100)
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(model, backend=counting, fullgraph=True)
    losses = set()
    for step in range(100):
        with handle.step(step), torch.no_grad():
            loss = loss_in(run, batch).item()  # type: ignore[arg-type]
        losses.add(loss)
        if step in (0, 99):
            with handle.step(step), torch.no_grad():
                assert loss_in(model, batch).item() == pytest.approx(loss, rel=1e-5)
    assert len(losses) > 95
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["Llama", "ALBERT", pytest.param("nn.Transformer", marks=pytest.mark.slow)])
def test_draws_are_one_compiled_graph(name: str) -> None:
    """A second pass of a step (R-Drop) and the draws of Monte Carlo: keys are tensors, those of later visits
    too.
    """
    shapes = {"Llama": {"num_hidden_layers": 1}, "ALBERT": {"num_hidden_layers": 2}}
    model, batch = ZOO[name](**shapes.get(name, {}))
    plan = {
        "embedding": 0.1, "attention": 0.2, "key": 0.2, "residual": 0.2, "head": 0.2, "layer": 0.2,
        "activation:gaussian": 0.3, "weight": 0.1,
    }  # fmt: skip
    there = find(model).kinds
    there = {kind: rate for kind, rate in plan.items() if kind.partition(":")[0] in there}
    handle = twodice.attach(model, there, seed=5)
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(model, backend=counting, fullgraph=True)
    losses = set()
    for draw in (0, 1, 2, 7, 2**32 - 1):
        found = []
        for called in (model, run):
            with handle.step(3, draw=draw), torch.no_grad():
                found.append(loss_in(called, batch).item())  # type: ignore[arg-type]
        assert found[0] == pytest.approx(found[1], rel=1e-5)
        losses.add(found[0])
    assert len(losses) == 5
    assert len(graphs) == 1
    beliefs = [
        handle.monte_carlo(called, batch, 4, logits=lambda result: result["logits"])  # type: ignore[arg-type]
        for called in (model, run)
    ]
    torch.testing.assert_close(beliefs[1].mean, beliefs[0].mean, rtol=1e-4, atol=1e-6)
    assert (beliefs[0].mutual_information > 0).any()
    assert len(graphs) == 2  # that of eval
    torch._dynamo.reset()


def test_keys_in_tensors_are_the_keys() -> None:
    """The contract's derivation, for all 64 bits, at later visits and for Monte Carlo too."""
    sites = [f"layers.{i}#residual" for i in range(8)]
    for seed, draw in ((7, 0), (2**64 - 1, 2**32 - 1), (7, MONTE_CARLO)):
        names = ("monte-carlo",) if draw == MONTE_CARLO else ("dropout",)
        own = () if draw == MONTE_CARLO else (draw,)
        keys = Keys(seed, draw, sites)
        large = 0
        for index, site in enumerate(sites):
            for visit in (0, 1, 5):
                key = twodice.Key(seed).child(*names, site, *own, visit)
                assert keys.of(index, visit) == key
                assert int(keys.tensor_of(index, visit)) % 2**64 == key.value
                large += key.value >= 2**63
        assert 0 < large < 24
    torch.library.opcheck(
        later_key, (torch.tensor(3), "7", "a#residual", 2), test_utils=("test_schema", "test_faketensor")
    )


def test_the_dropout_of_an_adapter_keeps_no_copy_of_the_dropped_input() -> None:
    """Bytes kept for the backward, each storage once: as many with the site as without. Saboteur: the matrix
    reads the dropped input as usual.
    """
    peft = pytest.importorskip("peft")
    kept, results = {}, {}
    for name, plan, plain in (
        ("none", "dropout=0.0", False), ("site", "dropout=0.3", False), ("copied", "dropout=0.3", True),
    ):  # fmt: skip
        lora = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])
        lora.init_lora_weights = False  # B of zeros would give A no gradient
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = peft.get_peft_model(tiny_model("llama"), lora).train()
        handle = twodice.attach(model, plan, seed=5)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found: dict[int, torch.Tensor] = {}

        def pack(x: torch.Tensor, own: Any = own, found: Any = found) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in own:
                found[x.untyped_storage().data_ptr()] = x
            return x

        with handle.step(0, examples=range(8)):
            for module in model.modules():
                if plain and "lora_A" in getattr(module, "__dict__", {}).get("_modules", {}):
                    module.lora_A["default"].__dict__.pop("forward", None)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                loss = loss_of(model, tokens())
        kept[name] = sum(x.untyped_storage().nbytes() for x in found.values())
        loss.backward()
        results[name] = loss.detach(), gradients(model)
        handle.detach()
    one_input = 8 * 12 * 32 * 4  # B x T x C of float32
    assert kept["site"] <= kept["none"] + one_input // 8
    assert kept["copied"] >= kept["site"] + 2 * one_input
    torch.testing.assert_close(results["site"], results["copied"], rtol=1e-5, atol=1e-7)
    assert not torch.equal(results["site"][0], results["none"][0])
