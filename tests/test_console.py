"""Progress on and off a terminal, Ctrl-C as a flag, the clock of the loop."""

import errno
import os
import pty
import signal
import sys
import threading

import pytest

from fastpix2pix.console import Progress
from fastpix2pix.interrupt import Interrupt
from fastpix2pix.training.clock import Clock


def test_plain_lines_are_few_and_on_stderr(capsys, monkeypatch):
    now = iter(range(1, 2000))
    monkeypatch.setattr("time.monotonic", lambda: next(now) / 20)  # an update takes a twentieth of a second
    with Progress("train", 1000) as progress:
        for done in range(1, 1001):
            progress.update(done, f"note {done}")
        progress.say("[bold]a line[/bold]")
    out, err = capsys.readouterr()
    assert out == ""
    first, second, *_, last, said = err.splitlines()
    assert first == "train: 301/1000  note 301"  # after 15 seconds
    assert second.startswith("train: 6")
    assert last == "train: 1000/1000  note 1000"
    assert said == "[bold]a line[/bold]"
    assert len(err.splitlines()) == 5


def test_quiet_shows_nothing(capsys):
    with Progress("train", 2, quiet=True) as progress:
        progress.update(2)
        progress.say("a line")
    assert capsys.readouterr() == ("", "")


def test_total_may_come_later(capsys):
    with Progress("check") as progress:
        progress.count(3, 3)
    assert capsys.readouterr().err == "check: 3/3\n"


def everything(master: int) -> str:
    """All that was written to a terminal whose other end is closed; one read may give a part of it."""
    parts = []
    try:
        while part := os.read(master, 65536):
            parts.append(part)
    except OSError as error:
        assert error.errno == errno.EIO  # how Linux says that the other end is closed
    os.close(master)
    return b"".join(parts).decode()


def test_bar_on_a_terminal(monkeypatch):
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress("train", 10) as progress:
            progress.update(4, "12.0 img/s")
            progress.say("[bold] stays as it is")
            progress.update(10)
    shown = everything(master)
    assert "10/10" in shown
    assert "12.0 img/s" in shown
    assert "[bold] stays as it is" in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_sets_the_flag_second_raises(number):
    before = signal.getsignal(number)
    with Interrupt() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.signal == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_other_threads_get_no_handler():
    seen = []

    def work() -> None:
        with Interrupt() as stop:
            seen.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_clock_leaves_out_what_is_neither_loading_nor_stepping(monkeypatch):
    now = iter((0.0, 1.0, 3.0, 3.0, 10.0, 11.0, 20.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock()  # 0
    with clock.loading():  # 1 to 3
        pass
    with clock.away():  # 3 to 10
        pass
    lap = clock.lap()  # 11, and the next lap starts at 20
    assert (lap.steps, lap.seconds, lap.loading) == (1, 4.0, 2.0)
