"""Reports for the tests of the page: the full example, small and odd ones, and one that tries to break
out."""

from __future__ import annotations

from typing import Any

from tests.support.example_report import example_report
from twodice.study.effects import effects
from twodice.study.schema import Report

HOSTILE = (
    "<script>document.title='owned'</script>",
    '"><img src=https://attacker.invalid/x onerror="document.title=\'owned\'">',
    "</style></svg></title><script src=//attacker.invalid/a.js></script>",
    "{{ 7 * 7 }}{% raw %} $\\frac{1}{2}$ '\u202e\x00\x1b[31m& 名前 " + "long " * 60,
)


def full_report() -> Report:
    """The example, with the effects of both dice."""
    report = example_report()
    assert report.cross is not None
    found = effects(report.arms, report.sampling, report.cross)
    return report.model_copy(update={"cross": report.cross.model_copy(update={"effects": found})})


def changed(report: Report, **fields: Any) -> Report:
    """`report` with some of its top-level fields replaced and everything checked again."""
    return Report.model_validate(report.model_dump() | fields)


def hostile_report() -> Report:
    """Every arm is named, and every text written, by somebody who wants to run a script in the reader's
    browser."""
    report = full_report()
    renamed = dict(zip([arm.name for arm in report.arms], HOSTILE, strict=True))

    def rename(value: Any) -> Any:
        if isinstance(value, str):
            return renamed.get(value, value)
        if isinstance(value, list):
            return [rename(v) for v in value]
        return {k: rename(v) for k, v in value.items()} if isinstance(value, dict) else value

    data = rename(report.model_dump())
    for example, payload in zip(data["examples"], HOSTILE * 2, strict=False):
        example["text"] = payload + example["text"]
        example["prompt"] = HOSTILE[0] + HOSTILE[1]
    data["answer"] = data["details"][0] = HOSTILE[1]
    data["data"]["sources"] = [HOSTILE[2]]
    data["how"]["commands"]["study"] = HOSTILE[2]
    data["how"]["machine"][HOSTILE[0]] = HOSTILE[1]
    return Report.model_validate(data)


def without_cross() -> Report:
    """A study that generated nothing."""
    return changed(full_report(), cross=None, sampling=[], examples=[], human=None, sanity=[])


def one_arm_one_seed() -> Report:
    """The smallest report: the baseline alone, one seed, hence no interval anywhere."""

    def first(value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {"mean", "low", "high", "values"}:
                return {"mean": value["values"][0], "low": None, "high": None, "values": value["values"][:1]}
            return {
                k: v[:1] if k in ("seeds", "steps") and len(v) == 5 else first(v) for k, v in value.items()
            }
        return [first(v) for v in value] if isinstance(value, list) else value

    report = without_cross()
    arm = first(report.model_dump()["arms"][0])
    return changed(report, arms=[arm], best=report.baseline, seeds=report.seeds[:1], mechanisms=None)
