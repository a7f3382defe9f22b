"""OpenMP's teams, counted as threads of this process."""

import os
import re
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch

from fastpix2pix.openmp import release_team

MAPS = open("/proc/self/maps").read() if sys.platform == "linux" else ""  # noqa: SIM115
pytestmark = pytest.mark.skipif(not re.search("libgomp", MAPS), reason="torch has no GNU OpenMP here")


def compute() -> None:
    torch.ones(1 << 20).exp_()


def settled(wanted: int) -> int:
    """Threads of the process; waits until they are as many as wanted, for a while."""
    for _ in range(500):
        if len(os.listdir("/proc/self/task")) == wanted:
            break
        time.sleep(0.01)
    return len(os.listdir("/proc/self/task"))


def in_new_thread(work: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def test_the_team_of_the_calling_thread_ends_and_comes_back():
    threads = torch.get_num_threads()

    def work() -> None:
        torch.set_num_threads(3)
        alone = len(os.listdir("/proc/self/task"))
        compute()
        assert settled(alone + 2) == alone + 2
        release_team()
        assert settled(alone) == alone
        compute()
        assert settled(alone + 2) == alone + 2
        assert torch.get_num_threads() == 3

    try:
        in_new_thread(work)
    finally:
        torch.set_num_threads(threads)


def test_the_teams_of_other_threads_stay():
    threads = torch.get_num_threads()
    computed, released, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        torch.set_num_threads(3)
        compute()
        computed.set()
        released.wait(60)

    def work() -> None:
        torch.set_num_threads(3)
        alone = len(os.listdir("/proc/self/task"))
        thread = threading.Thread(target=other)
        thread.start()
        computed.wait(60)
        release_team()
        time.sleep(0.2)
        seen.append(len(os.listdir("/proc/self/task")) - alone)
        released.set()
        thread.join()

    try:
        in_new_thread(work)
    finally:
        torch.set_num_threads(threads)
    assert seen == [3]


def test_nothing_to_end():
    in_new_thread(release_team)
