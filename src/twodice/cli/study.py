"""`twodice study`: what is asked, from flags, a file or a preset; the plan; the progress; the answer.

Knows how things are said, not how they are done: that is `twodice.study`.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twodice.cli.console import setting_help
from twodice.study.arms import default_arms
from twodice.study.presets import STUDIES

if TYPE_CHECKING:
    from twodice.study.schema import Report
    from twodice.study.spec import StudySpec


def study(
    data: Annotated[
        list[str] | None, typer.Argument(metavar="DATA", help=setting_help("data"), show_default=False)
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TEXT",
            help="An arm: 'light=residual=0.1; weight_decay=0.5' holds entries of the dropout plan and "
            "training settings. The one named neither or baseline, else the first, is the baseline. "
            f"Default: {', '.join(name for name, _ in default_arms(demo=False))}.",
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Trials of each arm, paired by seed. Default 5.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Time for the whole study; the steps follow from it. Default 5.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help=setting_help("model")),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The study's folder; a study that is there is gone on with.")
    ] = Path("runs/study"),
    spec: Annotated[Path | None, typer.Option(help="What to study, from a TOML or JSON file.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"A study by name: {', '.join(STUDIES)}.")] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=A,B,C", help="Choose this setting for each arm, on validation text A."),
    ] = None,
    field: Annotated[str | None, typer.Option(help=setting_help("field"))] = None,
    share: Annotated[float | None, typer.Option(help=setting_help("share"))] = None,
    seed: Annotated[int | None, typer.Option(help="First of the seeds. Default 0.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A training setting of all arms, such as batch=32."),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Say trials, time and the smallest detectable difference, and stop."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan or report.json at the end.")] = False,
) -> None:
    """Measure on a text whether dropout helps, and what top-k does to what is generated.

    The same command with the same --out goes on where the study was. Ctrl-C saves and stops; a second one
    stops at once.
    """
    from twodice.errors import ConfigError
    from twodice.study.presets import study_preset
    from twodice.study.spec import make_spec, read_spec_file

    if spec is not None and preset is not None:
        raise ConfigError("give --spec or --preset, not both")
    asked: dict[str, Any] = {"settings": {}, "arms": [], "tune": []}
    if preset is not None:
        asked.update(study_preset(preset))
    if spec is not None:
        asked.update(read_spec_file(spec))
    flags = {
        "data": list(data) if data else None,
        "model": model,
        "minutes": minutes,
        "field": field,
        "share": share,
        "seed": seed,
    }
    asked["settings"] = {**asked["settings"], **{k: v for k, v in flags.items() if v is not None}}
    if minutes is not None:
        # A time that is typed takes the place of a file's or a preset's steps.
        asked["settings"].pop("steps", None)
    if arm:
        asked["arms"] = [_arm(text) for text in arm]
    if tune:
        asked["tune"] = tune
    if seeds is not None:
        asked["seeds"] = seeds
    wanted = make_spec(changes=set_ if set_ is not None else [], **asked)
    if plan:
        _say_plan(wanted, out, json)
    else:
        _run(wanted, out, json)


def _arm(text: str) -> tuple[str, str]:
    name, equals, settings = text.partition("=")
    if not equals:
        from twodice.errors import ConfigError

        raise ConfigError(f"--arm takes NAME=TEXT, such as light='residual=0.1'; got {text!r}")
    return name, settings


def _say_plan(spec: StudySpec, out: Path, json: bool) -> None:
    from twodice.cli.console import duration, print_json
    from twodice.cli.console import out as result_console
    from twodice.study import compare
    from twodice.study.answer import plan_words
    from twodice.study.summary import earlier_sd_percent

    arms, tunings = spec.parsed_arms(), len(spec.tunings())
    smallest = compare.smallest_detectable(spec.seeds, len(arms) - 1)
    earlier = earlier_sd_percent(out)
    trials = len(arms) * (spec.seeds + tunings)
    facts = {
        "arms": [arm.name for arm in arms],
        "baseline": spec.baseline,
        "seeds": spec.seed_list,
        "trials": trials,
        "tuning_trials": len(arms) * tunings,
        "minutes": spec.minutes,
        "steps": spec.base.steps,
        "smallest_difference_in_sd": smallest,
        "earlier_sd_percent": earlier,
    }
    if json:
        print_json(facts)
        return
    console = result_console()

    def line(name: str, text: str) -> None:
        console.print(f"{name:<8} {text}", markup=False)

    for arm in arms:
        what = "baseline" if arm.name == spec.baseline else "arm"
        line(what, f"{arm.name}: {arm.text if arm.text else 'as the settings of all arms say'}")
    tuning = f" + {len(arms) * tunings} to tune" if tunings else ""
    line("trials", f"{len(arms)} arms x {spec.seeds} seeds{tuning} = {trials}")
    if spec.minutes is not None:
        line("time", f"{duration(spec.minutes * 60)} in all, as asked; the steps follow from a few real ones")
    else:
        line("time", f"{spec.base.steps} steps each, as asked; the time left is shown once trials run")
    line("detects", plan_words(spec.seeds, len(arms) - 1, smallest, earlier))
    if earlier is None and smallest is not None:
        line(
            "",
            f"if the paired difference varies by 1 % of the loss between seeds (an assumption): "
            f"{smallest:.1f} %",
        )


def _run(spec: StudySpec, out: Path, json: bool) -> None:
    import sys

    from twodice.cli.console import Progress, as_folder, duration, notice
    from twodice.study.report import write_report_html
    from twodice.study.run import run_study
    from twodice.training.stopping import StopOnSignal

    as_folder(out)
    began = time.monotonic()
    command = shlex.join(["twodice", *sys.argv[1:]])
    with StopOnSignal(notice) as stop:
        report = run_study(
            spec,
            out,
            command=command,
            stop=stop,
            say=notice,
            bar=lambda title, total, done: Progress(title, total, done=done),
        )
        write_report_html(out)
    notice(f"took {duration(time.monotonic() - began)}")
    _say_answer(report, out, json)


def _say_answer(report: Report, out: Path, json: bool) -> None:
    from twodice.cli.console import out as result_console
    from twodice.cli.console import print_json

    if json:
        print_json(report.model_dump(mode="json"))
        return
    console = result_console()
    width = max(len(arm.name) for arm in report.arms)
    console.print(report.answer, markup=False)
    for arm in report.arms:
        at_best, at_end = (when.validation_nats_per_token.mean for when in (arm.at_best, arm.at_end))
        console.print(
            f"  {arm.name:<{width}}  best {at_best:.4f}  end {at_end:.4f} nats per token  {arm.words}",
            markup=False,
        )
    for text in report.details:
        console.print(text, markup=False)
    console.print(f"report: {out / 'report.html'}", markup=False)
    console.print(f"model:  {out / 'best'} (arm '{report.best}', seed {report.best_seed})", markup=False)
