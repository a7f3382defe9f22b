"""Pipes, and what is left after Ctrl-C, SIGTERM and a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from fastpix2pix.runtime.load import load
from tests.streaming.clips import HEIGHT, WIDTH, command, make_video, packets_of, scene, stamps_of

ROOT = Path(__file__).resolve().parents[2]


def test_raw_frames_through_pipes(model, tmp_path):
    frames = np.stack([scene(i) for i in range(6)])
    process = command("infer", model, "-", "-", "--raw", f"rgb24:{WIDTH}x{HEIGHT}@30", stdin=subprocess.PIPE)
    out, err = process.communicate(frames.tobytes(), timeout=120)
    assert process.returncode == 0, err
    found = np.frombuffer(out, np.uint8).reshape(frames.shape)
    g = load(model)
    for i in range(6):
        assert abs(found[i].astype(int) - g(frames[i])).max() <= 1


def test_a_container_on_stdin_and_a_reader_that_goes_away(model, tmp_path):
    source = make_video(tmp_path / "in.mkv", frames=200)
    with source.open("rb") as file:
        process = command("infer", model, "-", "-", "--stats", tmp_path / "stats.json", stdin=file)
        assert len(process.stdout.read(HEIGHT * WIDTH * 3)) == HEIGHT * WIDTH * 3
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 0, err
    assert b"Broken" not in err and b"Traceback" not in err
    frames = json.loads((tmp_path / "stats.json").read_text())["frames"]
    assert 0 < frames["out"] < 200 and frames["abandoned"] > 0 == frames["failed"]
    assert frames["in"] == frames["out"] + frames["abandoned"]


def test_a_reader_that_made_the_pipe_nonblocking_gets_every_frame(model, tmp_path):
    source = make_video(tmp_path / "in.mkv", frames=20)  # more than a pipe holds
    read, write = os.pipe()
    os.set_blocking(write, False)
    with os.fdopen(read, "rb") as reader:
        process = command("infer", model, source, "-", stdout=write)
        os.close(write)
        assert len(reader.read()) == 20 * HEIGHT * WIDTH * 3
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


SLOW = """
import time
from tests.streaming.clips import Identity
from fastpix2pix.runtime.translator import Translator
from fastpix2pix.streaming.stream import Stream
class Slow(Identity):
    def translate(self, batch, first=0):
        time.sleep(0.03)
        return batch.clone()
report = Stream(Translator(Slow()), {source!r}, {sink!r}).run(lambda done, total: print(done, flush=True))
print("interrupted" if report.interrupted else "whole", report.frames["out"], flush=True)
"""


def start_slow(source, sink) -> subprocess.Popen:
    """A process that takes 30 ms a frame and says how many are done."""
    code = SLOW.format(source=str(source), sink=str(sink))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for(process: subprocess.Popen, frames: int) -> None:
    for line in process.stdout:
        if line.split()[0].isdecimal() and int(line) >= frames:
            return


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle_the_file_is_whole(tmp_path, number):
    source = make_video(tmp_path / "in.mp4", frames=300, sound=True)
    process = start_slow(source, tmp_path / "out.mp4")
    wait_for(process, 60)
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait(timeout=30) == 0
    assert "interrupted" in rest
    done = int(rest.split()[-1])
    with av.open(str(tmp_path / "out.mp4")) as opened:
        video = opened.streams.video[0]
        assert video.frames == done < 300  # in the index: the trailer is there
        assert len(list(opened.decode(video))) == done
    assert packets_of(tmp_path / "out.mp4", "audio")


def test_killed_in_the_middle_the_file_plays(tmp_path):
    source = make_video(tmp_path / "in.mp4", frames=300)
    process = start_slow(source, tmp_path / "out.mp4")
    wait_for(process, 150)
    process.kill()
    process.wait()
    found = stamps_of(tmp_path / "out.mp4")
    assert len(found) > 50
    assert found == stamps_of(source)[: len(found)]


def test_ctrl_c_while_a_pipe_brings_nothing(model, tmp_path):
    read, write = os.pipe()
    process = command("infer", model, "-", tmp_path / "out.mp4", stdin=read)
    while b"modes" not in process.stderr.readline():  # its own handlers are in place by then
        pass
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    os.close(write)
    assert process.returncode == 130, err
    assert b"Traceback" not in err and b"; interrupted" in err
    assert not (tmp_path / "out.mp4").exists()
