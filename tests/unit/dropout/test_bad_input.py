"""What a newcomer gets wrong, and what he is told: what must hold, what came, how to repair it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.support.model_zoo import ZOO
from tests.support.tiny_models import loss_of, tiny_model, tokens
from torch import nn

import twodice
from twodice.dropout.handle import Handle
from twodice.errors import ConfigError, ContractError, ShapeError, TwodiceError

FORMULA = "examples=(micro * world + rank) * rows + arange(rows)"


@pytest.fixture
def handles() -> Iterator[list[Handle]]:
    made: list[Handle] = []
    yield made
    for handle in made:
        handle.detach()


def told(kind: type[TwodiceError], wrong: Callable[[], Any], must: str, got: str, repair: str) -> str:
    """The message of an error, which has its three parts in this order."""
    with pytest.raises(kind) as caught:
        wrong()
    text = str(caught.value)
    assert 0 <= text.find(must) < text.find(got) < text.find(repair), text
    return text


@pytest.mark.parametrize(
    ("plan", "must", "got", "repair"),
    [
        # Entries that overlap, as far as the text tells, and as only the model can tell.
        (
            "residual=0.1, residual.mlp=0.2",
            "each site must be spoken of once",
            "'residual.mlp=0.2' and 'residual=0.1' overlap",
            "narrow one by place or layers, or leave it out",
        ),
        (
            "attention[0:2]=0.1, attention[-1]=0.2",
            "each site must be spoken of once",
            "both reach 'transformer.h.1.attn#attention'",
            "narrow one by place or layers, or leave it out",
        ),
        (
            "residual=0.1, dropout=0.2",
            "each tensor must be spoken of once",
            "'residual=0.1' and 'dropout=0.2' reach the same tensor at 'transformer.h.0.attn.resid_dropout'",
            "narrow 'dropout' by its path",
        ),
        # What matches nothing: a kind, a place, a path, a layer.
        ("residal=0.1", "a kind must be one of embedding", "got 'residal'", "did you mean 'residual'?"),
        ("mlp=0.1", "a kind must be one of embedding", "got 'mlp'", "write residual.mlp or skip.mlp"),
        ("residual.cross=0.1", "'residual.cross' has no site", "in GPT2LMHeadModel", "leave 'cross' out"),
        (
            "dropout.lm=0.1",
            "'dropout.lm' matches no nn.Dropout",
            "of GPT2LMHeadModel",
            "such as 'transformer",
        ),
        # A second use of a matrix: without a word it drops in the lookup alone, and here none is named.
        (
            "weight.lm_head=0.1",
            "is dropped in its lookup alone",
            "'weight.lm_head' names no lookup in GPT2LMHeadModel, but what 'transformer.wte' has too",
            "write weight.lm_head:tied for this use of it, or weight:tied",
        ),
        ("attention[7]=0.1", "layers of GPT2LMHeadModel must be 0 to 1", "or -2 to -1", "got 'attention[7]'"),
        # A constant rate of 1 where everything must pass.
        ("residual=1", "p must be below 1 at 'residual'", "nothing would pass there", "write a lower rate"),
        ("residual=depth(0.0, 1.0)", "p must be below 1", "got depth(0.0, 1.0)", "write a lower rate"),
        ("skip[0]=1", "p must be below 1 at 'skip[0]'", "nothing would pass there", "write a lower rate"),
        # A schedule that cannot know where it ends.
        (
            "residual=linear(0.2, 0.0)",
            "the length of the run must be known to 'residual=linear(0.2, 0.0)'",
            "got no total_steps",
            "pass it to attach, or write whole steps",
        ),
    ],
)
def test_a_plan_that_cannot_be_meant(plan: str, must: str, got: str, repair: str) -> None:
    told(ConfigError, lambda: twodice.attach(tiny_model(), plan), must, got, repair)


def test_a_site_that_a_model_does_not_have_is_told_with_those_it_has() -> None:
    told(
        ConfigError,
        lambda: twodice.attach(tiny_model("llama"), "dropout=0.1"),
        "'dropout' has no site in LlamaForCausalLM",
        "the kinds there are: embedding, token",
        "write one of these",
    )


def test_attaching_twice(handles: list[Handle]) -> None:
    model = tiny_model()
    handles.append(twodice.attach(model, "residual=0.1"))
    for again in (model, model.transformer):
        told(
            ContractError,
            lambda again=again: twodice.attach(again, "residual=0.1"),
            "may be attached once",
            "got one that is attached already",
            "call detach() of the handle that it has",
        )


def test_a_step_that_was_not_entered(handles: list[Handle]) -> None:
    model = tiny_model()
    handles.append(twodice.attach(model, "residual=0.1"))
    told(
        ContractError,
        lambda: loss_of(model, tokens()),
        "a forward in train mode must run inside a step",
        "got one of GPT2LMHeadModel outside",
        "write 'with handle.step(step, examples=...):' around forward and backward, or call model.eval()",
    )
    told(
        ContractError,
        lambda: twodice.nn.Dropout(0.1, key=1)(torch.ones(1, 2, 3)),
        "must be told the step",
        "got none",
        "write layer(x, twodice.nn.Step(step, examples=...)), or call eval()",
    )


@pytest.mark.parametrize(
    ("examples", "kind", "must", "got", "repair"),
    [
        ([0, 1], ShapeError, "one entry for each row of the forward (8)", "got (2,)", FORMULA.split("=")[1]),
        (lambda n: range(n - 1), ShapeError, "one entry for each row", "got (7,)", FORMULA.split("=")[1]),
        (lambda n: None, ConfigError, "must make 8 slots", "of 8 rows", "got None"),
        (
            [[0], [1, 2]],
            ConfigError,
            "must be integers",
            "in a tensor, an array or a list",
            "got [[0], [1, 2]]",
        ),
        (["a"], ConfigError, "must be integers", "in a tensor, an array or a list", "got ['a']"),
        ([0.5] * 8, ConfigError, "examples", "must be integers", "got torch.float32"),
    ],
)
def test_examples_that_do_not_fit(
    handles: list[Handle], examples: Any, kind: type[TwodiceError], must: str, got: str, repair: str
) -> None:
    model = tiny_model()
    handles.append(twodice.attach(model, "residual=0.1"))

    def wrong() -> None:
        with handles[0].step(0, examples=examples):
            loss_of(model, tokens())

    told(kind, wrong, must, got, repair)


def test_a_second_forward_that_would_have_the_same_masks(handles: list[Handle]) -> None:
    model = tiny_model()
    handles.append(twodice.attach(model, "residual=0.1"))

    def wrong() -> None:
        with handles[0].step(0):
            loss_of(model, tokens())
            loss_of(model, tokens())

    told(
        ContractError,
        wrong,
        "is for one forward only",
        "would get the same masks",
        f"enter it with {FORMULA}",
    )


@pytest.mark.parametrize(
    ("name", "compiled"), [("GPT-2", False), ("GPT-2", True), ("BERT", False), ("T5", False), ("BART", False)]
)
def test_words_to_drop_where_no_lookup_is_visited(handles: list[Handle], name: str, compiled: bool) -> None:
    """Each lookup of a model in turn is passed by: of T5 that of the encoder, then that of the decoder."""
    model, batch = ZOO[name](**({"n_layer": 1} if name == "GPT-2" else {}))
    handles.append(twodice.attach(model, "word=0.5, residual=0.1"))
    run = torch.compile(model, backend="eager") if compiled else model
    table = model.get_input_embeddings().weight.detach()
    embedded = {k: v for k, v in batch.items() if k != "input_ids"}
    wrong = [embedded | {"inputs_embeds": table[batch["input_ids"]]}]
    if name in ("T5", "BART"):
        wrong.append(batch | {"decoder_inputs_embeds": table[batch["labels"]]})
    with handles[0].step(0):
        run(**batch)
    for given in wrong:

        def step(given: dict[str, Any] = given) -> None:
            with handles[0].step(0):
                run(**given)

        must = "'word' drops in the lookup of the tokens"
        told(ContractError, step, must, "did not come to the one at", "give input_ids, or leave 'word' out")
    if name == "GPT-2":  # a lookup that rests (in eval mode, as the audit says) is not asked for
        model.transformer.wte.eval()
        with handles[0].step(0):
            run(**wrong[0])
    torch._dynamo.reset()


def test_a_second_model_at_one_seed_warns_and_says_what_to_write(handles: list[Handle]) -> None:
    handles.append(twodice.attach(tiny_model(), "residual=0.1", seed=31))
    with pytest.warns(UserWarning, match=r"attached with seed 31.*share=other.*else another seed") as caught:
        handles.append(twodice.attach(tiny_model("llama"), "residual=0.1", seed=31))
    assert caught[0].filename == __file__, "the warning points at the line that attaches"


def test_sharing_with_what_is_not_attached(handles: list[Handle]) -> None:
    gone = twodice.attach(tiny_model(), "residual=0.1", seed=32)
    gone.detach()
    for other in (gone, tiny_model(), "the other"):
        told(
            ConfigError,
            lambda other=other: twodice.attach(tiny_model(), "residual=0.1", seed=32, share=other),
            "share must be an attached model or its handle",
            f"this {type(other).__name__}",
            "is not attached",
        )


def test_draws_of_a_model_that_the_handle_was_not_made_for(handles: list[Handle]) -> None:
    model, other = tiny_model(), tiny_model("llama")
    handles.append(twodice.attach(model, "residual=0.1"))
    told(
        ConfigError,
        lambda: handles[0].monte_carlo(other, {"input_ids": tokens()}, 2),
        "must be the one that the handle was made for",
        "got another LlamaForCausalLM",
        "use the handle of its own attach",
    )
    held = nn.ModuleDict({"inside": model})
    held.forward = lambda input_ids: model(input_ids=input_ids)  # type: ignore[method-assign, assignment]
    assert handles[0].monte_carlo(held, {"input_ids": tokens()}, 2).draws == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: twodice.nn.Dropout(0.1, key=0, layout="cbt"), "did you mean 'btc'"),
        (lambda: twodice.nn.Step("three"), "step must be an integer.*got 'three'"),
    ],
)
def test_a_module_refuses_at_birth_what_it_could_not_do_later(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()
