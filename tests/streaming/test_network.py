"""Sources over a network, from a server of our own on the loopback: stalls, passwords, what playlists may name."""

import base64
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import av
import pytest

from fastpix2pix import cli
from fastpix2pix.config import Infer, Stream
from fastpix2pix.errors import EnvironmentFailed
from fastpix2pix.streaming.live import Clock
from fastpix2pix.streaming.routes import routes
from fastpix2pix.streaming.sources import source_of
from fastpix2pix.streaming.stream import Stream as Video
from fastpix2pix.streaming.stream import translate
from tests.streaming.clips import FRAMES, make_video, packets_of, stamps_of

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 300.0  # seconds
LONG = 500  # pictures
Answer = Callable[[BaseHTTPRequestHandler, int], None]  # (request, number of the request)


@pytest.fixture
def server():
    """`server(answer)` -> address of a server that answers so."""
    opened, over = [], threading.Event()

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            count = 0

            def do_GET(self) -> None:
                number, Handler.count = Handler.count, Handler.count + 1
                self.over = over
                with suppress(OSError):
                    answer(self, number)

            def log_message(self, *rest) -> None:
                pass

        made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        made.daemon_threads = True
        opened.append(made)
        threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
        return f"127.0.0.1:{made.server_address[1]}"

    yield start
    over.set()
    for one in opened:
        one.shutdown()
        one.server_close()


def send(request: BaseHTTPRequestHandler, body: bytes, length: int | None = None) -> None:
    request.send_response(200)
    request.send_header("Content-Type", "video/mp2t")
    request.send_header("Content-Length", str(length or len(body)))
    request.end_headers()
    request.wfile.write(body)
    request.wfile.flush()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> bytes:
    return make_video(tmp_path_factory.mktemp("clip") / "in.ts", frames=FRAMES, sound=True).read_bytes()


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory) -> bytes:
    """Longer than what FFmpeg reads before it gives a picture."""
    return make_video(tmp_path_factory.mktemp("clip") / "long.ts", frames=LONG).read_bytes()


def test_a_video_by_http_with_a_password_that_is_never_shown(server, model, clip, tmp_path, capsys):
    asked = []

    def answer(request, number):
        asked.append(request.headers.get("Authorization"))
        if asked[-1] is None:
            request.send_response(401)
            request.send_header("WWW-Authenticate", 'Basic realm="x"')
            request.end_headers()
        else:
            send(request, clip)

    url = f"http://user:secret@{server(answer)}/in.ts"
    assert cli.main(["infer", str(model), url, str(tmp_path / "out.mp4"), "--stats", "-"]) == 0
    out, err = capsys.readouterr()
    assert "secret" not in out + err and "user:***@127.0.0.1" in out and "user:***@" in err
    assert "Basic " + base64.b64encode(b"user:secret").decode() in asked
    assert len(stamps_of(tmp_path / "out.mp4")) == FRAMES


def test_what_cannot_be_opened_is_named_without_the_password(server, model, tmp_path, capsys):
    closed = "127.0.0.1:9"
    missing = server(lambda request, number: request.send_error(404))
    for host, says in ((closed, "Connection refused"), (missing, "404")):
        line = ["infer", str(model), f"http://user:secret@{host}/x.ts", str(tmp_path / "out.mp4")]
        assert cli.main(line) == 3
        err = capsys.readouterr().err
        assert f"user:***@{host}/x.ts: cannot be opened: " in err and says in err and "secret" not in err
    assert not (tmp_path / "out.mp4").exists()


