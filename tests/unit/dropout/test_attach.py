"""Attach, step, audit, detach: what is reached, what is refused, and that nothing is left behind."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.tiny_models import ALL_KINDS, FAMILIES, gradients, loss_of, tiny_model, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import twodice
from twodice.dropout.attach import attach
from twodice.errors import ConfigError, ContractError, ShapeError

KINDS = ("embedding", "attention", "residual", "residual.attention", "residual.mlp", "activation", "output")


@pytest.fixture(autouse=True)
def nothing_stays_attached() -> Iterator[None]:
    from twodice.dropout import handle as module

    yield
    for state in list(module.STATES):
        state.attached = False


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6), nn.Dropout(0.25)).train()


def tree(model: nn.Module) -> dict[str, Any]:
    """Everything that a module tree holds, down to hooks and configs."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name == "config":
                found[f"{path}:config"] = (id(value), dict(value.__dict__))
            elif isinstance(value, dict):
                found[f"{path}:{name}"] = [(k, id(v)) for k, v in value.items()]
            else:
                found[f"{path}:{name}"] = value if isinstance(value, bool | int | float | str) else id(value)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_kind_changes_the_loss_and_the_gradient_flows(family: str, kind: str) -> None:
    model, ids = tiny_model(family), tokens()
    plain = loss_of(model, ids)
    handle = attach(model, {kind: 0.3})
    with handle.step(0):
        loss = loss_of(model, ids)
        loss.backward()
    assert loss.isfinite() and not torch.equal(loss, plain)
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_places_narrow_a_kind(family: str) -> None:
    model = tiny_model(family, layers=3)
    handle = attach(model, "residual.mlp[0:2]=0.1, attention[-1]=0.2, activation[1]=0.3")
    live = {(record.kind, record.layer) for record in handle.audit().live}
    assert live == {
        ("residual.mlp[0:2]", 0),
        ("residual.mlp[0:2]", 1),
        ("activation[1]", 1),
        ("attention[-1:]", 2),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_where_the_contract_puts_them(family: str) -> None:
    model = tiny_model(family, layers=1)
    names = [record.site for record in attach(model, ALL_KINDS).audit().sites if record.source == "plan"]
    base, block = ("transformer", "transformer.h.0") if family == "gpt2" else ("model", "model.layers.0")
    attention, norm = ("attn", "ln_f") if family == "gpt2" else ("self_attn", "norm")
    assert names == [
        f"{base}#embedding", f"{block}.{attention}#attention", f"{block}.{attention}#residual",
        f"{block}.mlp#activation", f"{block}.mlp#residual", f"{base}.{norm}#output",
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_eval_is_bit_equal_to_the_plain_model_inside_and_outside_a_step(family: str) -> None:
    model, ids = tiny_model(family).eval(), tokens()
    plain = model(input_ids=ids).logits
    handle = attach(model, ALL_KINDS)
    assert torch.equal(model(input_ids=ids).logits, plain)
    with handle.step(0):
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert model.generate(input_ids=ids[:1], max_new_tokens=3, min_new_tokens=3, pad_token_id=0).shape == (
        1,
        15,
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_detach_leaves_no_trace(family: str, attention: str) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = {"resid_pdrop": 0.1, "attn_pdrop": 0.1} if family == "gpt2" else {"attention_dropout": 0.1}
    model, ids = tiny_model(family, attn_implementation=attention, **own), tokens()
    model.activation_checkpointing_enable({"use_reentrant": False})
    before, names = tree(model), set(ALL_ATTENTION_FUNCTIONS.valid_keys())
    handle = attach(model, ALL_KINDS)
    outside = tree(model)
    with handle.step(0):
        loss_of(model, ids).backward()
        assert set(ALL_ATTENTION_FUNCTIONS.valid_keys()) != names
    assert tree(model) == outside and set(ALL_ATTENTION_FUNCTIONS.valid_keys()) == names
    handle.detach()
    assert tree(model) == before
    handle.detach()


def test_an_error_in_a_forward_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    handle = attach(model, ALL_KINDS)
    outside = tree(model)
    with pytest.raises(IndexError), handle.step(0):
        model(input_ids=torch.full((1, 4), 10_000))
    assert tree(model) == outside
    with handle.step(0):
        assert loss_of(model, tokens()).isfinite()


def test_own_dropout_is_off_where_the_plan_speaks_and_alone_elsewhere() -> None:
    rates = {"resid_pdrop": 0.9, "embd_pdrop": 0.9, "attn_pdrop": 0.9}
    bare, loud, ids = tiny_model(), tiny_model(**rates), tokens()
    one, two = attach(bare, ALL_KINDS, seed=1), attach(loud, ALL_KINDS, seed=1, share=bare)
    with one.step(0), two.step(0):
        torch.testing.assert_close(loss_of(loud, ids), loss_of(bare, ids), rtol=0, atol=0)
    two.detach()
    assert loud.transformer.drop.p == 0.9
    quiet = attach(loud, "embedding=0, attention=0.0", seed=2)
    with quiet.step(0):
        assert loud.transformer.drop.p == 0.0 and loud.transformer.h[0].attn.attn_dropout.p == 0.0
        assert loud.transformer.h[0].mlp.dropout.p == 0.9
    records = {record.site: record for record in quiet.audit().sites}
    assert (
        records["transformer.h.0.mlp.dropout"].live
        and "does not speak" in records["transformer.h.0.mlp.dropout"].why
    )
    assert not records["transformer.drop"].live and "switched off" in records["transformer.drop"].why
    assert not records["transformer#embedding"].live and "rate is 0" in records["transformer#embedding"].why


def test_the_own_rate_of_llama_s_attention_is_off_where_the_plan_speaks() -> None:
    bare, loud, ids = tiny_model("llama"), tiny_model("llama", attention_dropout=0.9), tokens()
    one, two = attach(bare, "attention=late(0.2, 1)"), attach(loud, "attention=late(0.2, 1)", share=bare)
    for step in (0, 1):
        with one.step(step), two.step(step):
            torch.testing.assert_close(loss_of(loud, ids), loss_of(bare, ids), rtol=0, atol=0)


def test_audit_names_rates_that_nothing_reads() -> None:
    audit = attach(tiny_model("llama", resid_pdrop=0.1), "residual=0.1").audit()
    assert [(r.site, r.live) for r in audit.sites if r.source == "config"] == [("resid_pdrop", False)]
    assert "resid_pdrop" in str(audit) and json.loads(audit.to_json())["sites"][0]["kind"] == "residual"


def test_audit_sees_a_part_in_eval_mode() -> None:
    model = tiny_model()
    handle = attach(model, "residual=0.1")
    model.transformer.h[0].eval()
    assert [record.live for record in handle.audit().sites][:4] == [False, False, True, True]


def test_the_empty_plan_attaches_and_changes_nothing() -> None:
    model, ids = tiny_model(), tokens()
    plain = loss_of(model, ids)
    handle = attach(model, "none")
    with handle.step(0):
        assert torch.equal(loss_of(model, ids), plain)


def test_a_schedule_at_zero_is_the_plain_model_bit_for_bit() -> None:
    model, ids = tiny_model("llama"), tokens()
    plain = loss_of(model, ids)
    handle = attach(model, "residual=early(0.5, 2), attention=early(0.5, 2)")
    losses = []
    for step in range(3):
        with handle.step(step):
            losses.append(loss_of(model, ids))
    assert not torch.equal(losses[0], plain) and torch.equal(losses[2], plain)


def test_training_outside_a_step_raises_and_says_what_to_write() -> None:
    model = tiny_model()
    attach(model, "residual=0.1")
    with pytest.raises(ContractError, match=r"with handle\.step\(step, examples="):
        loss_of(model, tokens())
    with pytest.raises(ContractError, match=r"GPT2Model.*outside a forward of the attached"):
        model.transformer(input_ids=tokens())


def test_generate_in_train_mode_raises_and_names_eval() -> None:
    model = tiny_model()
    handle = attach(model, "residual=0.1")
    with pytest.raises(ContractError, match=r"model\.eval\(\)"):
        model.generate(input_ids=tokens(1), max_new_tokens=2)
    with handle.step(0), pytest.raises(ContractError, match=r"model\.eval\(\)"):
        model.generate(input_ids=tokens(1), max_new_tokens=2, use_cache=False)


def test_a_second_forward_without_examples_raises_with_the_formula() -> None:
    model = tiny_model()
    handle = attach(model, "residual=0.1")
    with handle.step(0):
        loss_of(model, tokens())
        with pytest.raises(ContractError, match=r"\(micro \* world \+ rank\) \* rows \+ arange\(rows\)"):
            loss_of(model, tokens())
    with handle.step(1):
        loss_of(model, tokens())


def test_several_ranks_without_examples_raise_with_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = attach(tiny_model(), "residual=0.1")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ContractError, match=r"\(micro \* world \+ rank\)"), handle.step(0):
        pass
    with handle.step(0, examples=[0]):
        pass


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"step": -1}, "step must be"), ({"step": 2**32}, "step must be"), ({"step": 1.0}, "step must be"),
        ({"step": True}, "step must be"), ({"step": 0, "draw": -1}, "draw must be"),
        ({"step": 0, "examples": [-1]}, r"examples must be in \[0, 2\^32\)"),
        ({"step": 0, "examples": [0.5]}, "must be integers"), ({"step": 0, "examples": 3}, r"\(B,\) or"),
        ({"step": 0, "positions": [0]}, r"\(B, T\) or"),
    ],
)  # fmt: skip
def test_what_a_step_cannot_be_is_refused(arguments: dict[str, Any], says: str) -> None:
    handle = attach(small(), "dropout=0.1")
    with pytest.raises(ConfigError, match=says), handle.step(**arguments):
        pass


