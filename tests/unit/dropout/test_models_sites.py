"""Where the sites of each architecture are: every place runs, has the axes that it says, and is the tensor
that its kind means.

What a tensor means is held against the model itself: a residual that is set to zero must do what zero weights
in the last linear do, and nothing of a stack's input may get around its embedding or its output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from tests.support.model_table import COMMAND, FILE, models_table
from tests.support.model_zoo import LENGTH, ROWS, SOURCE, ZOO
from torch import nn

from twodice.dropout.sites import Inventory, OwnDropout, Place, find

#: The last linear of attention, feed-forward and cross-attention in a block: by hand, not from the table.
LAST = {
    "GPT-2": ("attn.c_proj", "mlp.c_proj"),
    "GPT-NeoX": ("attention.dense", "mlp.dense_4h_to_h"),
    "OPT": ("self_attn.out_proj", "fc2"),
    "BLOOM": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "Falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "Falcon, parallel": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "BERT": ("attention.output.dense", "output.dense"),
    "RoBERTa": ("attention.output.dense", "output.dense"),
    "ELECTRA": ("attention.output.dense", "output.dense"),
    "DistilBERT": ("attention.out_lin", "ffn.lin2"),
    "ModernBERT": ("attn.Wo", "mlp.Wo"),
    "ALBERT": ("attention.dense", "ffn_output"),
    "T5": ("layer.0.SelfAttention.o", "layer.{last}.DenseReluDense.wo", "layer.1.EncDecAttention.o"),
    "BART": ("self_attn.out_proj", "fc2", "encoder_attn.out_proj"),
    "Marian": ("self_attn.out_proj", "fc2", "encoder_attn.out_proj"),
    "Whisper": ("self_attn.out_proj", "fc2", "encoder_attn.out_proj"),
    "ViT": ("attention.o_proj", "mlp.fc2"),
    "nn.Transformer": ("self_attn.out_proj", "linear2", "multihead_attn.out_proj"),
    "nn.TransformerEncoder": ("self_attn.out_proj", "linear2"),
}
LLAMA = ("self_attn.o_proj", "mlp.down_proj")
EVERY = pytest.mark.parametrize("name", ZOO)
STACKED = pytest.mark.parametrize(
    "name", [name for name in ZOO if not name.startswith(("nn.M", "nn.L", "nn.G", "c", "ML"))]
)


@contextmanager
def changed(place: Place, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """The tensor of a place of the codes ``input`` or ``output``, changed while this lasts."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
        return change(args[0]), *args[1:]

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return change(output[0]), *output[1:]
        return change(output)

    if place.tensor == "input":
        handle = place.module.register_forward_pre_hook(before)
    else:
        handle = place.module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def logits(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """The logits of a model, without gradients."""
    with torch.no_grad():
        return model(**batch)["logits"].clone()


def other_input(batch: dict[str, Any], stack: str | None) -> dict[str, Any]:
    """The batch with another input of a stack."""
    names = {"encoder": ("inputs", "input_ids", "input_features"), "decoder": ("target", "labels")}
    wanted = names.get(stack or "", ("inputs", "input_ids", "pixel_values"))
    name = next(n for n in wanted if n in batch)
    return {**batch, name: batch[name].flip(-1).roll(1, 0)}


def positions(place: Place, name: str) -> int:
    """How many positions the stack of a place has in the zoo's batches."""
    if name == "ViT":
        return 5
    return SOURCE if place.stack == "encoder" else LENGTH


def last_linears(name: str, block: nn.Module, part: str) -> list[nn.Parameter]:
    """The weights of what computes a branch's result last."""
    paths = LAST.get(name, LLAMA)
    if part == "mlp" and hasattr(block, "mlp") and hasattr(block.mlp, "experts"):
        return [p for n, p in block.mlp.named_parameters() if "down_proj" in n]
    path = paths[{"attention": 0, "mlp": 1, "cross": 2}[part]]
    if "{last}" in path:
        path = path.format(last=len(block.layer) - 1)
    return list(block.get_submodule(path).parameters())


@contextmanager
def zeroed(parameters: list[nn.Parameter], but_bias: bool = False) -> Iterator[None]:
    """Parameters that are zero while this lasts."""
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            if p.dim() > 1 or not but_bias:
                p.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)


