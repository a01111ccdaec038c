"""A full, plausible report, made without any training: for the tests and the eyes of those who draw it."""

from __future__ import annotations

import math

from twodice.study import compare, schema
from twodice.study.mechanisms.schema import Mechanisms
from twodice.study.mechanisms.table import mechanisms_of

SEEDS = [0, 1, 2, 3, 4]
STEPS = list(range(0, 401, 20))
NAMES = ["neither", "dropout", "weight decay", "both"]
SETTINGS: list[dict[str, object]] = [
    {},
    {"dropout": "embedding=0.1, attention=0.1, residual=0.1"},
    {"optimizer.weight_decay": 1.6},
    {"dropout": "embedding=0.1, attention=0.1, residual=0.1", "optimizer.weight_decay": 1.6},
]


def _wobble(arm: int, seed: int, step: int) -> float:
    return 0.02 * math.sin(1.7 * seed) + 0.012 * math.sin(12.9 * arm + 78.2 * seed + 0.37 * step)


def _losses(arm: int, seed: int, step: int) -> tuple[float, float]:
    speed, low = (1.0, 0.9, 0.95, 0.85)[arm], (3.42, 3.36, 3.428, 3.31)[arm]
    over, gap = (5.5e-6, 1.2e-6, 2.8e-6, 0.4e-6)[arm], (2.6e-3, 1.6e-3, 1.9e-3, 1.2e-3)[arm]
    validation = 2.8 * math.exp(-step * speed / 60) + low + over * max(0, step - 160) ** 2
    validation += _wobble(arm, seed, step)
    return validation - gap * step, validation


def _estimate(values: list[float]) -> schema.Estimate:
    return compare.estimate(values)


def _moment(arm: int, steps: list[int], baseline: list[float], p_scale: int) -> dict[str, object]:
    pairs = [_losses(arm, seed, step) for seed, step in zip(SEEDS, steps, strict=True)]
    return {
        "steps": steps,
        "train_nats_per_token": _estimate([t for t, _ in pairs]),
        "validation_nats_per_token": _estimate([v for _, v in pairs]),
        "validation_bits_per_byte": _estimate([v / math.log(2) / 3.1 for _, v in pairs]),
        "gap_nats_per_token": _estimate([v - t for t, v in pairs]),
    }


def _best_steps(arm: int) -> list[int]:
    return [min(STEPS, key=lambda step: _losses(arm, seed, step)[1]) for seed in SEEDS]


