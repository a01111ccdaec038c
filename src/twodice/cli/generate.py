"""`twodice generate`: continue a prompt, say the seed, and show on request how each token came to be drawn.

The text goes to stdout as it comes; where the settings came from, the seed and the command that gives the
same output again go to stderr. Ranges and help texts are those of `twodice.sampling.fields.FIELDS`.
"""

from __future__ import annotations

import json as json_module
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twodice.cli.settings import flag, read, typed, with_settings
from twodice.sampling.fields import FIELDS, is_off
from twodice.sampling.formats import GENERATION
from twodice.sampling.profiles import SWITCH

if TYPE_CHECKING:
    from twodice.generation.requests import Completion
    from twodice.sampling.explanation import Explanation
    from twodice.sampling.params import SamplingParams

#: How many of the model's most probable tokens `--explain` shows.
_BELIEVED = 5
#: Settings that are told also where they are off; the others where they are on.
_ALWAYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
#: Settings of stages 4 to 11, which greedy choice does not reach.
_UNUSED_BY_GREEDY = tuple(
    name
    for name, field in FIELDS.items()
    if name in {*SWITCH.values(), "dynatemp_range", "order", "seed"}
    or set(field.needs) & {*SWITCH.values(), "dynatemp_range"}
)


@with_settings
def generate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|FOLDER", help="A run folder, a folder in Hugging Face format, or hf:NAME on the hub."
        ),
    ],
    prompt: Annotated[str | None, typer.Option(help="The text to continue; may be empty.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="Read the prompt, as it is, from this file; - is stdin.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 128,
    n: Annotated[int, typer.Option("-n", "--n", help="How many continuations, all under one seed.")] = 1,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most probable token.")] = False,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the text where this comes, without it; may be repeated.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show for each token what the model believed and each stage left."),
    ] = False,
    device: Annotated[str, typer.Option(help="Where the model runs: auto, cpu, cuda, cuda:1.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="Threads of the model [default: torch decides].")
    ] = None,
    **settings: Any,
) -> None:
    """Continue a prompt with exact, seeded sampling.

    Settings that are not given come from the folder's generation_config.json.
    """
    given = {name: read(name, value) for name, value in settings.items() if value is not None}
    _check(given, greedy=greedy, n=n, threads=threads)
    text = _prompt(prompt, prompt_file)

    import torch

    from twodice.cli.console import notice, print_json
    from twodice.generation.engine import Engine
    from twodice.generation.load import load
    from twodice.generation.requests import Request
    from twodice.sampling.params import SamplingParams
    from twodice.training.step import choose_device

    SamplingParams.parse(given)  # a value out of range is said before the model is loaded
    Request("", max_tokens=max_tokens, n=n, stop=stop or ())
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load(source, device=str(choose_device(device)))
    params, origin = settle(given, greedy, loaded.written, loaded.defaults)
    told = [f"{name} {_shown(params, name)} ({origin[name]})" for name in _told(params)]
    notice("settings: " + ", ".join(told))

    engine = Engine(loaded.model, loaded.tokenizer, defaults=loaded.defaults)
    request = Request(text, params, max_tokens, stop or (), n, explain=_BELIEVED if explain else 0)
    stdout = _Output(n)
    done = engine.generate([request], on_text=None if json else stdout.live)
    used = done[0].seed
    again = _command(source, prompt, prompt_file, params, used, max_tokens, n, stop or [], device, threads)

    if json:
        print_json(_document(source, text, params, origin, used, again, done))
    else:
        stdout.rest(done)
        if explain:
            for one in done:
                _print_records(one, n)
    for one in done:
        if one.finish_reason == "length" and len(one.tokens) < max_tokens:
            notice(f"completion {one.completion} fills the model's context of {engine.context} tokens")
    notice(
        "no draw was used"
        if params.greedy
        else f"seed: {used}" + (f", completions 0 to {n - 1}" if n > 1 else "")
    )
    notice(f"again: {again}")


# ---- before the model is loaded


def _check(given: dict[str, Any], *, greedy: bool, n: int, threads: int | None) -> None:
    """Refuse options that contradict each other or would be without effect."""
    from twodice.errors import ConfigError

    if threads is not None and threads < 1:
        raise ConfigError(f"--threads must be at least 1; got {threads}")
    by = "--greedy" if greedy else "--temperature 0" if given.get("temperature") == 0 else None
    if by is None:
        return
    unused = [
        name for name in _UNUSED_BY_GREEDY if name in given and not (name == "temperature" and not greedy)
    ]
    if greedy and unused == ["temperature"] and given["temperature"] == 0:
        return
    if unused:
        raise ConfigError(
            f"{by} always takes the most probable token; {flag(unused[0])} would do nothing: drop one"
        )
    if n > 1:
        raise ConfigError(f"{by} gives one text only; got -n {n}: drop one")


