"""The records of an imagined study of three arms and three seeds, as a real one writes them; no training."""

from __future__ import annotations

from typing import Any

from twodice.study.sampling_cross import settings_of
from twodice.study.spec import StudySpec, make_spec

PLAN = {"prompts": 2, "prompt_tokens": 4, "tokens": 8, "draws": 2, "top_k": [5, None], "temperature": [1.0]}


def example_spec(**changes: Any) -> StudySpec:
    asked: dict[str, Any] = {
        "settings": {"steps": 20},
        "arms": [("neither", ""), ("dropout", "residual=0.1"), ("weight decay", "weight_decay=1")],
        "seeds": 3,
        "sampling": PLAN,
    }
    return make_spec(**{**asked, **changes})


def example_records() -> list[dict[str, Any]]:
    """In the order in which they would be written."""
    spec = example_spec()
    records: list[dict[str, Any]] = [
        {
            "kind": "study",
            "twodice": "0.1.0",
            "spec": spec.model_dump(mode="json"),
            "lr": 1e-3,
            "sampling": PLAN,
            "settled": {
                "steps": 20,
                "workers": 2,
                "threads": 1,
                "evaluate_every": 10,
                "checkpoint_every": 20,
                "reason": "as asked",
            },
            "data": {
                "sources": ["python-docs"],
                "share": 1.0,
                "documents": 9,
                "train_tokens": 900,
                "train_bytes": 2000,
                "validation_a_tokens": 90,
                "validation_b_tokens": 90,
                "validation_b_bytes": 200,
                "vocabulary": 300,
                "tokenizer": "bpe",
                "crosses_documents": True,
                "digest": "00",
                "entropy_nats_per_token": None,
            },
            "model": {"name": "gpt2-nano", "parameters": 10, "context": 16, "batch": 4},
            "machine": {"torch": "2"},
            "commands": {"study": "twodice study"},
        }
    ]
    # At best dropout makes no difference; at the end, where the others overfit, it helps. Weight decay hurts.
    levels = {"neither": (3.0, 3.4), "dropout": (3.0, 3.1), "weight decay": (3.2, 3.5)}
    for seed in spec.seed_list:
        for number, (name, (best, end)) in enumerate(levels.items()):
            wobble = 0.05 * seed + 0.004 * ((seed + 1) * (number + 2) % 3)
            evaluations = [
                {
                    "kind": "evaluation",
                    "step": step,
                    "train_nats_per_token": loss - 0.05 * step,
                    "validation_a_nats_per_token": loss + 0.01,
                    "validation_b_nats_per_token": loss,
                    "train_bits_per_byte": 1.0,
                    "validation_a_bits_per_byte": loss / 2,
                    "validation_b_bits_per_byte": loss / 2,
                }
                for step, loss in ((0, 6 + wobble), (10, best + wobble), (20, end + wobble))
            ]
            records.append(
                {
                    "kind": "trial",
                    "arm": name,
                    "seed": seed,
                    "steps": 20,
                    "best_step": 10,
                    "evaluations": evaluations,
                }
            )
    xz = {"name": "xz", "value": 2.5, "unit": "bits per byte", "words": "xz needs 2.50 bits per byte"}
    records.append({"kind": "sanity", "items": [xz]})
    measures = {
        "rep_4": 0.1,
        "looping_tails": 0.2,
        "distinct_2": 0.7,
        "self_bleu": 0.3,
        "longest_copied_characters": 12.0,
    }
    records.append({"kind": "human", "measures": {**measures, "texts": 2}, "examples": []})
    for seed in spec.seed_list:
        for name in ("neither", "dropout"):
            for setting in settings_of((5, None), (1.0,)):
                drawn = {**measures, "rep_4": 0.1 + 0.01 * seed, "own_nats_per_token": 2.0 - setting.greedy}
                records.append(
                    {
                        "kind": "sampling",
                        "arm": name,
                        "seed": seed,
                        "texts": 2,
                        "setting": setting.model_dump(),
                        "draws": [drawn] * (1 if setting.greedy else 2),
                        "longest_copied_most": 20 + seed,
                    }
                )
                if seed == 0:
                    records.append(
                        {
                            "kind": "example",
                            "arm": name,
                            "seed": 0,
                            "number": 0,
                            "setting": setting.name,
                            "prompt": "A",
                            "draw": None,
                            "text": "<b>",
                            "rep_4": 0.0,
                            "longest_copied_characters": 1,
                            "copied_from": 0,
                        }
                    )
    return records


def measured_inside(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records as they are where each trial was measured inside: dropout makes heads alike by 0.2, and
    nothing else."""
    from twodice.study.mechanisms.measures import FIELDS

    found = []
    for record in records:
        if record["kind"] == "trial":
            seed, number = record["seed"], len(record["arm"]) // 3  # 2, 2, 4
            drops = record["arm"] == "dropout"
            wobble = 0.01 * seed + 0.001 * ((seed + 1) * (number + 3 * drops) % 4)
            values: dict[str, float | None] = {name: 0.3 + 0.02 * i + wobble for i, name in enumerate(FIELDS)}
            values["head_similarity"] = 0.5 + 0.2 * drops + wobble / 10
            values["own_ensemble_gain"] = -0.004 if drops else None
            values["unit_removed"] = 0.00021 + wobble / 1000
            record = {**record, "mechanisms": values}
        found.append(record)
    return found