def example_report() -> schema.Report:
    """The report of an imagined study: four arms, five seeds."""
    ends = [STEPS[-1]] * len(SEEDS)
    moments: dict[str, list[dict[str, object]]] = {"at_best": [], "at_end": []}
    for arm in range(len(NAMES)):
        moments["at_best"].append(_moment(arm, _best_steps(arm), [], 1))
        moments["at_end"].append(_moment(arm, ends, [], 1))
    comparisons: dict[str, list[schema.Comparison]] = {}
    for key, parts in moments.items():
        values = [part["validation_nats_per_token"].values for part in parts]  # type: ignore[attr-defined]
        differences = compare.compare(values[0], values[1:])
        comparisons[key] = [
            schema.Comparison(
                **part,  # type: ignore[arg-type]
                difference=None if i == 0 else differences[i - 1],
                verdict="baseline" if i == 0 else compare.verdict(differences[i - 1]),
            )
            for i, part in enumerate(parts)
        ]
    arms = []
    for i, name in enumerate(NAMES):
        best, end = comparisons["at_best"][i], comparisons["at_end"][i]
        rows = [[_losses(i, seed, step) for seed in SEEDS] for step in STEPS]
        arms.append(
            schema.Arm(
                name=name,
                settings=dict(SETTINGS[i]),
                text="; ".join(
                    f"{k.rpartition('.')[2]}={v}" if k != "dropout" else str(v).replace(", ", "; ")
                    for k, v in SETTINGS[i].items()
                ),
                seeds=SEEDS,
                has_dropout="dropout" in SETTINGS[i],
                at_best=best,
                at_end=end,
                verdict=best.verdict,
                words=compare.words(best.difference),
                words_at_end=compare.words(end.difference),
                only_at_end=end.verdict == "helps" and best.verdict != "helps",
                overfits_percent=100
                * (end.validation_nats_per_token.mean / best.validation_nats_per_token.mean - 1),
                curve=schema.Curve(
                    steps=STEPS,
                    train_nats_per_token=[_estimate([t for t, _ in row]) for row in rows],
                    validation_nats_per_token=[_estimate([v for _, v in row]) for row in rows],
                ),
                tuned={},
            )
        )
    return schema.Report(
        twodice="0.1.0",
        answer="On this text dropout with heavy weight decay ('both') helps by 4.8 % [4.5, 5.1].",
        details=["Without either the model overfits: its loss ends 9 % above its best."],
        data=schema.Facts(
            sources=["python-docs"],
            share=0.2,
            documents=70,
            train_tokens=30_211,
            train_bytes=93_654,
            validation_a_tokens=3_400,
            validation_b_tokens=3_388,
            validation_b_bytes=10_502,
            vocabulary=512,
            tokenizer="bpe",
            crosses_documents=True,
            digest="0" * 64,
            entropy_nats_per_token=None,
        ),
        model=schema.Model(name="gpt2-nano", parameters=872_832, context=64, batch=16),
        baseline="neither",
        best="both",
        best_seed=2,
        best_step=_best_steps(3)[2],
        steps=STEPS[-1],
        seeds=SEEDS,
        is_complete=True,
        arms=arms,
        mechanisms=_mechanisms(),
        sampling=_sampling(),
        human=schema.HumanText(
            rep_4=0.02,
            looping_tails=0.0,
            distinct_2=0.81,
            self_bleu=0.12,
            longest_copied_characters=19.4,
            texts=16,
        ),
        cross=schema.Cross(
            without="neither",
            with_dropout="both",
            differs_in=["optimizer.weight_decay"],
            greedy="greedy",
            drawn="top-k 50",
            arms=["neither", "both"],
            reason="'both' helps most; it differs from 'neither' in optimizer.weight_decay too",
            prompts=16,
            prompt_tokens=16,
            tokens=48,
            sampling_seeds=[0, 1],
        ),
        examples=_examples(),
        sanity=[
            schema.Sanity(
                name="xz",
                value=2.41,
                unit="bits per byte",
                words="xz needs 2.41 bits per byte of validation text B when it has seen the training text",
            )
        ],
        plan=schema.Plan(
            pairs=5,
            smallest_difference_in_sd=compare.smallest_detectable(5, 3),
            words="5 pairs and 3 comparisons detect 2.3 standard deviations in 4 of 5 studies",
        ),
        how=schema.How(
            settings={"data": ["python-docs"], "steps": 400, "optimizer.lr": 0.003},
            notes=[
                "All trials of one seed share initial weights, batches and nested masks.",
                "The learning rate was not tuned for each arm.",
            ],
            commands={
                "study": "twodice study --preset demo --out runs/demo",
                "report": "twodice report runs/demo",
                "generate": "twodice generate runs/demo/best --prompt 'The import statement' --top-k 50",
                "load": "AutoModelForCausalLM.from_pretrained('runs/demo/best')",
            },
            machine={"processor": "an example", "torch": "2.10", "threads": "1"},
            case="The share of the text was taken so small that a model of this size reads it many times.",
        ),
    )