def _prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from wherever it is; exactly one of the two must be given."""
    from twodice.errors import ConfigError, DataError

    if (prompt is None) == (prompt_file is None):
        came = "neither" if prompt is None else "both"
        raise ConfigError(f"give one of --prompt TEXT and --prompt-file FILE (- for stdin); got {came}")
    if prompt is not None:
        return prompt
    assert prompt_file is not None, "one of the two was given"
    try:
        data = sys.stdin.buffer.read() if prompt_file == "-" else Path(prompt_file).read_bytes()
    except OSError as error:
        raise DataError(
            f"--prompt-file must be a file that can be read; {prompt_file!r}: {error.strerror}"
        ) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"a prompt must be UTF-8; {prompt_file!r} is not at byte {error.start}") from error


# ---- settings and where they come from


def settle(
    given: dict[str, Any], greedy: bool, written: dict[str, Any], defaults: SamplingParams
) -> tuple[SamplingParams, dict[str, str]]:
    """The settings in force, and for each where it came from.

    What was given on the command line goes first, then ``generation_config.json`` (`written`, understood as
    `defaults`), then the neutral value. A folder that asks for greedy choice is overruled by any option that
    only makes sense with a draw.
    """
    from twodice.sampling.params import SamplingParams

    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name in FIELDS:
        if name in given:
            values[name], origin[name] = given[name], flag(name)
        elif greedy and name in _UNUSED_BY_GREEDY:
            values[name], origin[name] = (0.0 if name == "temperature" else None), "--greedy"
        elif written.get(name) is not None:
            values[name], origin[name] = getattr(defaults, name), "generation_config.json"
        else:
            values[name], origin[name] = getattr(SamplingParams(), name), "neutral"
    if "temperature" not in given and not greedy and written and defaults.greedy:
        if set(given) & set(_UNUSED_BY_GREEDY):
            wanted = written.get("temperature")
            values["temperature"] = wanted if wanted is not None else 1.0
        else:
            values["temperature"] = 0.0
            origin["temperature"] = "generation_config.json: do_sample is not true"
    return SamplingParams(**values), origin


def _shown(params: SamplingParams, name: str) -> str:
    """A setting for people: ``off`` where it changes nothing."""
    value = getattr(params, name)
    if is_off(name, value) and name != "temperature":
        return "off"
    return f"{value:g}" if isinstance(value, float) else typed(name, value)


def _told(params: SamplingParams) -> list[str]:
    """The settings that are worth a word: those in force, and five that are so common that off is news."""
    return [
        name
        for name in FIELDS
        if name != "seed" and (name in _ALWAYS or not is_off(name, getattr(params, name)))
    ]


def _command(
    source: str,
    prompt: str | None,
    prompt_file: str | None,
    params: SamplingParams,
    seed: int,
    max_tokens: int,
    n: int,
    stop: list[str],
    device: str,
    threads: int | None,
) -> str:
    """The command that gives the same output again whatever the folder's defaults become."""
    words = ["twodice", "generate", source]
    words += ["--prompt", prompt] if prompt is not None else ["--prompt-file", str(prompt_file)]
    words += ["--max-tokens", str(max_tokens)]
    words += ["--greedy"] if params.greedy else ["-n", str(n), "--seed", str(seed)]
    told = _told(params)
    for name in FIELDS:
        value = getattr(params, name)
        # What generation_config.json may say is spelled out also where it is off.
        if (name not in told and name not in GENERATION) or (params.greedy and name in _UNUSED_BY_GREEDY):
            continue
        if FIELDS[name].kind is bool:
            words += [flag(name)]
        else:
            words += [flag(name), typed(name, FIELDS[name].neutral if value is None else value)]
    for text in stop:
        words += ["--stop", text]
    if device != "cpu":
        words += ["--device", device]
    if threads is not None:
        words += ["--threads", str(threads)]
    return shlex.join(words)


# ---- output


