"""The entry point: finds the command that was named, and imports that one alone.

`twodice --help` lists the commands from the table below without importing any of them, hence without torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import typer

import twodice
from twodice.cli.console import EXIT_STOPPED, EXIT_USAGE, errors_in_one_line, notice
from twodice.errors import nearest

#: What typer raises where the words cannot be meant; it has no public name of its own in every version.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
_KINDS = {"int_parsing": "an integer", "int_from_float": "an integer", "float_parsing": "a number"}

COMMANDS = {
    "study": "Measure on a text whether dropout helps, and what top-k does to what is generated.",
    "train": "Train or fine-tune one model on a text, with a plan of dropout.",
    "generate": "Continue a prompt with exact, seeded sampling.",
    "report": "Make a study's report again from its records (needs no torch).",
    "audit": "List every place in a model where something may be dropped.",
    "conformance": "Judge whether a sampler, ours or any other, draws from the distribution it claims.",
    "doctor": "Show versions, the kernels in use and why, cores and devices.",
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "twodice: dropout and token sampling, exact and reproducible, measured on your own text\n\n"
        "usage: twodice COMMAND [ARGUMENTS]   (twodice COMMAND --help says more)\n\n"
        f"{rows}\n\n"
        "options for every command:\n"
        "  --debug    show the traceback of an error\n"
        "  --version  print the version\n\n"
        "exit codes: 0 done, 1 failed, 2 usage, 75 interrupted and resumable, 130 stopped at once\n\n"
        "examples:\n"
        "  twodice study my-text/ --minutes 10 --out runs/first\n"
        "  twodice train my-text/ --model llama-nano --dropout 'residual=0.1' --epochs 8 --out runs/one\n"
        "  twodice generate runs/one --prompt 'Once' --top-k 50 --seed 7 -n 3\n"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run ``twodice`` with `arguments` (default: those of the process); always ends by SystemExit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if debug:
        words.remove("--debug")
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(), end="")
        raise SystemExit(0 if words else EXIT_USAGE)
    if words[0] == "--version":
        print(f"twodice {twodice.__version__}")
        raise SystemExit(0)
    name = words[0]
    if name not in COMMANDS:
        notice(f"error: no command {name!r}{nearest(name, COMMANDS)} (twodice --help lists them)")
        raise SystemExit(EXIT_USAGE)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a question mark; that stops no work.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    with errors_in_one_line(debug):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        function = getattr(importlib.import_module(f"twodice.cli.{name}"), name)
        app.command(name=name, help=function.__doc__)(function)
        try:
            code = app(args=words[1:], prog_name=f"twodice {name}", standalone_mode=False)
        except _UsageError as error:
            notice(f"error: {_in_words(error)} (twodice {name} --help says more)")
            raise SystemExit(EXIT_USAGE) from None
        if code == EXIT_STOPPED:
            raise KeyboardInterrupt
    raise SystemExit(code if isinstance(code, int) else 0)


def _in_words(error: Any) -> str:
    """What is wrong with the words of a command: one line, not in the words of the library that reads it."""
    cause, option = error.__cause__, getattr(error, "param", None)
    found = cause.errors() if hasattr(cause, "errors") else []
    if len(found) == 1 and option is not None:
        told, name = found[0], option.get_error_hint().split(" / ")[0].strip("'")
        if told["type"] in _KINDS:
            return f"{name} must be {_KINDS[told['type']]}; got {told['input']!r}"
        if told["type"] == "greater_than_equal":
            return f"{name} must be at least {told['ctx']['ge']}; got {told['input']!r}"
    text: str = error.format_message()
    return text[0].lower() + text[1:].rstrip(".")


if __name__ == "__main__":
    main()
