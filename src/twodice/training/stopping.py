"""How a run is asked to stop: the first SIGINT or SIGTERM sets a flag that every loop polls, the second ends
at once.

The second one is seen by a thread of its own, so that it also works while the main thread is inside a long
backward pass. Knows nothing of what is running.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_EXIT_STOPPED = 130


class StopOnSignal:
    """A flag that is true once the process was asked to stop; call it to read it.

    Parameters
    ----------
    say
        Is told once, in words, at the first signal.

    Examples
    --------
    >>> with StopOnSignal() as stop:
    ...     stop()
    False
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self._asked = threading.Event()
        self._say = say
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup = -1

    def __call__(self) -> bool:
        return self._asked.is_set()

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._first)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pipe is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._pipe[1])
        self._pipe = None

    def _first(self, number: int, frame: FrameType | None) -> None:
        self._asked.set()

    def _watch(self, end: int) -> None:
        count = 0
        with os.fdopen(end, "rb", buffering=0) as pipe:
            while True:
                numbers = pipe.read(64)
                if not numbers:
                    return
                for number in numbers:
                    if number not in _SIGNALS:
                        continue
                    count += 1
                    if count == 1:
                        self._asked.set()
                        if self._say is not None:
                            self._say("stopping: the state is being saved (a second signal stops at once)")
                    else:
                        if sys.stderr.isatty():
                            # A progress line may have hidden the cursor.
                            os.write(2, b"\x1b[?25h\n")
                        os._exit(_EXIT_STOPPED)