#: Of each measure about what a small model has, what dropout adds, and what seeds differ by.
INSIDE: dict[str, tuple[float, float, float]] = {
    "head_similarity": (0.74, -0.06, 0.01),
    "head_entropy": (2.31, 0.11, 0.02),
    "head_removed": (0.034, -0.004, 0.004),
    "head_removed_most": (0.21, -0.02, 0.05),
    "unit_removed": (0.00031, -0.00011, 0.00003),
    "unit_correlation": (0.121, -0.02, 0.002),
    "noise_loss": (3.41, -0.09, 0.02),
    "noise_rise": (0.62, -0.01, 0.02),
    "domain_loss": (7.9, 0.05, 0.2),
    "ensemble_gain": (0.021, -0.019, 0.001),
    "ensemble_distance": (0.012, -0.008, 0.0005),
}


def _mechanisms() -> Mechanisms | None:
    trials = {}
    for arm, name in enumerate(NAMES):
        for seed in SEEDS:
            drops = "dropout" in SETTINGS[arm]
            found: dict[str, float | None] = {
                field: base + drops * moved + spread * 50 * _wobble(arm, seed, i)
                for i, (field, (base, moved, spread)) in enumerate(INSIDE.items())
            }
            found["own_ensemble_gain"] = -0.003 + 0.02 * _wobble(arm, seed, 0) if drops else None
            trials[name, seed] = {"mechanisms": found}
    return mechanisms_of(trials, NAMES, SEEDS, "neither", ["python-docs"])


def grid() -> list[schema.Setting]:
    """Greedy, and two temperatures by three k."""
    drawn = [
        schema.Setting(
            name=", ".join(
                ([f"temperature {t:g}"] if t != 1 else [])
                + ([f"top-k {k}"] if k is not None else ["all tokens"])
            ),
            greedy=False,
            temperature=t,
            top_k=k,
        )
        for t in (0.7, 1.0)
        for k in (10, 50, None)
    ]
    return [schema.Setting(name="greedy", greedy=True, temperature=0.0, top_k=1), *drawn]


def _sampling() -> list[schema.Sampling]:
    cells = []
    for a, arm in enumerate(("neither", "both")):
        for s, setting in enumerate(grid()):
            heat = (
                0.0
                if setting.greedy
                else setting.temperature * math.log(setting.top_k if setting.top_k else 512)
            )

            def around(mean: float, spread: float, a: int = a, s: int = s) -> schema.Estimate:
                return _estimate([max(0.0, mean + spread * math.sin(5 * i + 3 * a + s)) for i in SEEDS])

            cells.append(
                schema.Sampling(
                    arm=arm,
                    setting=setting,
                    texts=80 if setting.greedy else 160,
                    measures=schema.Measures(
                        rep_4=around(0.55 * math.exp(-heat) + 0.01, 0.01),
                        looping_tails=around(0.6 * math.exp(-heat), 0.02),
                        distinct_2=around(0.3 + 0.09 * heat, 0.02),
                        self_bleu=around(0.6 * math.exp(-heat / 3), 0.02),
                        own_nats_per_token=around(0.6 + 0.5 * heat + 0.3 * a, 0.05),
                        longest_copied_characters=around(52 - 5 * heat - 12 * a, 2),
                        longest_copied_most=120 - 40 * a,
                    ),
                )
            )
    return cells


def _examples() -> list[schema.Example]:
    prompt = "The import statement"
    rows = [
        ("neither", "greedy", 0, None, " is used to the the name of the name of the name of the name"),
        ("neither", "top-k 50", 0, 1, " binds the module <name> object, which the class & scope"),
        ("both", "greedy", 0, None, " is a statement that is a statement that is a statement"),
        ("both", "top-k 50", 0, 1, " searches for names in the local namespace,\n   then binds"),
        ("human", "human", None, None, " combines two operations; it searches for the named module"),
    ]
    return [
        schema.Example(
            prompt=prompt,
            arm=arm,
            setting=setting,
            training_seed=seed,
            sampling_seed=draw,
            text=text,
            rep_4=0.3 if setting == "greedy" else 0.0,
            longest_copied_characters=17,
            copied_from=4,
        )
        for arm, setting, seed, draw, text in rows
    ]
