"""Numbers that a loss can be held against: what xz needs, and the true entropy where it is known."""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence
from typing import Any


def xz_bits_per_byte(training: Sequence[str], validation: Sequence[str]) -> float:
    """Bits per byte that xz needs for the validation text once it has seen the training text.

    The size of both together less the size of training alone, over the bytes of the validation text. A window
    of the whole text is given, so that nothing of the training text is out of its sight.
    """
    first = "".join(training).encode()
    second = "".join(validation).encode()
    window = min(max(4096, 1 << (len(first) + len(second)).bit_length()), 1 << 30)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}]

    def size(data: bytes) -> int:
        return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))

    return 8 * (size(first + second) - size(first)) / len(second)


def sanity_of(store: Any) -> list[dict[str, Any]]:
    """The sanity lines of a store of tokens, as plain values of `schema.Sanity`."""
    value = xz_bits_per_byte(store.texts("train"), store.texts("validation_b"))
    items: list[dict[str, Any]] = [
        {
            "name": "xz",
            "value": value,
            "unit": "bits per byte",
            "words": f"xz, given the training text, needs {value:.2f} bits per byte of validation text",
        }
    ]
    entropy = store.entropy_nats_per_byte
    if entropy is not None:
        bits = entropy / math.log(2)
        items.append(
            {
                "name": "true entropy",
                "value": bits,
                "unit": "bits per byte",
                "words": f"the source of the text has {bits:.3f} bits per byte: in the long run no model can "
                "do better",
            }
        )
    return items