@EVERY
def test_every_place_runs_with_the_axes_that_it_says(name: str) -> None:
    model, batch = ZOO[name]()
    found = find(model)
    assert len({place.name for place in found.places}) == len(found.places)
    seen: dict[int, list[torch.Size]] = {}
    handles = []
    for number, place in enumerate(found.places):

        def before(module: nn.Module, args: Any, kwargs: Any, number: int = number) -> None:
            first = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
            # Marian's table of positions is asked with a shape.
            seen.setdefault(number, []).append(torch.Size() if first is None else first.shape)

        def after(module: nn.Module, args: Any, output: Any, number: int = number) -> None:
            output = output[0] if isinstance(output, tuple) else output
            seen.setdefault(number, []).append(output.shape)

        if place.tensor in ("output", "skip"):
            handles.append(place.module.register_forward_hook(after))
        else:
            handles.append(place.module.register_forward_pre_hook(before, with_kwargs=True))
    logits(model, batch)
    for handle in handles:
        handle.remove()
    for number, place in enumerate(found.places):
        assert number in seen, f"{place.name} does not run"
        T = positions(place, name)
        for shape in seen[number]:
            if place.tensor in ("weight", "multihead", "attention", "recurrent"):
                continue
            if place.layout == "btc":
                assert tuple(shape[:2]) == (ROWS, T) and len(shape) == 3, (place.name, shape)
            elif place.layout == "nc":
                assert shape[0] == ROWS * T and len(shape) == 2, (place.name, shape)
            elif place.layout == "bhts":
                assert shape[0] == ROWS and shape[1] == place.extra.get("heads", 4) and len(shape) == 4
            elif place.layout == "bchw":
                assert shape[0] == ROWS and len(shape) == 4
            else:
                assert place.layout is None and shape[0] == ROWS, (place.name, shape)


@STACKED
def test_a_residual_at_zero_is_a_branch_whose_last_linear_is_zero(name: str) -> None:
    model, batch = ZOO[name]()
    found = find(model)
    places = [place for place in found.places if place.kind == "residual"]
    parts = {(s.name, n, b.part) for s in found.stacks for n in range(s.count) for b in s.form.branches}
    assert len(places) == sum(s.count * (2 + (s.name == "decoder")) for s in found.stacks) <= len(parts)
    plain = logits(model, batch)
    for place in places:
        stack = next(s for s in found.stacks if s.name == place.stack)
        block = stack.blocks[place.layer]
        with changed(place, torch.zeros_like):
            cut = logits(model, batch)
        with zeroed(last_linears(name, block, place.part)):
            wanted = logits(model, batch)
        assert torch.allclose(cut, wanted, atol=1e-6), place.name
        assert not torch.allclose(cut, plain, atol=1e-3), place.name


@STACKED
def test_an_activation_at_zero_leaves_only_the_bias_of_the_last_linear(name: str) -> None:
    model, batch = ZOO[name]()
    found = find(model)
    plain = logits(model, batch)
    places = [place for place in found.places if place.kind == "activation"]
    assert places
    for place in places:
        stack = next(s for s in found.stacks if s.name == place.stack)
        if place.tensor == "experts" or hasattr(getattr(stack.blocks[place.layer], "mlp", None), "experts"):
            continue
        with changed(place, torch.zeros_like):
            cut = logits(model, batch)
        with zeroed(last_linears(name, stack.blocks[place.layer], "mlp"), but_bias=True):
            wanted = logits(model, batch)
        assert torch.allclose(cut, wanted, atol=1e-6), place.name
        assert not torch.allclose(cut, plain, atol=1e-3), place.name


