"""The parts of a stream that need no video: geometry, clock, figures, batches, steadiness."""

import math
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import count, islice
from types import SimpleNamespace

import pytest
import torch

from fastpix2pix.config import Stream
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.streaming.connection import Attempts
from fastpix2pix.streaming.frame_runtime import Inside
from fastpix2pix.streaming.geometry import Geometry, check_fixed, fit_into
from fastpix2pix.streaming.live import Arrivals, Clock
from fastpix2pix.streaming.pipeline import Pipeline
from fastpix2pix.streaming.steady import Flicker, Steady
from fastpix2pix.streaming.timeline import Timeline
from fastpix2pix.streaming.timing import Timing
from fastpix2pix.streaming.together import Together

LONGEST = 300.0  # seconds
HD, WHOLE, SQUARE = (720, 1280), (0, 0, 720, 1280), (0, 0, 256, 256)


@pytest.mark.parametrize(
    ("source", "fit", "size", "even", "expected"),
    [
        # padded to 768x1280, cropped back
        (HD, "pad", None, True, (WHOLE, (768, 1280), (24, 0, 720, 1280), (24, 0, 720, 1280))),
        # fits as it is
        ((256, 256), "pad", None, True, (SQUARE, (256, 256), SQUARE, SQUARE)),
        # an odd size for an encoder of even ones: one row and column of the padding
        ((47, 63), "pad", None, True, ((0, 0, 47, 63), (256, 256), (104, 96, 47, 63), (104, 96, 48, 64))),
        ((47, 63), "pad", None, False, ((0, 0, 47, 63), (256, 256), (104, 96, 47, 63), (104, 96, 47, 63))),
        # scaled down into the size, with its aspect
        (HD, "pad", (256, 256), True, (WHOLE, (256, 256), (56, 0, 144, 256), (56, 0, 144, 256))),
        # never up
        ((100, 100), "pad", (256, 512), True, ((0, 0, 100, 100), (256, 256), (78, 78, 100, 100), (78, 78, 100, 100))),
        (HD, "resize", None, True, (WHOLE, (256, 256), SQUARE, SQUARE)),
        (HD, "crop", None, True, ((0, 280, 720, 720), (256, 256), SQUARE, SQUARE)),
        ((100, 50), "crop", (128, 256), True, ((37, 0, 25, 50), (256, 256), (64, 0, 128, 256), (64, 0, 128, 256))),
    ],
)  # fmt: skip
def test_fits(source, fit, size, even, expected):
    assert fit_into(source, fit, size, 256, 256, even) == Geometry(*expected)


def test_an_engine_of_some_sizes_refuses_others_before_anything_is_made():
    geometry = fit_into(HD, "pad", None, 256, 256, True)
    check_fixed(geometry, (720, 1280), {"sizes": []})
    check_fixed(geometry, (720, 1280), {"sizes": [[768, 1280]]})
    with pytest.raises(InputError, match=r"1280x768.*this engine takes 256x256; use fit = resize.*size = 768x1280"):
        check_fixed(geometry, (720, 1280), {"sizes": [[256, 256]]})
    check_fixed(geometry, (720, 1280), {"sizes": [[256, 256], [512, 512], [768, 1280]]})
    with pytest.raises(InputError, match=r"1280x768.*this engine takes 256x256 to 1024x512; use fit"):
        check_fixed(geometry, (720, 1280), {"sizes": [[256, 256], [512, 512], [512, 1024]]})


def test_quantiles_are_at_most_five_percent_high():
    timing = Timing()
    for i in range(1, 1001):
        timing.add(i / 1000)
    assert timing.count == 1000
    assert timing.total == pytest.approx(500.5)
    for q in (0.5, 0.95, 0.99):
        assert q <= timing.quantile(q) <= q * 1.05
    assert timing.quantile(1.0) == timing.longest == 1.0
    assert Timing().quantile(0.5) == 0.0


