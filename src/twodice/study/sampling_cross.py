"""The second die with one trained model: it continues held-out prompts in every setting, and is measured.

Prompts are from validation text B, on which no step was chosen: beginnings of documents, and, where too few
are long enough, places spread over the text, which may lie anywhere in a document. Knows models, not arms.

Randomness
----------
The seed of a continuation is ``Key(draw).child("prompt", i)``: every model and every drawn setting throws the
same dice for the same prompt, so that cells of the cross are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from twodice.errors import DataError, Interrupted
from twodice.generation import measures
from twodice.random.keys import Key
from twodice.study.schema import Setting


def settings_of(top_ks: Sequence[int | None], temperatures: Sequence[float]) -> list[Setting]:
    """Greedy, and the grid of temperature and k."""
    found = [Setting(name="greedy", greedy=True, temperature=0.0, top_k=1)]
    for temperature in temperatures:
        for k in top_ks:
            name = f"top-k {k}" if k is not None else "all tokens"
            if temperature != 1:
                name = f"temperature {temperature:g}, {name}"
            found.append(Setting(name=name, greedy=False, temperature=temperature, top_k=k))
    return found


def training_copies(store: Any) -> measures.CopyIndex:
    """The training text, indexed so that copied runs are found."""
    return measures.CopyIndex(store.texts("train"))


def prompts_of(store: Any, plan: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(prompt, how it really goes on) as token ids, from validation B.

    One stretch of prompt + continuation each: from the beginning of every document that is long enough, then,
    where these are too few, from places spread evenly over the part.
    """
    split = store.splits["validation_b"]
    size = plan["prompt_tokens"] + plan["tokens"]
    tokens = np.asarray(split.tokens, dtype=np.int64)
    if len(tokens) < size:
        raise DataError(
            f"a prompt and what follows take {size} tokens; validation text B holds {len(tokens)}: give more"
        )
    ends = np.flatnonzero(tokens == split.end_of_document)
    begins = np.concatenate([[0], ends + 1])
    stops = np.concatenate([ends, [len(tokens)]])
    starts = [int(a) for a, b in zip(begins, stops, strict=True) if b - a >= size]
    if len(starts) > plan["prompts"]:
        starts = [starts[i * len(starts) // plan["prompts"]] for i in range(plan["prompts"])]
    while len(starts) < plan["prompts"]:
        spread = plan["prompts"] - len(starts)
        room = len(tokens) - size
        starts += [room * (i + 1) // (spread + 1) for i in range(spread)]
    cut = plan["prompt_tokens"]
    return [(tokens[s : s + cut].tolist(), tokens[s + cut : s + size].tolist()) for s in starts]


def _text(store: Any, ids: Sequence[int]) -> str:
    decoded: str = store.tokenizer.decode([i for i in ids if i != store.end_of_document])
    return decoded


def _measure(
    tokens: Sequence[Sequence[int]], texts: Sequence[str], copies: measures.CopyIndex
) -> tuple[dict[str, float], list[tuple[int, int]], list[float]]:
    """The measures of the texts of one draw, and of each text its longest copied run and its repetition."""
    runs = [copies.find(text) for text in texts]
    repetition = [measures.rep_4(list(ids)) for ids in tokens]
    return (
        {
            "rep_4": float(np.mean(repetition)),
            "looping_tails": float(np.mean([measures.looping_tail(list(ids)) for ids in tokens])),
            "distinct_2": measures.distinct_n([list(ids) for ids in tokens], 2),
            "self_bleu": measures.self_bleu([list(ids) for ids in tokens]),
            "longest_copied_characters": float(np.mean([length for length, _ in runs])),
        },
        runs,
        repetition,
    )


def cross_of_model(
    folder: str, store: Any, copies: measures.CopyIndex, plan: dict[str, Any], stop: Callable[[], bool]
) -> dict[str, Any]:
    """Generate with the model in `folder` in every setting and measure.

    Returns
    -------
    dict
        ``settings``: for each, ``{setting, draws: [measures], longest_copied_most}``; ``examples``: the
        continuations of the first `plan["shown"]` prompts.
    """
    from twodice.generation.engine import Engine
    from twodice.generation.requests import Request
    from twodice.sampling.params import SamplingParams

    engine = Engine.load(folder)
    prompts = prompts_of(store, plan)
    cells: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    for setting in settings_of(plan["top_k"], plan["temperature"]):
        draws: list[dict[str, float]] = []
        most = 0
        for draw in range(1 if setting.greedy else plan["draws"]):
            if stop():
                raise Interrupted("while the models generated; the same command goes on from there")
            requests = []
            for i, (prompt, _) in enumerate(prompts):
                seed = Key(draw).child("prompt", i).value
                params = (
                    SamplingParams(temperature=0.0, seed=seed)
                    if setting.greedy
                    else SamplingParams(temperature=setting.temperature, top_k=setting.top_k, seed=seed)
                )
                requests.append(
                    Request(prompt=prompt, params=params, max_tokens=plan["tokens"], ignore_end=True)
                )
            done = engine.generate(requests)
            texts = [_text(store, completion.tokens) for completion in done]
            found, runs, repetition = _measure([c.tokens for c in done], texts, copies)
            found["own_nats_per_token"] = measures.own_loss([p for c in done for p in c.logprobs])
            draws.append(found)
            most = max(most, *(length for length, _ in runs))
            if draw == 0:
                examples += [
                    {
                        "setting": setting.name,
                        "prompt": _text(store, prompts[i][0]),
                        "draw": None if setting.greedy else done[i].seed,
                        "text": texts[i],
                        "rep_4": repetition[i],
                        "longest_copied_characters": runs[i][0],
                        "copied_from": runs[i][1],
                    }
                    for i in range(min(plan["shown"], len(prompts)))
                ]
        cells.append({"setting": setting.model_dump(), "draws": draws, "longest_copied_most": most})
    return {"settings": cells, "examples": examples, "texts": len(prompts)}


def measure_human(store: Any, copies: measures.CopyIndex, plan: dict[str, Any]) -> dict[str, Any]:
    """The same measures on how the held-out text really goes on after each prompt."""
    prompts = prompts_of(store, plan)
    texts = [_text(store, ids) for _, ids in prompts]
    found, runs, repetition = _measure([ids for _, ids in prompts], texts, copies)
    examples = [
        {
            "setting": "human",
            "prompt": _text(store, prompts[i][0]),
            "draw": None,
            "text": texts[i],
            "rep_4": repetition[i],
            "longest_copied_characters": runs[i][0],
            "copied_from": runs[i][1],
        }
        for i in range(min(plan["shown"], len(prompts)))
    ]
    return {"measures": {**found, "texts": len(prompts)}, "examples": examples}