@pytest.mark.parametrize("kind", ["embedding", "token", "output"])
@STACKED
def test_nothing_of_a_stacks_input_gets_around_its_embedding_or_its_output(name: str, kind: str) -> None:
    model, batch = ZOO[name]()
    found = find(model)
    places = [place for place in found.places if place.kind == kind]
    if kind == "output" and name == "ALBERT":
        assert not places
        return
    assert [place.stack for place in places] == [stack.name for stack in found.stacks]
    for place in places:
        other = other_input(batch, place.stack)
        assert not torch.allclose(logits(model, batch), logits(model, other), atol=1e-3)
        with changed(place, torch.zeros_like):
            assert torch.allclose(logits(model, batch), logits(model, other), atol=1e-6), place.name


@STACKED
def test_skip_names_the_stream_that_is_added_to_the_branch(name: str) -> None:
    model, batch = ZOO[name]()
    found = find(model)
    places = [place for place in found.places if place.kind == "skip"]
    if name in ("GPT-NeoX", "Falcon, parallel", "Granite"):
        assert not places and any("no site of skip" in why for _, why in found.undecided)
        return
    # One module for both, so that this test holds the place of `residual` too: a norm in between (Gemma,
    # OLMo) does not show where a branch is zero.
    residuals = [(place.path, place.module) for place in found.places if place.kind == "residual"]
    assert [(place.path, place.module) for place in places] == residuals
    for place in places:
        stack = next(s for s in found.stacks if s.name == place.stack)
        results: list[torch.Tensor] = []
        streams: list[torch.Tensor] = []

        def keep(module: nn.Module, args: Any, kwargs: Any, streams: list[torch.Tensor] = streams) -> None:
            streams.append(next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)))

        def end(module: nn.Module, args: Any, output: Any, results: list[torch.Tensor] = results) -> None:
            results.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as stack_of_hooks:
            stream = place.extra["stream"].register_forward_pre_hook(keep, with_kwargs=True)
            stack_of_hooks.callback(stream.remove)
            stack_of_hooks.callback(stack.blocks[place.layer].register_forward_hook(end).remove)
            with changed(place, lambda y, streams=streams: -streams[-1].view_as(y)):
                logits(model, batch)
        # The sum is zero at every position, so what follows in the block cannot tell positions apart.
        for result in results:
            assert result.dim() == 3
            assert (result - result[:, :1]).abs().max() < 2e-5, place.name


@EVERY
def test_the_attention_function_is_asked_by_the_module_of_the_place(name: str) -> None:
    from transformers.modeling_utils import AttentionInterface

    model, batch = ZOO[name]()
    found = find(model)
    places = [place for place in found.places if place.kind == "attention"]
    asking = [place for place in places if place.tensor == "attention"]
    assert [p.path for p in found.places if p.kind == "key" and p.tensor == "attention"] == [
        p.path for p in asking
    ]
    asked: dict[int, tuple[int, int]] = {}
    widths: dict[int, int] = {}

    def probe(module: nn.Module, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
        asked[id(module)] = query.shape[1], query.shape[1] * value.shape[-1]
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register("probe", probe)
    try:
        for place in asking:
            assert place.extra["eager"].__name__ == "eager_attention_forward"
            shadow = copy.copy(place.module.config)
            shadow.__dict__["_attn_implementation_internal"] = "probe"
            place.module.__dict__["config"] = shadow
        for head in (p for p in found.places if p.kind == "head" and p.tensor == "input"):

            def measure(module: nn.Module, args: Any, head: Place = head) -> None:
                widths[id(head.module)] = args[0].shape[-1]

            head.module.register_forward_pre_hook(measure)
        logits(model, batch)
    finally:
        AttentionInterface._global_mapping.pop("probe")
    heads = {place.path: place for place in found.places if place.kind == "head"}
    assert len(heads) == sum(place.kind == "head" for place in found.places)
    for place in asking:
        head = heads[place.path]
        assert asked[id(place.module)] == (place.extra["heads"], widths[id(head.module)]), place.name
        assert head.extra["heads"] == place.extra["heads"]


@pytest.mark.parametrize("name", [name for name in ZOO if name.startswith(("BLOOM", "Falcon"))])
def test_weights_that_pass_a_dropout_module_are_what_the_place_says(name: str) -> None:
    model, batch = ZOO[name]()
    found = find(model)
    places = [place for place in found.places if place.kind == "attention"]
    if name == "Falcon, parallel":
        assert not places and any("alibi=False" in why for _, why in found.undecided)
        assert not any("attention_dropout" in place.name for place in found.places)
        return
    assert len(places) == 2 and not any(place.kind == "key" for place in found.places)
    seen: list[torch.Tensor] = []
    for place in places:
        assert place.tensor == "probabilities"
        place.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model, batch)
    assert all(torch.allclose(w.sum(-1), torch.ones(ROWS, 4, LENGTH)) for w in seen) and len(seen) == 2


