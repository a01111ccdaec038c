"""The errors of twodice, and the search for the name that was meant.

Each error is also a builtin, so that callers can catch it without importing twodice. A message says what
must hold, what came, and how to repair it. This module knows nothing of the rest of the package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TwodiceError(Exception):
    """Base of every error that twodice raises on purpose."""


class ConfigError(TwodiceError, ValueError):
    """A setting, a plan or a specification that cannot be meant."""


class ShapeError(TwodiceError, ValueError):
    """A tensor whose shape or type does not fit the others."""


class DataError(TwodiceError, ValueError):
    """A text, a file or a record that cannot be read or is too little."""


class RequestError(TwodiceError, ValueError):
    """A request for tokens that cannot be served."""


class ContractError(TwodiceError, RuntimeError):
    """A call that would break the law, such as a training forward outside a step."""


class BackendError(TwodiceError, RuntimeError):
    """A kernel that was demanded and is not there."""


class CheckpointError(TwodiceError, OSError):
    """A checkpoint that is missing, damaged or made by another configuration."""


class Interrupted(TwodiceError, RuntimeError):
    """Work that was asked to stop; its state is saved and the same command goes on from there."""


def nearest(name: str, options: Iterable[str], cutoff: float = 0.5) -> str:
    """Return ``"; did you mean 'x'?"`` for the option nearest to `name`, or an empty string.

    `cutoff` is how like it must be, in [0, 1]: near 1 where the options are many and not ours.
    """
    matches = difflib.get_close_matches(name, list(options), n=1, cutoff=cutoff)
    return f"; did you mean {matches[0]!r}?" if matches else ""
