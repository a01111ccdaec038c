"""`twodice.processor` in transformers' ``generate``: the engine's tokens, whatever else ``generate`` is told.

Two ways to the same logits (one batch with padding and one prompt alone) differ by float32 rounding, so a
token could differ where two scores are within about 1e-6 of each other: seeds are fixed, and none is.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from tests.support.tiny_models import tiny_model

import twodice
from twodice.errors import ConfigError, ContractError, RequestError, ShapeError
from twodice.generation.requests import Request
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample

PROMPTS = ((72, 101, 108), (65,), (9, 9, 9, 9, 8, 200))
PAD, STEPS, END = 0, 12, 256
EVERY = SamplingParams(
    temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.3,
    frequency_penalty=0.2, no_repeat_ngram_size=3, dry_multiplier=0.5, min_tokens=3, stop_tokens=[END],
    logit_bias={7: 1.5}, banned_tokens=[3], seed=5,
)  # fmt: skip


def padded(prompts: Any) -> dict[str, torch.Tensor]:
    """Prompts in one batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def texts(model: Any, prompts: Any, processor: Any, **options: Any) -> list[list[int]]:
    """What ``generate`` adds to each row, up to the end token and with it."""
    inputs = padded(prompts)
    settings = {"do_sample": True, "max_new_tokens": STEPS, "pad_token_id": PAD} | options
    found = model.generate(**inputs, logits_processor=[processor], **settings)
    rows = found[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


def wanted(engine: Any, prompts: Any, params: Any, n: int = 1) -> list[list[int]]:
    each = params if isinstance(params, list) else [params] * len(prompts)
    requests = [
        Request(prompt=p, params=q, n=n, max_tokens=STEPS) for p, q in zip(prompts, each, strict=True)
    ]
    return [list(one.tokens) for one in engine.generate(requests)]


def mask_of(prompts: Any) -> torch.Tensor:
    return padded(prompts)["attention_mask"]


@pytest.mark.parametrize("params", [EVERY, SamplingParams(seed=1), SamplingParams(mirostat_tau=3.0, seed=2)])
@pytest.mark.parametrize("do_sample", [True, False])
def test_generate_gives_the_tokens_of_the_engine_and_padding_changes_none(
    engine: Any, params: SamplingParams, do_sample: bool
) -> None:
    processor = twodice.processor(params, attention_mask=mask_of(PROMPTS))
    options: dict[str, Any] = {} if do_sample else {"do_sample": False}
    found = texts(engine.model, PROMPTS, processor, **options)
    assert found == wanted(engine, PROMPTS, params)
    by_pad = twodice.processor(params, pad_token_id=PAD)
    assert texts(engine.model, PROMPTS, by_pad, **options) == found
    alone = [texts(engine.model, [p], twodice.processor(params), **options)[0] for p in PROMPTS]
    assert alone == found
    untold = twodice.processor(params)
    assert texts(engine.model, PROMPTS, untold, **options) != found, (
        "padding taken for tokens would show here"
    )


def test_generate_gives_the_tokens_of_a_loop_over_sample(engine: Any) -> None:
    ids = list(PROMPTS[0])
    for step in range(STEPS):
        with torch.inference_mode():
            logits = engine.model(torch.tensor([ids])).logits[:, -1]
        history = (torch.tensor(ids), torch.tensor([0, len(ids)]), torch.tensor([len(PROMPTS[0])]))
        ids.append(int(sample(logits, EVERY, len(PROMPTS[0]) + step, history=history).tokens))
        if ids[-1] == END:
            break
    assert texts(engine.model, PROMPTS[:1], twodice.processor(EVERY)) == [ids[len(PROMPTS[0]) :]]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.1},
        {"temperature": 50.0, "top_k": 1},
        {"top_p": 0.01},
        {"min_p": 1.0},
        {"typical_p": 0.01},
        {"epsilon_cutoff": 0.9},
        {"eta_cutoff": 0.9},
        {"top_h": 0.01},
        {"renormalize_logits": True},
        {"use_cache": False},
    ],
    ids=str,
)
def test_nothing_that_generate_does_after_us_changes_a_token(engine: Any, options: dict[str, Any]) -> None:
    params = SamplingParams(seed=11)
    found = texts(
        engine.model, PROMPTS, twodice.processor(params, attention_mask=mask_of(PROMPTS)), **options
    )
    assert found == wanted(engine, PROMPTS, params)