def rates_of(name: str, rate: float) -> dict[str, float]:
    """Settings that give every own rate of a model a value."""
    model, _ = ZOO[name]()
    config = getattr(model, "config", None)
    if config is None:
        return {"dropout": rate}
    fields = [n for n, v in config.to_dict().items() if "drop" in n and isinstance(v, int | float)]
    return {n: rate for n in fields if "layerdrop" not in n and not isinstance(getattr(config, n), bool)}


def switch_off(own: OwnDropout) -> None:
    """Set an own rate to zero, as `attach` does while a step runs."""
    if own.through is not None:
        holder = copy.copy(getattr(own.module, own.through))
        setattr(holder, own.attribute, 0.0)
        own.module.__dict__[own.through] = holder
    else:
        own.module.__dict__[own.attribute] = 0.0


@pytest.mark.parametrize("name", [name for name in ZOO if not name.startswith("nn.GRU")])
def test_every_own_rate_is_found_and_off_it_is_off(name: str) -> None:
    settings = rates_of(name, 0.4)
    model, batch = ZOO[name](**settings)
    found = find(model)
    wanted = logits(ZOO[name]()[0], batch)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert not torch.allclose(logits(model, batch), wanted, atol=1e-3), "own rates have no effect"
        assert found.own and all(own.rate == 0.4 for own in found.own)
        for own in found.own:
            switch_off(own)
        assert torch.allclose(logits(model, batch), wanted, atol=1e-6)
    for own in found.own:
        assert own.feeds is None or own.feeds in {place.name for place in found.places}
        assert not own.shared or (own.feeds in own.shared and len(own.shared) > 1)


def activations(model: nn.Module, batch: dict[str, Any], found: Inventory, near: Place) -> list[torch.Tensor]:
    """The activation in the block of another place, in two forwards."""
    place = next(
        p for p in found.places if (p.kind, p.layer, p.stack) == ("activation", near.layer, near.stack)
    )
    seen: list[torch.Tensor] = []
    handle = place.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    for _ in range(2):
        logits(model, batch)
    handle.remove()
    return seen


