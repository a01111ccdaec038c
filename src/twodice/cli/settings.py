"""One option of a command for each setting of the chain, from the table of settings: help, interval, kind.

The file knows how a setting is typed and how it is written back; it loads no torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from twodice.errors import ConfigError
from twodice.sampling.fields import FIELDS


def _help(name: str) -> str:
    """The help of a setting: no option says None, and one that is left out takes the folder's value."""
    field = FIELDS[name]
    text = field.help.replace("None, ", "").replace("; None ", "; left out, it ")
    form = {"ids": "; ID,ID", "bias": "; ID=NUMBER,ID=NUMBER"}.get(str(field.kind), "")
    where = f"; in {field.interval}" if field.interval and field.kind is not bool else ""
    return f"{text[0].upper()}{text[1:]}{form}{where}."


def flag(name: str) -> str:
    """The long option of a setting."""
    return "--" + name.replace("_", "-")


def _option(name: str) -> inspect.Parameter:
    """The option of one setting, from the table of settings."""
    kind = FIELDS[name].kind
    names = ("--temperature", "--temp") if name == "temperature" else (flag(name),)
    of: Any = kind if isinstance(kind, type) else str
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[of | None, typer.Option(*names, help=_help(name))],
    )


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each setting of `FIELDS` in the place of its ``**settings``."""
    signature = inspect.signature(command, eval_str=True)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    own = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own[:5], *map(_option, FIELDS), *own[5:]]
    )
    return command


def read(name: str, value: Any) -> Any:
    """A setting as `SamplingParams` takes it, from what was typed."""
    kind = FIELDS[name].kind
    if not isinstance(value, str) or name == "profile":
        return value
    parts = [part.strip() for part in value.split(",")]
    if kind == "names":
        return tuple(parts)
    try:
        if kind == "ids":
            return tuple(int(part) for part in parts)
        pairs = [part.split("=") for part in parts]
        return {int(token): float(add) for token, add in pairs}
    except ValueError:
        form = "ID,ID" if kind == "ids" else "ID=NUMBER,ID=NUMBER"
        raise ConfigError(f"{flag(name)} must be {form}; got {value!r}") from None


def typed(name: str, value: Any) -> str:
    """The reverse of `_read`."""
    if isinstance(value, tuple):
        return ",".join(f"{one[0]}={one[1]!r}" if isinstance(one, tuple) else str(one) for one in value)
    return value if isinstance(value, str) else repr(value)