def test_every_prompt_may_have_settings_of_its_own(engine: Any) -> None:
    params = [EVERY, SamplingParams(seed=9, top_p=0.5), SamplingParams(temperature=0, seed=0)]
    processor = twodice.processor(params, attention_mask=mask_of(PROMPTS))
    assert texts(engine.model, PROMPTS, processor) == wanted(engine, PROMPTS, params)
    assert processor.seeds == (5, 9, 0)


def test_n_rows_of_a_prompt_are_its_completions(engine: Any) -> None:
    params = [EVERY, SamplingParams(seed=9), SamplingParams(seed=9, top_k=5)]
    expected = wanted(engine, PROMPTS, params, n=3)
    assert len({tuple(text) for text in expected[3:6]}) == 3
    told = twodice.processor(params, n=3, attention_mask=mask_of(PROMPTS))
    found_out = twodice.processor(params, pad_token_id=PAD)
    for processor in (told, found_out):
        assert texts(engine.model, PROMPTS, processor, num_return_sequences=3) == expected
    one = twodice.processor(SamplingParams(seed=9), n=3)
    assert texts(engine.model, PROMPTS[1:2], one, num_return_sequences=3) == expected[3:6]


def test_a_finished_row_is_padded_and_the_others_go_on(engine: Any) -> None:
    params = [SamplingParams(seed=1, logit_bias={END: 1e9}), SamplingParams(seed=2, banned_tokens=[END])]
    inputs = padded(PROMPTS[:2])
    found = engine.model.generate(
        **inputs,
        logits_processor=[twodice.processor(params, attention_mask=inputs["attention_mask"])],
        do_sample=True,
        max_new_tokens=STEPS,
        pad_token_id=PAD,
    )[:, 3:].tolist()
    assert found[0] == [END] + [PAD] * (STEPS - 1)
    assert found[1] == wanted(engine, PROMPTS[:2], params)[1]


def test_one_processor_serves_one_generate_after_the_other(engine: Any) -> None:
    params = SamplingParams(mirostat_tau=4.0, presence_penalty=0.5, seed=3)
    processor = twodice.processor(params)
    first = texts(engine.model, PROMPTS[:1], processor)
    other = texts(engine.model, PROMPTS[2:], processor)
    assert texts(engine.model, PROMPTS[:1], processor) == first
    assert [first, other] == [wanted(engine, p, params) for p in (PROMPTS[:1], PROMPTS[2:])]


def test_made_up_seeds_are_new_for_each_text_and_give_it_again(engine: Any) -> None:
    processor = twodice.processor(SamplingParams())
    first, seeds = texts(engine.model, PROMPTS[:1] * 2, processor), processor.seeds
    assert len(set(seeds)) == 2 and first[0] != first[1]
    assert texts(engine.model, PROMPTS[:1] * 2, processor) != first
    again = twodice.processor([SamplingParams(seed=s) for s in seeds])
    assert texts(engine.model, PROMPTS[:1] * 2, again) == first


def test_two_rows_that_would_be_one_text_are_refused_unless_meant(engine: Any) -> None:
    params = SamplingParams(seed=4)
    with pytest.raises(
        RequestError, match=r"rows 0 and 1 have one prompt and one seed.*num_return_sequences"
    ):
        texts(engine.model, PROMPTS[:1], twodice.processor(params), num_return_sequences=2)
    found = texts(engine.model, PROMPTS[:1], twodice.processor(params, n=1), num_return_sequences=2)
    assert found[0] == found[1]