def test_steps_take_numpy_numbers_and_do_not_nest() -> None:
    model = small()
    handle = attach(model, "dropout=0.1")
    with handle.step(np.int64(3), examples=np.arange(2)):
        model(torch.ones(2, 6))
        with pytest.raises(ContractError, match="must end before"), handle.step(4):
            pass
        with pytest.raises(ContractError, match="inside a step"):
            handle.detach()
    handle.detach()
    with pytest.raises(ContractError, match="detached"), handle.step(0):
        pass
    with pytest.raises(ContractError, match="detached"):
        handle.audit()


def test_examples_must_fit_the_rows() -> None:
    model = tiny_model()
    handle = attach(model, "residual=0.1")
    with (
        handle.step(0, examples=[0, 1, 2]),
        pytest.raises(ShapeError, match=r"each row of the forward \(8\)"),
    ):
        loss_of(model, tokens())
    with (
        handle.step(0, positions=[[0, 1, 2]]),
        pytest.raises(ShapeError, match=r"positions must be.*attn#residual"),
    ):
        loss_of(model, tokens())


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("dropout.transformer.h.9=0.1", "matches no nn.Dropout"),
        ("attention[7]=0.1", "layers of GPT2LMHeadModel must be 0 to 1, or -2 to -1"),
        ("residual[0:2]=0.1, residual[-1]=0.2", "spoken of once"),
        ("residual=0.1, dropout=0.1", "reach the same tensor"),
        ("residual=early(0.1, 0.5)", "got no total_steps; pass it to attach"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused(plan: str, says: str) -> None:
    model = tiny_model()
    before = tree(model)
    with pytest.raises(ConfigError, match=says):
        attach(model, plan)
    assert tree(model) == before


def test_a_kind_that_a_model_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(
        ConfigError, match=r"'residual' has no site in Sequential; the kinds there are: weight, dropout"
    ):
        attach(small(), "residual=0.1")
    with pytest.raises(ConfigError, match="'dropout' has no site in LlamaForCausalLM"):
        attach(tiny_model("llama"), "dropout=0.1")


def test_attach_refuses_bad_numbers() -> None:
    with pytest.raises(ConfigError, match="total_steps"):
        attach(small(), "dropout=0.1", total_steps=0)
    with pytest.raises(ConfigError, match="seed"):
        attach(small(), "dropout=0.1", seed=2**64)


def test_a_model_or_a_part_of_it_is_attached_once() -> None:
    model = tiny_model()
    attach(model, "residual=0.1")
    for again in (model, model.transformer):
        with pytest.raises(ContractError, match="attached once"):
            attach(again, "embedding=0.1", seed=5)


def test_a_second_model_at_one_seed_warns_unless_it_is_meant() -> None:
    one = attach(small(), "dropout=0.1", seed=3)
    with pytest.warns(UserWarning, match="share=other"):
        attach(small(), "dropout=0.1", seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(small(), "dropout=0.1", seed=3, share=one)
        attach(small(), "dropout=0.1", seed=4)
    with pytest.raises(ConfigError, match="one seed"):
        attach(small(), "dropout=0.1", seed=5, share=one)
    with pytest.raises(ConfigError, match="not attached"):
        attach(small(), "dropout=0.1", seed=5, share=small())


def test_a_model_that_is_gone_is_no_twin() -> None:
    attach(small(), "dropout=0.1", seed=77)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(small(), "dropout=0.1", seed=77)


def test_a_deep_copy_is_detached_and_says_so() -> None:
    model, ids = tiny_model(resid_pdrop=0.1), tokens()
    handle = attach(model, ALL_KINDS)
    with pytest.warns(UserWarning, match="deep copy of an attached model is detached") as caught:
        copied = copy.deepcopy(model)
    assert len(caught) == 1
    assert loss_of(copied, ids).isfinite()
    again = attach(copied, ALL_KINDS, share=handle)
    with handle.step(0), again.step(0):
        torch.testing.assert_close(loss_of(copied, ids), loss_of(model, ids), rtol=0, atol=0)
        with pytest.raises(ContractError, match="copy it outside"):
            copy.deepcopy(model)


def test_an_attached_model_is_not_pickled_and_says_what_to_save() -> None:
    model = small()
    handle = attach(model, "dropout=0.1")
    with pytest.raises(ContractError, match="save its state_dict"):
        pickle.dumps(model)
    handle.detach()
    pickle.dumps(model)


def test_models_that_share_a_config_do_not_touch_each_other() -> None:
    import transformers

    model = tiny_model()
    other = transformers.GPT2LMHeadModel(model.config).train()
    other.loss_type = "ForCausalLM"
    ids = tokens()
    plain = loss_of(other, ids)
    handle = attach(model, ALL_KINDS)
    with handle.step(0):
        assert torch.equal(loss_of(other, ids), plain)
        assert other.config is model.config and other.config._attn_implementation == "sdpa"


def test_attention_that_is_not_served_is_refused_by_name() -> None:
    model = tiny_model("llama")
    handle = attach(model, "attention=0.1")
    with handle.step(0), pytest.raises(ConfigError, match=r"'head_mask'.*self_attn#attention"):
        model(input_ids=tokens(), head_mask=torch.ones(4))
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ConfigError, match="served for eager and sdpa"), handle.step(0):
        pass
    with pytest.raises(ConfigError, match="reorder_and_upcast_attn"):
        attach(tiny_model(reorder_and_upcast_attn=True), "attention=0.1", seed=1)


def test_plain_modules_are_reached_and_the_mask_is_that_of_the_function() -> None:
    model, x = small(), torch.ones(4, 6)
    handle = attach(model, "dropout.1=0.5, dropout.3=0.25", seed=9)
    with handle.step(2, examples=[5, 6, 7, 8]):
        found = model(x)
    handle.detach()
    assert [model[1].p, model[3].p] == [0.5, 0.25]
    y = x
    for number, layer in enumerate(model):
        if isinstance(layer, nn.Dropout):
            key = twodice.Key(9).child("dropout", f"{number}#dropout", 0, 0)
            slots = torch.tensor([5, 6, 7, 8])
            y = twodice.dropout(y, layer.p, key=key, step=2, examples=slots, layout="bc")
        else:
            y = layer(y)
    assert torch.equal(found, y)


def test_a_shape_that_cannot_be_told_is_an_error_with_the_site() -> None:
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.5)).train()
    handle = attach(model, "dropout=0.5")
    with handle.step(0), pytest.raises(ShapeError, match=r"'1#dropout'.*\(2, 1, 3, 3\)"):
        model(torch.ones(2, 1, 3, 3))

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(x.transpose(0, 1))

    turned = Turned().train()
    handle = attach(turned, "dropout=0.5", seed=1)
    with handle.step(0), pytest.raises(ShapeError, match="rows of the model's input"):
        turned(torch.ones(2, 5, 3))


