"""What every command shares: results to stdout, progress to stderr, short errors, exit codes.

Knows nothing of any command. Exit codes: 0 done, 1 failed, 2 usage or configuration, 75 interrupted and
resumable, 130 stopped at once by a second Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_STOPPED = 1, 2, 75, 130


def is_interactive() -> bool:
    """Whether progress may redraw its line: stderr is a terminal that understands it."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") != "dumb"


def out() -> Console:
    """Console for results (stdout); no colour when piped, ``NO_COLOR`` honoured by rich."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())


def err() -> Console:
    """Console for progress, notices and errors (stderr)."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, soft_wrap=not sys.stderr.isatty())


def notice(text: str) -> None:
    """One plain line to stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON document to stdout, with stable key order as given."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def setting_help(name: str) -> str:
    """The text of a training setting with its default, as every command's help says it."""
    from twodice.training.config import setting_names
    from twodice.training.presets import PRESETS

    field = setting_names()[name]
    text: str = field.description[0].upper() + field.description[1:]
    if name == "model":
        text += f"; presets: {', '.join(PRESETS)}"
    if field.default is None or "default" in text:
        return f"{text}."
    default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
    return f"{text}. Default {default}."


def as_folder(out: Path) -> Path:
    """`out` itself, for ``--out``: a folder that is there or can be made.

    Raises
    ------
    ConfigError
        It is something else.
    """
    from twodice.errors import ConfigError

    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out must be a folder, new or old; {str(out)!r} is a file")
    return out


def duration(seconds: float) -> str:
    """``75`` -> ``1 min 15 s``; for people, not for programs."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress:
    """A line of progress: redrawn on a terminal, one plain line every few seconds elsewhere.

    Parameters
    ----------
    title
        What is being done.
    total
        Units of work in all (steps, trials); the time left is estimated from those done since the start.
    plain_every_s
        Seconds between lines when stderr is not a terminal.
    """

    def __init__(self, title: str, total: int, *, done: int = 0, plain_every_s: float = 10.0) -> None:
        self.title, self.total, self.done, self.started_at = title, total, done, done
        self.plain_every_s = plain_every_s
        self._began = self._last = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if is_interactive():
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[note]}"),
                console=err(),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def seconds_left(self) -> float | None:
        """Estimate from the rate since this process began; None before anything was done."""
        new = self.done - self.started_at
        if new <= 0:
            return None
        return (time.monotonic() - self._began) / new * (self.total - self.done)

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` of `total` units are done; `note` is a short text beside it."""
        ends = done >= self.total > self.done
        self.done = done
        left = self.seconds_left()
        text = f"{note}  {duration(left)} left" if left is not None and done < self.total else note
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=text.strip())
            return
        now = time.monotonic()
        if now - self._last >= self.plain_every_s or ends:
            self._last = now
            notice(f"{self.title}: {done}/{self.total}  {text}".rstrip())

    def say(self, text: str) -> None:
        """A lasting line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        else:
            notice(text)


@contextmanager
def errors_in_one_line(debug: bool) -> Iterator[None]:
    """Turn the errors of twodice into one or two lines and the exit codes of this module's docstring."""
    from twodice.errors import ConfigError, DataError, Interrupted, RequestError, ShapeError, TwodiceError

    try:
        yield
    except BrokenPipeError:
        # The reader went away (`twodice ... | head`): nothing is wrong, and nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_FAILED) from None
    except Interrupted as error:
        notice(f"stopped: {error}")
        raise SystemExit(EXIT_INTERRUPTED) from None
    except KeyboardInterrupt:
        notice("stopped at once")
        raise SystemExit(EXIT_STOPPED) from None
    except TwodiceError as error:
        if debug:
            raise
        notice(f"error: {error}")
        for note in getattr(error, "__notes__", ()):
            notice(note)
        is_usage = isinstance(error, ConfigError | DataError | RequestError | ShapeError)
        raise SystemExit(EXIT_USAGE if is_usage else EXIT_FAILED) from None
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        notice(f"error: {where}{error.strerror if error.strerror is not None else error}")
        raise SystemExit(EXIT_FAILED) from None
    except Exception as error:
        if debug:
            raise
        notice(f"error: {type(error).__name__}: {error} (run again with --debug for the traceback)")
        raise SystemExit(EXIT_FAILED) from None