def test_a_wrong_batch_is_refused(engine: Any) -> None:
    seeded = SamplingParams(seed=4)
    with pytest.raises(ShapeError, match="3 of them for 2 rows"):
        texts(engine.model, PROMPTS[:2], twodice.processor([seeded] * 3, pad_token_id=PAD))
    for given, told in (({}, ""), ({"attention_mask": mask_of(PROMPTS[:2])}, " and 2 prompts")):
        with pytest.raises(
            ShapeError,
            match=f"n must be num_return_sequences, .*; got n=3{told} for 2 rows: give generate "
            "num_return_sequences=3, or another n here",
        ):
            texts(engine.model, PROMPTS[:2], twodice.processor(seeded, n=3, **given))
    with pytest.raises(ShapeError, match="must have one prompt"):
        texts(engine.model, PROMPTS[:2], twodice.processor(seeded, n=2))
    with pytest.raises(ShapeError, match=r"attention_mask must be that of the prompts, \(prompts, 6\)"):
        texts(engine.model, PROMPTS, twodice.processor(seeded, attention_mask=torch.ones(3, 5)))
    with_mask = twodice.processor(seeded, attention_mask=torch.ones(1, 3))
    assert texts(engine.model, PROMPTS[:1], with_mask) == texts(engine.model, PROMPTS[:1], with_mask)
    with pytest.raises(ContractError, match="serves the prompts of that mask only"):
        texts(engine.model, [(1, 2, 3)], with_mask)


def test_a_row_that_cannot_be_served_raises_or_is_flagged_with_the_pad_token() -> None:
    scores = torch.zeros(2, 5)
    scores[1, 3] = torch.nan
    ids = torch.tensor([[1, 2], [2, 2]])
    with pytest.raises(RequestError, match="row 1 has NaN"):
        twodice.processor(SamplingParams(seed=1))(ids, scores)
    flagged = twodice.processor(SamplingParams(seed=1), pad_token_id=4, on_bad_row="flag")
    out = flagged(ids, scores)
    assert out[1].tolist() == [-torch.inf] * 4 + [0]
    assert flagged.status is not None and flagged.status.tolist() == [0, 1]
    token = int(out[0].argmax())
    flagged(torch.cat([ids, torch.tensor([[token], [4]])], 1), torch.zeros(2, 5))
    assert flagged.status.tolist() == [0, 1], "a row that was bad once stays marked"