def test_the_fast_path_of_eval_stays() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1)).eval()
    x = torch.ones(2, 3, 8)
    with torch.no_grad():
        plain = model(x)
        handle = attach(model, "dropout=0.1")
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model[0].modules())
        assert torch.equal(model(x), plain)
    model.train()
    with handle.step(0):
        assert not torch.equal(model(x), plain)


class Checkpointed(nn.Module):
    """A module that checkpoints a part of itself on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.GELU(), nn.Linear(6, 6))
        self.contexts: Any = None
        self.on = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.on:
            return self.inner(x)
        extra = {} if self.contexts is None else {"context_fn": self.contexts}
        return checkpoint(self.inner, x, use_reentrant=False, **extra)


def test_a_checkpoint_of_one_s_own_re_enters_by_its_contexts_and_raises_without() -> None:
    model = Checkpointed().train()
    handle = attach(model, "dropout=0.5")
    x = torch.ones(3, 6)
    found = []
    for model.on in (False, True):
        model.contexts = handle.recompute
        model.zero_grad()
        with handle.step(0, examples=[0, 1, 2]):
            y = model(x).sum()
        y.backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    model.contexts = None
    with handle.step(0):
        y = model(x).sum()
        with pytest.raises(ContractError, match=r"context_fn=handle\.recompute"):
            y.backward()


def test_eval_between_forward_and_its_recomputation_raises() -> None:
    model = tiny_model()
    model.activation_checkpointing_enable({"use_reentrant": False})
    handle = attach(model, "residual=0.1")
    with handle.step(0):
        loss = loss_of(model, tokens())
    model.eval()
    with pytest.raises(ContractError, match="run backward first"):
        loss.backward()


def test_wrappers_leave_no_trace_in_names() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain, wrapped = small(), small()
    wrapped[1] = torch.compile(wrapped[1], backend="eager")
    wrapped[3] = checkpoint_wrapper(wrapped[3])
    names = [
        [
            record.site
            for record in attach(m, "dropout=0.1", seed=seed).audit().sites
            if record.source == "plan"
        ]
        for seed, m in enumerate((plain, torch.compile(wrapped, backend="eager")))
    ]
    assert names[0] == names[1] == ["1#dropout", "3#dropout"]
    with pytest.raises(ConfigError, match="DataParallel"):
        attach(nn.DataParallel(small()), "dropout=0.1", seed=5)


def test_a_checkpoint_wrapper_inside_a_model_re_enters() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6), nn.GELU())).train()
    found = []
    for _ in range(2):
        handle = attach(model, "dropout=0.5")
        model.zero_grad()
        with handle.step(0, examples=[0, 1]):
            loss = model(torch.ones(2, 6)).sum()
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        handle.detach()
        model[1] = checkpoint_wrapper(model[1])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_attaching_after_compilation_is_not_ignored() -> None:
    model = tiny_model("llama", layers=1)
    compiled = torch.compile(model, backend="eager")
    ids = tokens(2)
    plain = loss_of(compiled, ids)
    handle = attach(model, "residual=0.3")
    with handle.step(0):
        assert not torch.equal(loss_of(compiled, ids), plain)
    handle.detach()
    torch.testing.assert_close(loss_of(compiled, ids), plain)
    torch._dynamo.reset()
