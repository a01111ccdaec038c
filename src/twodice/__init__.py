"""twodice: the two kinds of chance in a language model, exact, reproducible and fast.

The public names are loaded when they are first used, so that ``import twodice``, the command line's help and
``twodice report`` need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twodice import nn as nn
    from twodice.dropout.attach import attach as attach
    from twodice.dropout.attend import attention as attention
    from twodice.dropout.functional import dropout as dropout
    from twodice.dropout.functional import dropout_add as dropout_add
    from twodice.dropout.handle import Handle as Handle
    from twodice.dropout.maxnorm import max_norm_ as max_norm_
    from twodice.dropout.plan import DropoutPlan as DropoutPlan
    from twodice.dropout.rdrop import r_drop_loss as r_drop_loss
    from twodice.dropout.trainer_callback import DropoutCallback as DropoutCallback
    from twodice.errors import TwodiceError as TwodiceError
    from twodice.random.keys import Key as Key
    from twodice.sampling.explain import explain as explain
    from twodice.sampling.explanation import Explanation as Explanation
    from twodice.sampling.params import SamplingParams as SamplingParams
    from twodice.sampling.processor import processor as processor
    from twodice.sampling.sample import sample as sample
    from twodice.sampling.speculative import verify as verify
    from twodice.sampling.translate import translate as translate

__version__ = "0.1.0"

_HOMES = {
    "DropoutCallback": "twodice.dropout.trainer_callback",
    "DropoutPlan": "twodice.dropout.plan",
    "Explanation": "twodice.sampling.explanation",
    "Handle": "twodice.dropout.handle",
    "Key": "twodice.random.keys",
    "SamplingParams": "twodice.sampling.params",
    "TwodiceError": "twodice.errors",
    "attach": "twodice.dropout.attach",
    "attention": "twodice.dropout.attend",
    "dropout_add": "twodice.dropout.functional",
    "explain": "twodice.sampling.explain",
    "max_norm_": "twodice.dropout.maxnorm",
    "processor": "twodice.sampling.processor",
    "r_drop_loss": "twodice.dropout.rdrop",
    "sample": "twodice.sampling.sample",
    "translate": "twodice.sampling.translate",
    "verify": "twodice.sampling.speculative",
}

__all__ = [
    "DropoutCallback",
    "DropoutPlan",
    "Explanation",
    "Handle",
    "Key",
    "SamplingParams",
    "TwodiceError",
    "__version__",
    "attach",
    "attention",
    "dropout",
    "dropout_add",
    "explain",
    "max_norm_",
    "nn",
    "processor",
    "r_drop_loss",
    "sample",
    "translate",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("dropout", "nn"):  # modules (the first of them callable); importing one binds its name here
        return importlib.import_module(f"twodice.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'twodice' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # so that the next use costs a look-up and no more
    return value


def __dir__() -> list[str]:
    return __all__