@pytest.mark.parametrize("more", [{}, {"on_bad_row": "flag"}, {"attention_mask": torch.ones(2, 2)}], ids=str)
def test_a_pad_token_that_no_prompt_can_have_is_refused_with_the_vocabulary(more: dict[str, Any]) -> None:
    ids, scores = torch.tensor([[1, 2], [2, 2]]), torch.zeros(2, 5)
    twodice.processor(SamplingParams(seed=1), pad_token_id=4, **more)(ids, scores)
    with pytest.raises(
        RequestError, match=r"pad_token_id must be in \[0, 5\), the vocabulary .*; got 5, which"
    ):
        twodice.processor(SamplingParams(seed=1), pad_token_id=5, **more)(ids, scores)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"params": []}, ConfigError, "one SamplingParams for each prompt"),
        ({"params": [{"top_k": 3}]}, ConfigError, "must be one SamplingParams or one a prompt"),
        ({"params": {"top_k": 3}}, ConfigError, r"got \{'top_k': 3\}: SamplingParams.parse reads a mapping"),
        ({"params": None}, ConfigError, "one a prompt; got None"),
        ({"attention_mask": "left"}, ShapeError, "attention_mask must be a tensor"),
        ({"n": 0}, ConfigError, "n must be an integer of at least 1; got 0"),
        ({"pad_token_id": -1}, ConfigError, "pad_token_id must be an integer"),
        ({"on_bad_row": "greedy"}, ConfigError, "on_bad_row must be"),
        ({"on_bad_row": "flag"}, ConfigError, "gives bad rows pad_token_id; got none"),
        ({"attention_mask": torch.ones(3)}, ShapeError, r"must be \(prompts, tokens\)"),
        ({"attention_mask": torch.ones(0, 3)}, ShapeError, r"must be \(prompts, tokens\); got \(0, 3\)"),
        ({"attention_mask": [[-torch.inf, 0.0]]}, ShapeError, "1 at tokens and 0 at padding; got other"),
        ({"n": True}, ConfigError, "n must be an integer of at least 1; got True"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, ShapeError, "padding_side = 'left'"),
    ],
)
def test_arguments_that_cannot_be_meant_are_errors(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        twodice.processor(**({"params": SamplingParams()} | arguments))


def test_it_is_what_transformers_calls_a_logits_processor() -> None:
    from transformers import LogitsProcessor

    processor = twodice.processor(SamplingParams(seed=2))
    assert isinstance(processor, LogitsProcessor) and processor.supports_continuous_batching is False
    model = tiny_model("llama").eval()
    ids = torch.tensor([[5, 6, 7]])
    ours = model.generate(ids, logits_processor=[processor], do_sample=True, max_new_tokens=4, pad_token_id=0)
    theirs = model.generate(ids, do_sample=False, max_new_tokens=4, pad_token_id=0)
    assert ours.tolist() != theirs.tolist(), "a flat model's greedy text is not what a draw gives"


@pytest.mark.parametrize("params", [EVERY, SamplingParams(top_k=30)])
@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_assisted_generation_gives_the_plain_text(engine: Any, params: SamplingParams, how: str) -> None:
    prompt = (72, 101, 108, 72, 101, 108, 72, 101)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if how == "assistant":
        options = {"assistant_model": copy.deepcopy(engine.model)}
        for weights in options["assistant_model"].parameters():
            weights.data.mul_(1.05)  # a draft that is often right, not always
    processor = twodice.processor(params)
    found = texts(engine.model, [prompt], processor, **options)
    (seed,) = processor.seeds
    plain = twodice.processor(dataclasses.replace(params, seed=seed))
    assert found == texts(engine.model, [prompt], plain)


def test_mirostat_under_an_assistant_and_moved_rows_are_errors(engine: Any) -> None:
    prompt = (72, 101, 108, 72, 101, 108, 72, 101)
    with pytest.raises(ContractError, match="mirostat's state goes forward only"):
        steered = twodice.processor(SamplingParams(mirostat_tau=3.0, seed=2))
        texts(engine.model, [prompt], steered, prompt_lookup_num_tokens=3, max_new_tokens=40)
    with pytest.raises(ContractError, match="num_beams above 1"):
        texts(engine.model, [prompt], twodice.processor(SamplingParams(top_k=30)), num_beams=3)


def test_a_new_text_may_begin_with_the_last_one(engine: Any) -> None:
    processor = twodice.processor(SamplingParams(seed=3, presence_penalty=2.0))
    first = texts(engine.model, [PROMPTS[0]], processor)[0]
    longer = (*PROMPTS[0], *first, 65, 66)
    alone = texts(engine.model, [longer], twodice.processor(SamplingParams(seed=3, presence_penalty=2.0)))
    assert texts(engine.model, [longer], processor) == alone


def test_prompts_without_ids_are_an_error(engine: Any) -> None:
    embedded = engine.model.get_input_embeddings()(torch.tensor([PROMPTS[0]]))
    with pytest.raises(RequestError, match="give input_ids beside it"):
        engine.model.generate(
            inputs_embeds=embedded,
            logits_processor=[twodice.processor(SamplingParams(seed=1))],
            max_new_tokens=2,
            pad_token_id=PAD,
        )