@STACKED
def test_every_own_rate_names_the_sites_that_it_feeds(name: str) -> None:
    model, batch = ZOO[name](**rates_of(name, 0.4))
    found = find(model)
    places = {place.name: place for place in found.places}
    heads = {(p.path, p.part): p for p in found.places if p.kind == "head"}
    numbers: dict[tuple[int, str], list[OwnDropout]] = {}
    for own in found.own:
        numbers.setdefault((id(own.module), own.attribute), []).append(own)
    kept = [dict(own.module.__dict__) for own in found.own]
    tried = set()
    for number, records in numbers.items():
        fed = [places[own.feeds] for own in records if own.feeds is not None]
        what = tuple((place.kind, place.part, place.stack) for place in fed)
        if not fed:
            assert records[0].path.partition(".")[0] in (
                "classifier",
                "head",
                "generator_predictions",
                "dropout",
            )
        if what in tried or not fed or any(p.tensor in ("experts", "multihead") for p in fed):
            continue
        tried.add(what)
        for own in found.own:
            if (id(own.module), own.attribute) != number:
                switch_off(own)
        with torch.random.fork_rng(), ExitStack() as stack:
            torch.manual_seed(5)
            assert not torch.allclose(logits(model, batch), logits(model, batch), atol=1e-4), what
            if {(place.kind, place.part) for place in fed} == {("residual", "mlp")}:
                # What feeds the branch's result leaves the input of its last linear alone.
                assert torch.equal(*activations(model, batch, found, fed[0])), what
            for place in fed:
                # Weights of attention are out of reach here; at zero heads nothing of them is left.
                cut = heads[place.path, place.part] if place.kind == "attention" else place
                stack.enter_context(changed(cut, torch.zeros_like))
            assert torch.equal(logits(model, batch), logits(model, batch)), what
        for own, state in zip(found.own, kept, strict=True):
            own.module.__dict__.update(state)
            if own.through is None and own.attribute not in state:
                own.module.__dict__.pop(own.attribute, None)
    assert tried or name in ("nn.TransformerEncoder",)


def test_gpt_2_and_its_kin_keep_the_names_of_the_contract() -> None:
    for name, base, attention in (
        ("GPT-2", "transformer", "transformer.h.1.attn"),
        ("Llama", "model", "model.layers.1.self_attn"),
        ("Mistral", "model", "model.layers.1.self_attn"),
        ("Qwen2", "model", "model.layers.1.self_attn"),
    ):
        names = [
            p.name for p in find(ZOO[name]()[0]).places if p.kind not in ("weight", "skip", "key", "token")
        ]
        mlp = attention.rsplit(".", 1)[0] + ".mlp"
        wanted = [f"{attention}#attention", f"{attention}#residual", f"{mlp}#activation", f"{mlp}#residual"]
        assert names[0] == f"{base}#embedding"
        assert [n for n in names if n in wanted] == wanted


def test_encoder_and_decoder_are_stacks_with_layers_of_their_own() -> None:
    found = find(ZOO["BART"]()[0])
    assert [(s.name, s.path, s.count) for s in found.stacks] == [
        ("encoder", "model.encoder", 2),
        ("decoder", "model.decoder", 1),
    ]
    residuals = [(p.stack, p.layer, p.part) for p in found.places if p.kind == "residual"]
    assert residuals == [
        *[("encoder", layer, part) for layer in (0, 1) for part in ("attention", "mlp")],
        *[("decoder", 0, part) for part in ("attention", "cross", "mlp")],
    ]


def test_one_number_for_several_sites_says_so() -> None:
    own = [
        o
        for o in find(ZOO["BART"](dropout=0.1)[0]).own
        if o.path == "model.decoder.layers.0" and o.attribute == "dropout"
    ]
    fed = [f"model.decoder.layers.0.{at}#residual" for at in ("self_attn", "encoder_attn", "fc2")]
    assert [o.feeds for o in own] == fed and all(o.shared == tuple(fed) for o in own)


def test_falcon_reads_its_rates_from_the_config_in_each_forward() -> None:
    found = find(ZOO["Falcon"](attention_dropout=0.1, hidden_dropout=0.2)[0])
    through = {(o.attribute, o.rate, o.feeds) for o in found.own if o.through == "config" and ".0" in o.path}
    assert through == {
        ("attention_dropout", 0.1, "transformer.h.0.self_attention#residual"),
        ("hidden_dropout", 0.2, "transformer.h.0.mlp#residual"),
    }