def test_a_stall_is_waited_for_without_work(server, identity, long_clip):
    """After the first pictures: in what FFmpeg reads to find out what it has, nothing is lost by waiting."""
    shown, worked = threading.Event(), []

    def answer(request, number):
        send(request, long_clip[: len(long_clip) // 2], len(long_clip))
        assert shown.wait(LONGEST)
        time.sleep(0.5)  # until all that came is through
        start = time.process_time()
        time.sleep(2.0)
        worked.append(time.process_time() - start)
        request.wfile.write(long_clip[len(long_clip) // 2 :])

    report = Video(identity, f"http://{server(answer)}/in.ts", "null:", timeout=20.0).run(lambda *_: shown.set())
    assert report.frames["out"] == LONG and report.reconnects == 0
    assert worked[0] < 0.5


def test_a_stall_does_not_keep_it_from_stopping(server, identity, long_clip):
    shown = threading.Event()

    def answer(request, number):
        send(request, long_clip[: len(long_clip) // 2], len(long_clip))
        request.over.wait(LONGEST)

    options = Stream(timeout=LONGEST)
    pairs = routes([f"http://{server(answer)}/in.ts"], "null:", Infer(), options)
    start = time.monotonic()
    stop, progress = shown.is_set, lambda *_: threading.Timer(0.3, shown.set).start()
    (report,) = translate(identity, pairs, options, stop=stop, progress=progress).streams
    assert report.interrupted and 0 < report.frames["out"] < LONG and time.monotonic() - start < 5


def test_a_source_that_is_joined_between_two_key_frames(server, identity, long_clip, tmp_path):
    """One comes every 250 pictures, so that the first 230 cannot be decoded; that is no fault."""
    (tmp_path / "in.ts").write_bytes(long_clip)
    with av.open(str(tmp_path / "in.ts")) as opened:
        begin = [packet.pos for packet in opened.demux(video=0)][20]
    address = server(lambda request, number: send(request, long_clip[begin:]))
    report = Video(identity, f"http://{address}/in.ts", "null:").run()
    assert report.frames["out"] == LONG - 250 and report.frames["broken"] == 0


def test_a_source_that_never_gives_a_key_frame_is_given_up(server, identity, long_clip, tmp_path):
    (tmp_path / "in.ts").write_bytes(long_clip)
    with av.open(str(tmp_path / "in.ts")) as opened:
        places = [packet.pos for packet in opened.demux(video=0)]

    def answer(request, number):
        send(request, long_clip[places[20] : places[200]], len(long_clip))
        for begin, end in pairwise(places[200:240]):
            time.sleep(0.05)
            request.wfile.write(long_clip[begin:end])

    with pytest.raises(EnvironmentFailed, match=r"in\.ts: no picture could be decoded for 0\.7 s, and opening"):
        Video(identity, f"http://{server(answer)}/in.ts", "null:", timeout=0.7, reconnects=0).run()


def test_attempts_are_counted_for_each_outage(server, identity, clip, tmp_path, monkeypatch):
    monkeypatch.setattr("fastpix2pix.streaming.connection._SETTLED", 0.0)

    def answer(request, number):
        if number > 3:
            return request.send_error(503)
        send(request, clip[: len(clip) // 2], len(clip))  # and the connection breaks

    said = []
    monkeypatch.setattr("fastpix2pix.streaming.sources.say", said.append)
    address = server(answer)
    with pytest.raises(EnvironmentFailed, match=r"opening it again did not help \(timeout = 10, reconnects = 1\)"):
        Video(identity, f"http://{address}/in.ts", tmp_path / "out.mp4", reconnects=1).run()
    assert sum("opening it again (1 of 1)" in line for line in said) == 4


def test_a_source_that_stays_silent_is_opened_again_and_time_goes_on(server, identity, clip, tmp_path):
    def answer(request, number):
        send(request, clip if number else clip[: len(clip) // 2], len(clip))
        if not number:
            request.over.wait(30)

    report = Video(identity, f"http://{server(answer)}/in.ts", tmp_path / "out.mp4", timeout=2.0).run()
    assert report.reconnects == 1
    shown = stamps_of(tmp_path / "out.mp4")
    assert FRAMES < len(shown) == report.frames["out"] < 2 * FRAMES
    assert {b - a for a, b in pairwise(shown)} == {Fraction(1, 25)}
    heard = [stamp for stamp, _ in packets_of(tmp_path / "out.mp4", "audio")]
    assert heard == sorted(heard) and shown[-1] - heard[-1] < 0.5  # it goes on with the pictures


def test_a_source_that_never_comes_back_ends_the_file_in_order(server, identity, clip, tmp_path):
    def answer(request, number):
        if number:
            return request.send_error(503)
        send(request, clip[: len(clip) // 2], len(clip))
        request.over.wait(30)

    with pytest.raises(EnvironmentFailed, match=r"nothing came for 2 s.*\(timeout = 2, reconnects = 1\)"):
        Video(identity, f"http://{server(answer)}/in.ts", tmp_path / "out.mp4", timeout=2.0, reconnects=1).run()
    assert 2 < len(stamps_of(tmp_path / "out.mp4")) < FRAMES


def test_of_several_streams_one_that_breaks_off_is_named_at_once_and_the_others_go_on(server, identity, clip, tmp_path):
    named = threading.Event()

    def breaks_off(request, number):
        if number:
            return request.send_error(503)
        send(request, clip[: len(clip) // 2], len(clip))

    def goes_on(request, number):
        send(request, clip[: len(clip) // 2], len(clip))
        named.wait(LONGEST)
        request.wfile.write(clip[len(clip) // 2 :])

    def say(line: str) -> None:
        if re.search(r"^failed after \d+ frames: http.*a\.ts: .*; the others go on$", line):
            named.set()

    urls = [f"http://{server(breaks_off)}/a.ts", f"http://{server(goes_on)}/b.ts"]
    options = Stream(reconnects=1, timeout=LONGEST)
    one, other = translate(identity, routes(urls, f"{tmp_path}/out/", Infer(), options), options, say=say).streams
    assert named.is_set() and one.error and not other.error
    files = sorted((tmp_path / "out").iterdir())
    assert [len(stamps_of(file)) for file in files] == [one.frames["out"], FRAMES]
    assert 2 < one.frames["out"] < FRAMES == other.frames["out"]


def test_a_source_is_away_while_it_is_opened_again(server, clip):
    away = []

    def answer(request, number):
        away.append(source.away)
        send(request, clip[: len(clip) // 2] if number < 2 else clip, len(clip))

    source = source_of(f"http://{server(answer)}/in.ts", Stream())
    source.open(lambda: False)
    after = [source.away for _ in source]
    source.close()
    assert away == [False, True, True] and not any(after)


def test_a_recording_does_not_begin_again_for_ever(server, identity, tmp_path, monkeypatch):
    monkeypatch.setattr("fastpix2pix.streaming.connection._SETTLED", 0.0)
    begun, begin = [], Clock.begin_anew
    monkeypatch.setattr(Clock, "begin_anew", lambda clock: begun.append(clock) or begin(clock))
    recording = make_video(tmp_path / "in.mkv").read_bytes()
    address = server(lambda request, number: send(request, recording))
    report = Video(identity, f"http://{address}/in.mkv", "null:", live=True, reconnects=2).run()
    assert report.reconnects == 2 and report.frames["in"] == 3 * FRAMES
    assert len(begun) == 3  # each connection has a clock of its own


def test_a_source_that_never_answers(server, identity, tmp_path):
    address = server(lambda request, number: request.over.wait(30))
    start = time.monotonic()
    with pytest.raises(EnvironmentFailed, match=r"no answer within 0\.5 s \(timeout = 0\.5\)"):
        Video(identity, f"http://{address}/in.ts", tmp_path / "out.mp4", timeout=0.5).run()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "names", ["file://{path}", "{path}", "concat:{path}|{path}", "subfile,,start,0,end,0,,:{path}"]
)
def test_a_playlist_does_not_reach_files_of_this_machine(server, identity, tmp_path, names):
    local = make_video(tmp_path / "local.ts")
    segment = names.format(path=local)
    text = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{segment}\n#EXT-X-ENDLIST\n"

    def answer(request, number):
        if request.path.endswith(".m3u8"):
            request.send_response(200)
            request.send_header("Content-Type", "application/vnd.apple.mpegurl")
            request.end_headers()
            request.wfile.write(text.encode())
        else:
            request.send_error(404)

    with pytest.raises(Exception, match=r"x\.m3u8"):
        Video(identity, f"http://{server(answer)}/x.m3u8", tmp_path / "out.mp4", timeout=3.0).run()
    assert not (tmp_path / "out.mp4").exists()


def test_a_network_sink_receives_the_stream(identity, tmp_path):
    source = make_video(tmp_path / "in.mp4", sound=True)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        received = bytearray()

        def receive() -> None:
            connection, _ = listening.accept()
            with connection:
                while piece := connection.recv(65536):
                    received.extend(piece)

        receiver = threading.Thread(target=receive)
        receiver.start()
        Video(identity, source, f"tcp://127.0.0.1:{listening.getsockname()[1]}").run()
        receiver.join(10)
    (tmp_path / "received.ts").write_bytes(received)
    assert len(stamps_of(tmp_path / "received.ts")) == FRAMES
    assert packets_of(tmp_path / "received.ts", "audio")


@pytest.fixture
def deaf():
    """host:port that takes a connection and never reads from it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> str:
    """A video whose pictures are more than a network holds on the way, uncompressed."""
    return str(make_video(tmp_path_factory.mktemp("large") / "in.mp4", frames=25, size=(480, 640)))


@pytest.mark.parametrize(
    ("scheme", "what"), [("tcp", "Connection timed out|its reader .*"), ("http", r"its reader took nothing for 0\.5 s")]
)
def test_a_sink_that_takes_nothing_ends_its_live_stream_alone(identity, deaf, large, scheme, what):
    options = Stream(live=True, timeout=0.5, codec="rawvideo")
    pairs = [(large, f"{scheme}://{deaf}/"), (large, "null:")]
    one, other = translate(identity, pairs, options).streams
    assert re.fullmatch(rf"cannot write {scheme}://{deaf}/.*: ({what}).*", one.error)
    assert not other.error and other.frames["in"] == 25


def test_a_sink_that_takes_nothing_does_not_keep_it_from_stopping(identity, deaf, large, monkeypatch):
    monkeypatch.setattr("fastpix2pix.streaming.pipeline._GRACE", 0.3)
    options, start = Stream(codec="rawvideo"), time.monotonic()
    with pytest.raises(EnvironmentFailed, match=rf"write http://{deaf}/: its reader took nothing for 0\.3 s after"):
        translate(identity, [(large, f"http://{deaf}/")], options, stop=lambda: time.monotonic() - start > 1.0)


STUCK = """
from tests.streaming.clips import Identity
from fastpix2pix.runtime.translator import Translator
from fastpix2pix.streaming.stream import Stream
Stream(Translator(Identity()), {large!r}, "http://{deaf}/", live=True, timeout=0.5, codec="rawvideo").run()
"""


def test_the_process_ends_while_ffmpeg_still_writes(deaf, large):
    line = [sys.executable, "-c", STUCK.format(large=large, deaf=deaf)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("its reader took nothing for 0.5 s (timeout = 0.5)")


def test_a_network_sink_that_is_not_there(identity, tmp_path):
    source = make_video(tmp_path / "in.mp4", frames=2)
    with pytest.raises(
        EnvironmentFailed, match=r"cannot write tcp://user:\*\*\*@127\.0\.0\.1:9 \(libx264\): Connection refused"
    ):
        Video(identity, source, "tcp://user:secret@127.0.0.1:9").run()
