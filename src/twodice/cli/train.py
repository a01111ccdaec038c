"""`twodice train`: settings from flags, a file and ``--set``; the plan; the progress; the result.

Knows how things are said, not how they are done: that is `twodice.training`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twodice.cli.console import setting_help
from twodice.training.config import setting_names

if TYPE_CHECKING:
    from twodice.training.budget import Resolved
    from twodice.training.config import TrainConfig

_FIELDS = setting_names()


def train(
    data: Annotated[
        list[str] | None, typer.Argument(metavar="DATA", help=setting_help("data"), show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="The run's folder; a run in it is gone on with.")] = Path(
        "runs/train"
    ),
    model: Annotated[str | None, typer.Option(help=setting_help("model"))] = None,
    dropout: Annotated[str | None, typer.Option(help=setting_help("dropout"))] = None,
    steps: Annotated[int | None, typer.Option(help=setting_help("steps"))] = None,
    epochs: Annotated[float | None, typer.Option(help=setting_help("epochs"))] = None,
    minutes: Annotated[float | None, typer.Option(help=setting_help("minutes"))] = None,
    batch: Annotated[int | None, typer.Option(help=setting_help("batch"))] = None,
    accumulate: Annotated[int | None, typer.Option(help=setting_help("accumulate"))] = None,
    context: Annotated[int | None, typer.Option(help=setting_help("context"))] = None,
    tokenizer: Annotated[str | None, typer.Option(help=setting_help("tokenizer"))] = None,
    vocabulary: Annotated[int | None, typer.Option(help=setting_help("vocabulary"))] = None,
    field: Annotated[str | None, typer.Option(help=setting_help("field"))] = None,
    share: Annotated[float | None, typer.Option(help=setting_help("share"))] = None,
    seed: Annotated[int | None, typer.Option(help=setting_help("seed"))] = None,
    device: Annotated[str | None, typer.Option(help=setting_help("device"))] = None,
    dtype: Annotated[str | None, typer.Option(help=setting_help("dtype"))] = None,
    threads: Annotated[int | None, typer.Option(help=setting_help("threads"))] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings in TOML or JSON, or a run's config.json.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any setting, such as checkpoint.every=50."),
    ] = None,
    final: Annotated[
        bool, typer.Option("--final", help="Put the last step into model/, not the best one.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say tokens, steps, memory and time, and stop.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document at the end.")] = False,
) -> None:
    """Train or fine-tune one model on a text, with a plan of dropout.

    The same command with the same --out goes on where the run was. Ctrl-C saves and stops; a second one stops
    at once.
    """
    from twodice.errors import ConfigError
    from twodice.training.config import full_name, make_config, read_settings, with_setting

    values = read_settings(config) if config is not None else {}
    flags: dict[str, Any] = {
        "data": tuple(data) if data else None,
        "model": model, "dropout": dropout, "steps": steps, "epochs": epochs, "minutes": minutes,
        "batch": batch, "accumulate": accumulate, "context": context, "tokenizer": tokenizer,
        "vocabulary": vocabulary, "field": field, "share": share, "seed": seed, "device": device,
        "dtype": dtype, "threads": threads,
    }  # fmt: skip
    given = {name: value for name, value in flags.items() if value is not None}
    if {"steps", "epochs", "minutes"} & given.keys():
        # A length that is typed takes the place of the file's.
        values = {k: v for k, v in values.items() if k not in ("steps", "epochs", "minutes")}
    settings = make_config({**values, **given})
    names = {*given, *values}
    for text in set_ if set_ is not None else []:
        name, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(f"--set takes NAME=VALUE; got {text!r}")
        settings = with_setting(settings, name.strip(), value)
        names.add(full_name(name.strip()))
    if plan:
        _say_plan(settings, names, json)
    else:
        _run(settings, names, out, final, json)


def _run(settings: TrainConfig, names: set[str], out: Path, final: bool, json: bool) -> None:
    from twodice.cli.console import Progress, as_folder, notice
    from twodice.cli.console import out as result_console
    from twodice.training.loop import train as train_run
    from twodice.training.run_folder import is_used
    from twodice.training.step import choose_device
    from twodice.training.stopping import StopOnSignal
    from twodice.training.tokens import store_for

    as_folder(out)
    choose_device(settings.device)  # one that is not here is said before the text is read
    with StopOnSignal(notice) as stop:
        store = store_for(settings, out / "tokens", begun=is_used(out), say=notice)
        bar: Progress | None = None

        def on_event(event: Mapping[str, Any]) -> None:
            nonlocal bar
            kind = event["kind"]
            if kind == "resolved":
                _say_settings(event["config"], event["reasons"], names)
            elif kind in ("notice", "warning"):
                (bar.say if bar is not None else notice)(f"{kind}: {event['text']}")
            elif kind == "resumed":
                notice(f"going on from step {event['step']} of {event['steps']}")
            elif kind == "train":
                if bar is None:
                    bar = Progress("training", event["steps"], done=event["step"] - 1)
                    bar.__enter__()
                rate = f"{event['tokens_per_s']:,.0f} tokens/s"
                bar.update(event["step"], f"loss {event['loss_nats_per_token']:.3f}  {rate}")
            elif kind == "evaluation":
                text = (
                    f"step {event['step']}: train {event['train_nats_per_token']:.4f}, "
                    f"validation {event['validation_a_nats_per_token']:.4f} nats a token, "
                    f"{event['validation_a_bits_per_byte']:.4f} bits a byte"
                    + (" (best)" if event["best_step"] == event["step"] else "")
                )
                (bar.say if bar is not None else notice)(text)

        try:
            result = train_run(settings, store, out, on_event=on_event, stop=stop, final=final)
        finally:
            if bar is not None:
                bar.__exit__(None, None, None)
    best = next(e for e in result.evaluations if e["step"] == result.best_step)
    if json:
        from twodice.cli.console import print_json

        print_json(
            {
                "out": str(out),
                "model": str(result.model),
                "steps": result.steps,
                "best_step": result.best_step,
                "best": best,
                "last": result.evaluations[-1],
            }
        )
        return
    console = result_console()
    console.print(
        f"best at step {result.best_step} of {result.steps}: "
        f"validation {best['validation_a_nats_per_token']:.4f} nats a token "
        f"({best['validation_a_bits_per_byte']:.4f} bits a byte), train {best['train_nats_per_token']:.4f}",
        markup=False,
    )
    held = "the last step" if final else "the best step"
    console.print(f"model: {result.model} ({held}; loads in transformers, logits checked)", markup=False)


def _value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " ".join(map(str, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _say_settings(config: TrainConfig, reasons: Mapping[str, str], names: set[str]) -> None:
    """Every setting with where it is from: given, derived with its reason, or a default with its meaning."""
    from twodice.cli.console import notice
    from twodice.training.run_folder import flat

    for name, value in flat(config.model_dump()).items():
        if name in reasons:
            why = reasons[name]
        elif name in names or name.partition(".")[0] in names:
            why = "given"
        elif value is None:
            continue
        else:
            why = f"default: {_FIELDS[name].description}"
        notice(f"  {name:<22} {_value(value):<14} {why}")


def _say_plan(settings: TrainConfig, names: set[str], json: bool) -> None:
    import tempfile

    from twodice.cli.console import notice
    from twodice.training.tokens import store_for

    with tempfile.TemporaryDirectory(prefix="twodice-plan-") as folder:
        store = store_for(settings, Path(folder) / "tokens", say=notice)
        _print_plan(settings, store, names, json)


def _print_plan(settings: TrainConfig, store: Any, names: set[str], json: bool) -> None:
    from twodice.cli.console import duration, out, print_json
    from twodice.training.measure import make_plan

    resolved: Resolved
    resolved, facts = make_plan(settings, store)
    if json:
        print_json({**facts, "config": resolved.config.model_dump(mode="json"), "reasons": resolved.reasons})
        return
    _say_settings(resolved.config, resolved.reasons, names)
    lines = {
        "text": f"{facts['tokens_train']:,} to train on, {facts['tokens_validation_a']:,} and "
        f"{facts['tokens_validation_b']:,} tokens to validate on, vocabulary {facts['vocabulary']:,}",
        "steps": f"{facts['steps']:,} of {facts['tokens_per_step']:,} tokens: "
        f"{facts['tokens_seen']:,} in all, {facts['epochs']:.1f} epochs",
        "parameters": f"{facts['parameters']:,}",
        "memory": f"{facts['state_bytes'] / 2**20:,.0f} MiB for weights, gradients, moments and the best "
        f"weights; the measured steps took the process to {facts['peak_bytes'] / 2**20:,.0f} MiB",
        "time": f"about {duration(facts['seconds'])} ({facts['step_ms']:.0f} ms a step, measured here)",
    }
    console = out()
    for name, text in lines.items():
        console.print(f"{name:<11} {text}", markup=False)