@pytest.mark.parametrize(
    "name, settings, wanted",
    [
        ("Phi-3", {"embd_pdrop": 0.1}, {"embd_pdrop"}),
        ("GPT-2", {"summary_first_dropout": 0.1}, {"summary_first_dropout"}),
        ("DistilBERT", {}, {"qa_dropout", "seq_classif_dropout"}),
        (
            "Falcon, parallel",
            {"attention_dropout": 0.1},
            {f"transformer.h.{i}.self_attention.attention_dropout" for i in (0, 1)},
        ),
        (
            "ALBERT",
            {"hidden_dropout_prob": 0.1},
            {"albert.encoder.albert_layer_groups.0.albert_layers.0.dropout"},
        ),
        ("Llama", {"attention_dropout": 0.1}, set()),
    ],
)
def test_a_rate_that_is_set_and_never_takes_effect_is_a_phantom(
    name: str, settings: dict[str, Any], wanted: set[str]
) -> None:
    found = find(ZOO[name](**settings)[0])
    assert {path for path, _, _ in found.phantoms} == wanted
    assert not any(place.path in wanted or own.path in wanted for place in found.places for own in found.own)


@pytest.mark.parametrize(
    "name, settings, path, words",
    [
        ("OPT", {"layerdrop": 0.2}, "model.decoder", "LayerDrop"),
        ("BART", {"decoder_layerdrop": 0.2}, "model.decoder", "LayerDrop"),
        ("Mixtral", {"router_jitter_noise": 0.1}, "model.layers.0.mlp", "jitter"),
        ("Whisper", {"apply_spec_augment": True, "mask_time_prob": 0.2}, "model", "SpecAugment"),
    ],
)
def test_chance_outside_every_plan_is_listed(
    name: str, settings: dict[str, Any], path: str, words: str
) -> None:
    assert find(ZOO[name]()[0]).random == []
    listed = find(ZOO[name](**settings)[0]).random
    assert listed and listed[0][0] == path and words in listed[0][1]


def test_experts_are_told_with_their_number_and_width() -> None:
    found = find(ZOO["DeepSeek-V3"]()[0])
    places = {p.path: p for p in found.places if p.kind == "activation"}
    assert list(places) == [
        "model.layers.0.mlp",
        "model.layers.1.mlp.experts",
        "model.layers.1.mlp.shared_experts",
    ]
    experts = places["model.layers.1.mlp.experts"]
    assert (experts.tensor, experts.extra) == ("experts", {"experts": 4, "width": 12})


def test_a_feed_forward_in_chunks_is_left_out_by_name() -> None:
    found = find(ZOO["BERT"](chunk_size_feed_forward=2)[0])
    assert "activation" not in found.kinds and {p.part for p in found.places if p.kind == "residual"} == {
        "attention"
    }
    assert any("chunk_size_feed_forward=2" in why for _, why in found.undecided)


def test_tied_weights_name_each_other() -> None:
    places = {p.path: p for p in find(ZOO["T5"](tie_word_embeddings=True)[0]).places if p.kind == "weight"}
    assert "shared" not in places
    assert set(places["encoder.embed_tokens"].extra["tied"]) >= {"decoder.embed_tokens", "lm_head"}
    alone = [p for p in find(ZOO["Llama"]()[0]).places if p.kind == "weight"]
    assert all(p.extra["tied"] == () for p in alone)


class Gate(nn.Module):
    """A block that no row of the table knows: a gate with weights of its own on each branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))
        self.norm_in = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the stream after two gated branches."""
        gates = torch.sigmoid(self.gate(x))
        h = self.norm_in(x)
        x = x + gates[..., :1] * self.attn(h, h, h, need_weights=False)[0]
        return x + gates[..., 1:] * self.mlp(self.norm_in(x))


class Gated(nn.Module):
    """A stack of such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(43, 16)
        self.blocks = nn.ModuleList([Gate(16) for _ in range(3)])
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the last states."""
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def test_a_block_that_no_row_knows_gets_what_its_structure_tells_and_the_rest_is_said() -> None:
    found = find(Gated().train())
    kinds = {kind: sum(p.kind == kind for p in found.places) for kind in found.kinds}
    assert kinds == {
        "embedding": 1, "token": 1, "attention": 3, "key": 3, "head": 3, "activation": 3, "layer": 3,
        "output": 1, "weight": 3 * 5 + 1,
    }  # fmt: skip
    assert [path for path, why in found.undecided if "fit no form" in why and "gate" in why] == [""]