class _Output:
    """Texts to stdout: the first as it comes, the others behind it, each under a line with its number."""

    def __init__(self, n: int) -> None:
        self._n, self._is_open = n, False

    def _head(self, completion: int) -> None:
        if self._n > 1:
            sys.stdout.write(f"--- {completion + 1} of {self._n}\n")

    def live(self, request: int, completion: int, piece: str) -> None:
        if completion == 0:
            if not self._is_open:
                self._head(0)
            self._is_open = True
            sys.stdout.write(piece)
            sys.stdout.flush()

    def rest(self, done: list[Completion]) -> None:
        if not self._is_open:
            self._head(0)
        sys.stdout.write("\n")
        for one in done[1:]:
            self._head(one.completion)
            sys.stdout.write(one.text + "\n")
        sys.stdout.flush()


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%" if value >= 0.0995 else f"{100 * value:.2g}%"


def _print_records(one: Completion, n: int) -> None:
    """The records of one completion: a table on a terminal, one line a token elsewhere."""
    from rich.markup import escape
    from rich.table import Table

    from twodice.cli.console import out

    title = f"completion {one.completion + 1} of {n}" if n > 1 else None
    if not sys.stdout.isatty():
        for line in ([title] if title is not None else []) + [_line(record) for record in one.records]:
            print(line)
        return
    table = Table(title=title, title_justify="left")
    table.add_column("at", justify="right")
    table.add_column("token", style="bold")
    table.add_column("the model", justify="right")
    table.add_column("rank", justify="right")
    table.add_column("odds", justify="right")
    has_edits = any(record.edits for record in one.records)
    if has_edits:
        table.add_column("moved by each edit", overflow="fold")
    table.add_column("left by each stage: tokens, mass")
    table.add_column("what the model believed")
    for record in one.records:
        table.add_row(
            str(record.position),
            escape(_quoted(record.text)),
            _percent(record.probability),
            str(record.rank + 1),
            _percent(record.odds),
            *([escape(_moved(record, "\n"))] if has_edits else []),
            _left(record),
            escape(_believed(record)),
        )
    out().print(table)


def _line(record: Explanation) -> str:
    return (
        f"{record.position:>5} {_quoted(record.text)}: the model {_percent(record.probability)}, "
        f"rank {record.rank + 1}, odds {_percent(record.odds)}; "
        + (f"moved {_moved(record)}; " if record.edits else "")
        + f"left {_left(record)}; "
        f"believed {_believed(record)}"
    )


def _left(record: Explanation) -> str:
    return "  ".join(f"{one.name}: {one.kept}, {_percent(one.mass)}" for one in record.stages) or "all"


def _moved(record: Explanation, between: str = "  ") -> str:
    """Each edit with the tokens that it moved furthest and how many it banned."""
    told = []
    for one in record.edits:
        parts = [f"{_quoted(text)} {after - before:+.3g}" for _, text, before, after in one.moved[:3]]
        parts += [f"{len(one.moved) - 3} more"] if len(one.moved) > 3 else []
        parts += [f"{one.banned} banned"] if one.banned else []
        told.append(f"{one.name}: " + (", ".join(parts) or "nothing"))
    return between.join(told)


def _believed(record: Explanation) -> str:
    return "  ".join(f"{_quoted(text)} {_percent(value)}" for _, text, value in record.believed)


def _quoted(text: str) -> str:
    """A token so that its spaces and line ends can be seen."""
    return json_module.dumps(text, ensure_ascii=False)


def _plain(name: str, value: Any) -> Any:
    """A setting for JSON, which has no -inf: a bias as it is typed."""
    return typed(name, value) if FIELDS[name].kind == "bias" and value is not None else value


def _document(
    source: str,
    text: str,
    params: SamplingParams,
    origin: dict[str, str],
    seed: int,
    again: str,
    done: list[Completion],
) -> dict[str, Any]:
    import twodice

    completions = []
    for one in done:
        found: dict[str, Any] = {
            "completion": one.completion,
            "text": one.text,
            "tokens": list(one.tokens),
            "finish_reason": one.finish_reason,
            "logprobs": list(one.logprobs),
        }
        if one.records:
            found["explain"] = [record.to_dict() for record in one.records]
        completions.append(found)
    return {
        "twodice": twodice.__version__,
        "source": source,
        "prompt": text,
        "prompt_tokens": done[0].prompt_tokens,
        "settings": {
            name: {"value": _plain(name, getattr(params, name)), "from": origin[name]}
            for name in _told(params)
        },
        "seed": None if params.greedy else seed,
        "again": again,
        "completions": completions,
    }
