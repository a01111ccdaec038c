"""Workers that stay: results, errors, deaths and a request to stop, with jobs that need no training."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from twodice.errors import DataError, Interrupted, TwodiceError
from twodice.study.pool import Job, Pool


def test_a_job_that_fails_gives_its_own_error_with_its_name() -> None:
    with Pool(1, stop=lambda: False, say=print) as pool:
        with pytest.raises(DataError, match="mine: a job must be one of"):
            pool.all([Job("nonsense", {}, "mine")])
        # The same worker goes on after an error.
        with pytest.raises(DataError, match="no-such-folder"):
            pool.all([Job("sanity", {"folder": "no-such-folder"}, "sanity")])


def test_a_worker_that_dies_is_started_again_and_a_second_death_is_an_error() -> None:
    said: list[str] = []
    done = threading.Event()
    with Pool(1, stop=lambda: False, say=said.append) as pool:

        def kill() -> None:
            while not done.is_set():
                for pid in pool.pids:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
                time.sleep(0.1)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            with pytest.raises(TwodiceError, match=r"died by signal 9 during mine, 2 times"):
                pool.all([Job("sanity", {"folder": "x"}, "mine")])
        finally:
            done.set()
            killer.join()
    assert len(said) == 1 and "started again" in said[0]


def test_a_pool_that_is_asked_to_stop_says_so() -> None:
    with (
        Pool(1, stop=lambda: True, say=print) as pool,
        pytest.raises(Interrupted, match="goes on from there"),
    ):
        pool.all([Job("sanity", {"folder": "x"}, "mine")])