def test_a_vision_net_and_an_mlp_have_their_dropout_modules_with_axes() -> None:
    found = find(ZOO["convolutional net"]()[0])
    places = [(p.path, p.layout, p.tensor) for p in found.places if p.kind == "dropout"]
    assert places == [
        ("inside.2", "bchw", "output"),
        ("inside.5", "bchw", "channels"),
        ("inside.9", None, "output"),
    ]


def test_time_first_modules_say_so() -> None:
    found = find(ZOO["nn.TransformerEncoder"](batch_first=False)[0])
    flows = {
        p.layout
        for p in found.places
        if p.kind in ("embedding", "residual", "activation", "dropout", "output")
    }
    assert flows == {"tbc"}


def names(found: Inventory) -> list[str]:
    """Names of all sites that are not an adapter's own."""
    return [p.name for p in found.places if "lora_" not in p.name]


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "BERT", "T5"])
def test_adapters_leave_no_trace_in_names_and_their_dropout_is_a_site(name: str) -> None:
    peft = pytest.importorskip("peft")
    model, batch = ZOO[name]()
    plain = find(model)
    wanted = {
        "GPT-2": ["c_attn", "c_proj"], "Llama": ["q_proj", "o_proj", "down_proj"],
        "BERT": ["query", "dense"], "T5": ["q", "o", "wo"],
    }[name]  # fmt: skip
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=wanted, fan_in_fan_out=name == "GPT-2")
    )
    found = find(adapted.train())
    assert names(found) == names(plain)
    dropped = [p for p in found.places if p.kind == "dropout" and "lora_dropout" in p.path]
    assert dropped and not any("base_layer" in p.name or "base_model" in p.name for p in found.places)
    seen: set[str] = set()
    for place in found.places:
        if place.tensor in ("input", "output", "attention", "block", "weight"):
            place.module.register_forward_hook(lambda m, a, o, n=place.name: seen.add(n))
    logits(adapted, batch)
    assert seen == {
        p.name for p in found.places if p.tensor in ("input", "output", "attention", "block", "weight")
    }
    # The adapter's whole layer is where activation and residual hook, so what it adds is dropped too.
    adapters = {id(m) for m in adapted.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    last = next(p for p in found.places if p.kind == "activation")
    assert id(last.module) in adapters


def test_quantised_linears_are_found_by_name_and_their_weights_are_left_out_by_name() -> None:
    class Quantised(nn.Module):
        """Stands for a linear layer with packed weights, which is no nn.Linear."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.packed = linear.weight.detach().to(torch.int8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Return something of the right shape."""
            return x @ self.packed.to(x.dtype).t()

    Quantised.__name__ = "QuantisedLinear"
    model, batch = ZOO["Llama"]()
    plain = names(find(model))
    for layer in model.model.layers:
        layer.mlp.down_proj = Quantised(layer.mlp.down_proj)
        layer.self_attn.o_proj = Quantised(layer.self_attn.o_proj)
    found = find(model)
    gone = set(plain) - set(names(found))
    assert gone == {
        f"model.layers.{i}.{at}#weight" for i in (0, 1) for at in ("mlp.down_proj", "self_attn.o_proj")
    }
    assert sum("packed" in why for _, why in found.undecided) == 4
    logits(model, batch)


def test_wrappers_leave_no_trace() -> None:
    model = ZOO["BERT"]()[0]
    plain = names(find(model))
    assert names(find(torch.compile(model))) == plain
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for number, block in enumerate(model.bert.encoder.layer):
        model.bert.encoder.layer[number] = checkpoint_wrapper(block)
    assert names(find(model)) == plain


def test_the_table_in_the_docs_is_what_is_found() -> None:
    assert FILE.read_text("utf-8") == models_table(), f"{FILE.name} is out of date; renew it: {COMMAND}"