def test_files_play_at_their_own_speed_and_pictures_have_deadlines(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    clock = Clock(Fraction(1, 1000), Fraction(50), live=False)
    for pts in (0, 20, 100):
        clock.wait(pts, lambda: False)
        assert now[0] == pytest.approx(pts / 1000)
    assert clock.deadline(100) == pytest.approx(0.04)
    assert clock.deadline(0) == 0.0


def test_a_file_that_cannot_keep_up_begins_anew(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(Fraction(1, 1000), Fraction(25), live=False)
    clock.wait(0, lambda: False)
    now[0] = 5.0  # five seconds late: were it not for the new beginning, all that follow would be too
    clock.wait(40, lambda: False)
    assert clock.deadline(40) == pytest.approx(0.08)


def test_the_clock_of_a_live_source_is_set_by_the_earliest_arrival(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(Fraction(1, 1000), Fraction(25), live=True)
    now[0] = 10.5  # the first comes late
    clock.wait(0, lambda: False)
    now[0] = 10.3 + 0.04  # the second in time
    clock.wait(40, lambda: False)
    assert clock.deadline(40) == pytest.approx(0.08)
    now[0] = 10.3 + 0.08 + 0.05  # jitter is no lateness
    clock.wait(80, lambda: False)
    assert clock.deadline(80) == pytest.approx(0.03)
    now[0] = 99.0  # the source stood still: a new beginning
    clock.wait(120, lambda: False)
    assert clock.deadline(120) == pytest.approx(0.08)


def late_ones(arrivals: Iterable[tuple[float, float]], rate: float) -> list[int]:
    """Which pictures come too late, of (when it comes, its timestamp)."""
    allowance = 2 / rate
    begin = Arrivals(allowance)
    return [number for number, (now, stamp) in enumerate(arrivals) if now - stamp - begin(now, stamp) >= allowance]


@pytest.mark.parametrize("parts", [50e-6, -50e-6])
def test_a_source_whose_clock_runs_slow_or_fast_keeps_its_pictures(parts):
    """For eight hours, in which it goes wrong by 1.4 s."""
    stamps = (number / 5 for number in range(8 * 3600 * 5))
    assert late_ones(((100 + stamp * (1 + parts), stamp) for stamp in stamps), 5) == []


@pytest.mark.parametrize("rise", [0.07, 0.15, 0.9, 5.0])
def test_a_delay_that_stays_becomes_the_usual_one(rise):
    stamps = [number / 30 for number in range(600)]
    late = late_ones([(stamp + (rise if stamp >= 10 else 0), stamp) for stamp in stamps], 30)
    assert late == list(range(300, 300 + len(late))) and len(late) <= (31 if rise < 1 else 0)


def test_jitter_and_a_burst_make_no_picture_late_that_is_not():
    jitter = random.Random(0)
    stamps = [number / 30 for number in range(3000)]
    assert late_ones([(stamp + jitter.uniform(0, 0.06), stamp) for stamp in stamps], 30) == []
    # nothing for half a second, then all of it at once: the newest are in time
    late = late_ones([(max(stamp, 50.5) if stamp >= 50 else stamp, stamp) for stamp in stamps], 30)
    assert late == list(range(1500, 1514))
    # 29 of 30 are late, and stay so: the others show how early pictures can come
    late = late_ones([(stamp + (0.1 if number % 30 else 0), stamp) for number, stamp in enumerate(stamps)], 30)
    assert len(late) == 2900


def test_a_new_connection_sets_the_clock_anew(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(Fraction(1, 1000), Fraction(25), live=True)
    clock.wait(0, lambda: False)
    now[0] = 10.6  # its timestamps follow those of the last, however long it took
    clock.begin_anew()
    clock.wait(40, lambda: False)
    assert clock.deadline(40) == pytest.approx(0.08)


def test_timestamps_only_rise_and_go_on_after_a_restart():
    timeline = Timeline()

    def stamps(given: list) -> list[int]:
        return [timeline.stamp(pts, None, 40, 40) for pts in given]

    assert stamps([100, 140, 150, 150, 145, 400]) == [100, 140, 150, 151, 152, 400]  # as given, small faults mended
    assert stamps([None, 480]) == [440, 480]  # a missing stamp
    assert stamps([0, 40]) == [520, 560]  # a restart
    timeline.begin_anew()
    sound = SimpleNamespace(pts=8, dts=8, time_base=Fraction(1, 8000))
    assert not timeline.move(sound, Fraction(1, 1000))  # its place is not known yet
    assert stamps([7000, 7040]) == [600, 640]
    assert timeline.move(sound, Fraction(1, 1000))
    assert sound.pts == sound.dts == 8 - 6400 * 8


@pytest.mark.parametrize(
    ("given", "shown"),  # (pts, dts) of pictures 40 apart
    [
        # pts in the order of decoding: they are left at the first that falls back
        ([(40, 80), (160, 120), (120, 160), (200, 200), (80, 240), (320, 280)], [40, 160, 161, 200, 240, 280]),
        # no pts, and at the end no dts either
        ([(None, 80), (None, 120), (None, None), (None, None)], [80, 120, 160, 200]),
        # a new beginning: dts of the picture before it is of there
        ([(400, 400), (440, 0), (0, 40), (40, 80)], [400, 440, 480, 520]),
        # variable steps, and dts that say nothing
        ([(0, 0), (90, 1), (100, 2), (360, 2)], [0, 90, 100, 360]),
    ],
)
def test_which_of_two_timestamps_is_believed(given, shown):
    timeline = Timeline()
    assert [timeline.stamp(pts, dts, 0, 40) for pts, dts in given] == shown


def test_a_new_connection_is_no_fault_of_its_timestamps():
    timeline = Timeline()
    assert [timeline.stamp(pts, dts, 0, 40) for pts, dts in [(80, 0), (120, 40)]] == [80, 120]
    timeline.begin_anew()
    assert [timeline.stamp(pts, dts, 0, 40) for pts, dts in [(100, 60), (190, 60)]] == [160, 250]


def test_attempts_are_of_one_outage_and_their_pauses_bounded():
    attempts = Attempts(5000)
    assert [attempts.another() and attempts.pause() for _ in range(5000)] == [0.5, 1.0, 1.5] + [2.0] * 4997
    assert not attempts.another()
    for now in (100.0, 104.9):  # it breaks off again too soon
        attempts.picture(now)
    assert not attempts.another()
    attempts.picture(105.0)
    assert attempts.another() and attempts.made == 1
    attempts.picture(110.0)  # the first of the new connection
    assert attempts.another() and attempts.made == 2


@pytest.mark.parametrize(
    ("kind", "live", "given_up"),
    [
        ("url", True, "nothing for 10 s (timeout = 10)"),
        ("url", False, "nothing for 5 s after the stop"),
        ("pipe", True, "nothing for 5 s after the stop"),
        ("video", True, None),
        ("null", False, None),
    ],
)
def test_when_a_write_is_given_up(kind, live, given_up):
    sink = SimpleNamespace(kind=kind, name="the sink")
    pipeline = SimpleNamespace(sink=sink, _options=Stream(live=live), _writing=None, _stopped=None)
    Pipeline._check_sink(pipeline, 1e6, False)  # it is not at work
    pipeline._writing = 100.0
    said = []
    for seconds in (9.9, 10.1, 20.0, 24.9, 25.1):  # after it began; at 20 it is to stop
        try:
            Pipeline._check_sink(pipeline, 100 + seconds, seconds >= 20)
        except EnvironmentFailed as error:
            said.append((seconds, str(error)))
    if given_up is None:
        assert said == []
    else:
        assert said[0][0] == (10.1 if live and kind == "url" else 25.1)
        assert said[0][1].startswith(f"cannot write the sink: its reader took {given_up}")


def test_frames_go_in_while_others_come_out():
    """At whichever instruction of `take` the other thread runs."""
    inside, numbers = Inside(), count()
    for number in islice(numbers, 3):
        inside.put(number, str(number))

    def step(frame, event, _):
        frame.f_trace_opcodes = frame.f_code is Inside.take.__code__
        if event == "opcode":
            number = next(numbers)
            inside.put(number, str(number))
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        found = [inside.take(number) for number in (1, 2, 5)]
    finally:
        sys.settrace(before)
    assert found == ["1", "2", "5"] and len(inside) > 10


@pytest.fixture
def together():
    """`together(translate, most)`, closed in the end."""
    made: list[Together] = []

    def make(translate: Callable, most: int) -> Together:
        made.append(Together(translate, most))
        return made[-1]

    yield make
    for one in made:
        one.close()


def through(together: Together, picture: torch.Tensor) -> torch.Tensor:
    """The output of a picture."""
    outputs: list[torch.Tensor] = []
    together(picture.shape, lambda: picture, lambda x, y: outputs.append(y))
    (output,) = outputs
    return output


def of_several_streams(together: Together, pictures: list[torch.Tensor]) -> list:
    """What becomes of a picture each: an output, or an error."""
    results: list = [None] * len(pictures)

    def one(i: int) -> None:
        try:
            results[i] = through(together, pictures[i])
        except (ValueError, RuntimeError) as error:
            results[i] = error
        finally:
            together.leave()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(pictures))]
    for _ in pictures:
        together.join()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONGEST)
    return results


def test_pictures_of_several_streams_become_one_batch(together, monkeypatch):
    monkeypatch.setattr("fastpix2pix.streaming.together._WAIT", LONGEST)  # however slowly the threads start
    sizes, threads = [], set()

    def translate(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        threads.add(threading.current_thread())
        return batch + 1

    three = together(translate, 3)
    pictures = [torch.full((1, 3, 8, 8), float(i)) for i in range(3)]
    for _ in range(2):
        assert [float(r.mean()) for r in of_several_streams(three, pictures)] == [1.0, 2.0, 3.0]
    assert sizes == [3, 3] and three.batches == {3: 2}
    assert len(threads) == 1 and threading.current_thread() not in threads


def test_pictures_of_other_sizes_and_one_stream_alone_do_not_wait_for_ever(together):
    four = together(lambda batch: batch, 4)
    pictures = [torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 16, 8)]
    assert [r.shape for r in of_several_streams(four, pictures)] == [p.shape for p in pictures]
    four.join(), four.join()  # the other stream never brings one
    assert through(four, pictures[0]).shape == pictures[0].shape


def test_nobody_waits_for_a_stream_that_brings_nothing_or_longer_than_it_says(together, monkeypatch):
    monkeypatch.setattr("fastpix2pix.streaming.together._WAIT", LONGEST)
    two, brings = together(lambda batch: batch, 2), threading.Event()
    two.join(), two.join(brings.is_set)
    picture = torch.zeros(1, 3, 8, 8)
    assert through(two, picture).shape == picture.shape
    brings.set()
    two(picture.shape, lambda: picture, lambda x, y: None, 0.01)
    two.leave(brings.is_set)
    assert through(two, picture).shape == picture.shape and two.batches == {1: 3}


def test_a_failing_batch_fails_in_every_stream(together):
    def fail(batch: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    results = of_several_streams(together(fail, 2), [torch.zeros(1, 3, 8, 8)] * 2)
    assert [str(r) for r in results] == ["no", "no"]


def test_closing_leaves_nobody_waiting(together, monkeypatch):
    monkeypatch.setattr("fastpix2pix.streaming.together._WAIT", LONGEST)
    two = together(lambda batch: batch, 2)
    two.join()  # this one never brings a picture
    threading.Timer(0.2, two.close).start()
    (result,) = of_several_streams(two, [torch.zeros(1, 3, 8, 8)])
    assert str(result) == "closed"
    with pytest.raises(RuntimeError, match="closed"):
        through(two, torch.zeros(1, 3, 8, 8))


def test_smoothing_calms_what_stands_still_and_leaves_what_moves():
    generator = torch.Generator().manual_seed(0)
    still, flicker_off, flicker_on = torch.zeros(1, 3, 32, 32), Flicker(), Flicker()
    steady = Steady(0.8)
    for _ in range(12):
        output = torch.randn(1, 3, 32, 32, generator=generator) * 0.1
        flicker_off(still, output)
        flicker_on(still, steady(still, output))
    assert flicker_on.figures().flicker < 0.4 * flicker_off.figures().flicker
    steady, last = Steady(0.8), None
    for i in range(4):  # every pixel changes by far more than noise
        output = torch.full((1, 3, 32, 32), float(i))
        last = steady(torch.full((1, 3, 32, 32), (-1.0) ** i), output)
    assert torch.equal(last, output)


def test_flicker_is_the_change_of_the_output_beyond_that_of_the_input_where_it_stands_still():
    flicker = Flicker()
    for i in range(3):
        input = torch.zeros(1, 3, 16, 32)
        input[..., 16:] = i % 2  # the right half jumps and is left out
        input[..., :16] += i % 2 / 127.5  # the left half changes by one level
        output = torch.zeros(1, 3, 16, 32)
        output[..., :16] = i % 2 * 5 / 127.5
        output[..., 16:] = i % 2
        flicker(input, output)
    found = flicker.figures()
    assert found.frames == 3
    assert found.input == pytest.approx(1.0, abs=1e-3)
    assert found.output == pytest.approx(5.0, abs=1e-3)
    assert found.flicker == pytest.approx(4.0, abs=1e-3)
    assert 0.4 < found.still < 0.5  # less the pixels beside the moving half
    assert math.isnan(Flicker().figures().flicker) and Flicker().figures().as_dict()["flicker"] is None
