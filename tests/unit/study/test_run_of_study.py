"""A study from top to bottom with workers that only pretend: what is settled, kept, tuned and told."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.example_records import example_records

from twodice.cli.main import main
from twodice.errors import ConfigError, Interrupted
from twodice.study import run
from twodice.study.compare import smallest_detectable
from twodice.study.pool import Job
from twodice.study.report import render
from twodice.study.schema import Report
from twodice.study.spec import StudySpec, make_spec

STUDY = example_records()[0]


class Pretender:
    """Stands in for `Pool`: answers every job at once, by rules that a test sets."""

    def __init__(self, out: Path) -> None:
        self.out, self.jobs = out, list[Job]()
        self.step_s, self.most_trials = 0.01, 10**6
        self.loss: Callable[[dict[str, Any]], float] = lambda config: 3.0 + 0.01 * config["seed"]
        self.spec_before_trials: bytes | None = None

    def __call__(self, workers: int, **_: Any) -> Pretender:
        return self

    def __enter__(self) -> Pretender:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def resize(self, workers: int) -> None:
        pass

    def done(self, kind: str) -> list[dict[str, Any]]:
        """What the jobs of a kind were told."""
        return [job.values for job in self.jobs if job.do == kind]

    def all(self, jobs: Iterable[Job]) -> list[dict[str, Any]]:
        return [self._answer(job) for job in jobs]

    def run(self, jobs: Iterable[Job], on_progress: Any = None) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, job in enumerate(jobs):
            yield index, self._answer(job)

    def _answer(self, job: Job) -> dict[str, Any]:
        if job.do == "train":
            if self.spec_before_trials is None:
                self.spec_before_trials = (self.out / "spec.json").read_bytes()
            if len(self.done("train")) == self.most_trials:
                raise Interrupted("stopped")
        self.jobs.append(job)
        answer: dict[str, Any] = getattr(self, job.do)(job.values)
        return answer

    def prepare(self, _: Any) -> dict[str, Any]:
        return {"notices": [], **{name: STUDY[name] for name in ("data", "model", "lr", "machine")}}

    def measure(self, _: Any) -> dict[str, Any]:
        return {"step_s": self.step_s, "evaluation_s": 5 * self.step_s}

    def rehearse(self, _: Any) -> dict[str, Any]:
        return {"seconds": 40 * self.step_s, "evaluations": 2}

    def sanity(self, _: Any) -> dict[str, Any]:
        return {"items": []}

    def train(self, told: dict[str, Any]) -> dict[str, Any]:
        config, loss = told["config"], self.loss(told["config"])
        (Path(told["out"]) / "model").mkdir(parents=True)
        names = [f"{part}_{unit}" for part in ("train", "validation_a", "validation_b")
                 for unit in ("nats_per_token", "bits_per_byte")]  # fmt: skip
        # On validation B the order is the other way round: what is chosen there would be found out.
        rows = [{"step": step, **{n: (10 - at if "_b_" in n else at) for n in names}}
                for step, at in ((0, 6.0), (config["steps"], loss))]  # fmt: skip
        return {"steps": config["steps"], "best_step": config["steps"], "evaluations": rows}


def study(pretender: Pretender, spec: StudySpec) -> Report:
    @contextmanager
    def bar(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(update=lambda *_: None, say=lambda _: None)

    return run.run_study(
        spec, pretender.out, command="twodice study", stop=lambda: False, say=lambda _: None, bar=bar
    )


@pytest.fixture
def pretender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretender:
    made = Pretender(tmp_path / "out")
    monkeypatch.setattr(run, "Pool", made)
    return made


ARMS = [("neither", ""), ("dropout", "residual=0.1")]


def test_steps_follow_from_the_minutes_once_and_for_every_trial(pretender: Pretender) -> None:
    spec = make_spec(settings={"minutes": 2}, arms=ARMS, seeds=2, sampling=None)
    pretender.most_trials = 1
    with pytest.raises(Interrupted):
        study(pretender, spec)
    settled = json.loads((pretender.out / "spec.json").read_text())["settled"]
    assert pretender.spec_before_trials == (pretender.out / "spec.json").read_bytes()
    assert "2 minutes" in settled["reason"]
    # Two minutes shared by the trials: more steps would take longer, far fewer would waste the time.
    share = 120 / math.ceil(4 / settled["workers"])
    assert 0.6 * share < settled["steps"] * pretender.step_s < share

    pretender.step_s, pretender.most_trials = 10.0, 10**6  # a slower machine now: nothing is settled anew
    measured = len(pretender.done("measure"))
    report = study(pretender, spec)
    assert len(pretender.done("measure")) == measured and report.steps == settled["steps"]
    trials = [told["config"] for told in pretender.done("train")]
    assert {config["steps"] for config in trials} == {settled["steps"]}
    # By seed, so that a study that was stopped is balanced.
    assert [(c["seed"], c["dropout"]) for c in trials] == [
        (0, "none"), (0, "residual=0.1"), (1, "none"), (1, "residual=0.1")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("step_s", "workers"), [({1: 4, 2: 3, 4: 2}, 4), ({1: 4, 2: 1, 4: 2}, 2), ({1: 9, 2: 5, 4: 1}, 1)]
)
def test_as_many_trials_run_side_by_side_as_is_measured_fastest(
    step_s: dict[int, float], workers: int, pretender: Pretender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_cores", lambda: 4)
    # Seconds of a step by threads; with 4 cores 4 / threads workers take theirs at once.
    monkeypatch.setattr(
        pretender, "measure", lambda told: {"step_s": step_s[told["threads"]] / 100, "evaluation_s": 0.01}
    )
    study(pretender, make_spec(settings={"steps": 20}, arms=ARMS, seeds=2, sampling=None))
    settled = json.loads((pretender.out / "spec.json").read_text())["settled"]
    assert (settled["workers"], settled["threads"]) == (workers, 4 // workers)
    assert {told["threads"] for told in pretender.done("train")} == {4 // workers}


def test_twice_the_minutes_are_about_twice_the_steps_and_too_few_are_refused(
    pretender: Pretender, tmp_path: Path
) -> None:
    steps = []
    for minutes in (2, 4):
        pretender.out = tmp_path / str(minutes)
        spec = make_spec(settings={"minutes": minutes}, arms=ARMS, seeds=2, sampling=None)
        steps.append(study(pretender, spec).steps)
    assert 1.8 < steps[1] / steps[0] < 2.2
    pretender.out, pretender.step_s = tmp_path / "slow", 30.0
    with pytest.raises(ConfigError, match=r"2 minutes are too few for 4 trials .* give about \d+ minutes"):
        study(pretender, make_spec(settings={"minutes": 2}, arms=ARMS, seeds=2, sampling=None))
    assert not (tmp_path / "slow" / "spec.json").exists()


def test_the_commands_that_are_told_hold_for_any_name_of_a_folder(pretender: Pretender) -> None:
    pretender.out = pretender.out.with_name("it's one")
    spec = make_spec(settings={"steps": 20}, arms=ARMS, seeds=2, sampling=None)
    commands = study(pretender, spec).how.commands
    assert shlex.split(commands["report"]) == ["twodice", "report", str(pretender.out)]
    assert shlex.split(commands["generate"])[:3] == ["twodice", "generate", str(pretender.out / "best")]
    assert f"({str(pretender.out / 'best')!r})" in commands["load"]


def test_the_trials_of_a_finished_study_may_be_cleared_away(pretender: Pretender) -> None:
    spec = make_spec(settings={"steps": 20}, arms=ARMS, seeds=2, sampling=None)
    before = study(pretender, spec)
    shutil.rmtree(pretender.out / "trials")
    assert study(pretender, spec) == before and (pretender.out / "best").is_dir()


def test_a_setting_is_tuned_for_each_arm_on_validation_a_and_the_report_says_so(pretender: Pretender) -> None:
    best = {"none": 0.003, "residual=0.1": 0.001}
    pretender.loss = lambda config: (
        3.0 + 100 * abs(config["optimizer"]["lr"] - best[config["dropout"]]) + 1e-3 * (config["seed"] % 7)
    )
    spec = make_spec(settings={"steps": 20}, arms=ARMS, seeds=2, sampling=None, tune=["lr=1e-3,2e-3,3e-3"])
    report = study(pretender, spec)
    trials = [told["config"] for told in pretender.done("train")]
    tuning = [config for config in trials if config["seed"] == spec.tuning_seed]
    assert len(tuning) == 6 and tuning == trials[:6]  # equal effort, and before the trials that are compared
    measured = [told.get("mechanisms", False) for told in pretender.done("train")]
    assert measured == [False] * 6 + [True] * (len(trials) - 6)  # only what is compared is looked into
    compared = {(c["dropout"], c["seed"]): c["optimizer"]["lr"] for c in trials[6:]}
    assert compared == {(plan, seed): lr for plan, lr in best.items() for seed in (0, 1)}
    assert [arm.tuned for arm in report.arms] == [{"optimizer.lr": "3e-3"}, {"optimizer.lr": "1e-3"}]
    notes = " ".join(report.how.notes)
    assert "Tuned for each arm" in notes and "validation text A" in notes and "not tuned" not in notes
    page = render(report)
    assert "optimizer.lr = 3e-3" in page and "optimizer.lr = 1e-3" in page


def test_the_flag_that_tunes_is_counted_in_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = [word for name, text in ARMS for word in ("--arm", f"{name}={text}")]
    words = ["study", *arms, "--seeds", "2", "--tune", "lr=1e-3,2e-3,3e-3", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--plan", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert stop.value.code in (0, None)
    assert (told["tuning_trials"], told["trials"], told["minutes"]) == (6, 10, 5)
    assert told["smallest_difference_in_sd"] == smallest_detectable(2, 1)
    with pytest.raises(SystemExit):
        main([*words, "--plan"])
    said = capsys.readouterr().out
    assert "2 arms x 2 seeds + 6 to tune = 10" in said and "5 min in all" in said
    assert f"a true difference of {smallest_detectable(2, 1):.1f} standard deviations" in said
    assert not list(tmp_path.iterdir())
