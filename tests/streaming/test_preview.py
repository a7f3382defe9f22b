"""The preview page, as an HTTP client sees it."""

import http.client
import io
import json
import re
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from fastpix2pix.config import Infer, Stream
from fastpix2pix.errors import EnvironmentFailed
from fastpix2pix.runtime.translator import Translator
from fastpix2pix.streaming.preview import Pane, Preview
from fastpix2pix.streaming.routes import routes
from fastpix2pix.streaming.stream import translate
from tests.streaming.clips import HEIGHT, WIDTH, Identity, make_video, psnr, scene


class Inverse(Identity):
    """25 pictures a second at most."""

    def translate(self, batch, first=0):
        time.sleep(0.04)
        return -batch


@pytest.fixture
def address(tmp_path, capfd):
    """The address of the preview of a running stream, which is stopped at the end."""
    over = threading.Event()
    source = make_video(tmp_path / "in.mp4", frames=250)
    options = Stream(preview=0)
    pairs = routes([str(source)], "null:", Infer(), options)

    def run() -> None:
        translate(Translator(Inverse()), pairs, options, stop=over.is_set)

    thread = threading.Thread(target=run)
    thread.start()
    text = ""
    while not (found := re.search(r"preview: (\S+)", text)):
        time.sleep(0.05)
        text += capfd.readouterr().err
    yield found[1]
    over.set()
    thread.join(20)
    assert not thread.is_alive()


def ask(address: str, path: str | None = None, host: str | None = None, method: str = "GET"):
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    connection.request(method, path or f"{parts.path}?{parts.query}", headers={"Host": host or parts.netloc})
    return connection.getresponse()


def test_page_figures_and_pictures(address):
    token = urlsplit(address).query
    page = ask(address)
    text = page.read().decode()
    assert (
        address.startswith("http://127.0.0.1:")
        and page.status == 200
        and "in.mp4 \\u2192 null:" in text
        and "http" not in text.split("<script>")[0]
    )
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    pictures = ask(address, f"/pictures?stream=0&{token}")
    assert pictures.headers["Content-Type"] == "multipart/x-mixed-replace; boundary=frame"
    found = []
    for _ in range(3):
        assert pictures.readline() == b"--frame\r\n"
        headers = dict(line.decode().strip().split(": ") for line in iter(pictures.readline, b"\r\n"))
        found.append(np.asarray(Image.open(io.BytesIO(pictures.read(int(headers["Content-Length"]))))))
        assert pictures.readline() == b"\r\n"
    for both in found:
        assert both.shape == (HEIGHT, 2 * WIDTH, 3)
        input, output = both[:, :WIDTH], both[:, WIDTH:]
        assert psnr(255 - output, input) > 25  # of one and the same frame
        assert max(psnr(input, scene(n)) for n in range(250)) > 25
    assert not np.array_equal(found[0], found[2])
    figures = json.loads(ask(address, f"/figures?{token}").read())[0]
    assert float(figures["fps"]) > 1 and figures["latency"].endswith(" ms") and figures["frames"].endswith(" of 250")


def test_refusals(address):
    token = urlsplit(address).query
    port = urlsplit(address).port
    for path, host in (
        ("/", None),
        ("/?token=", None),
        ("/?token=guess", None),
        ("/figures?token=x", None),
        ("/pictures?stream=0", None),
        (f"/?{token}", "evil.example"),
        (f"/?{token}", f"evil.example:{port}"),
        (f"/?{token}", "127.0.0.1:1"),
    ):
        answer = ask(address, path, host)
        assert answer.status == 403, path
        assert token.encode() not in answer.read()
    for path in ("/nothing", "/pictures?stream=7", "/pictures?stream=-1", "/../preview.py"):
        assert ask(address, f"{path}{'&' if '?' in path else '?'}{token}").status == 404
    assert ask(address, f"/?{token}", f"localhost:{port}").status == 200
    assert ask(address, method="POST").status == 501


def test_a_port_in_use_is_named():
    first = Preview(0, [Pane("x")])
    with pytest.raises(EnvironmentFailed, match=rf"preview = {first.port}: .*in use; give another port, or 0"):
        Preview(first.port, [])
    first.close()


def test_names_of_streams_cannot_become_markup():
    preview = Preview(0, [Pane("</script><script>alert(1)</script>")])
    text = ask(preview.url).read().decode()
    assert text.count("</script>") == 1 and "alert(1)" in text
    preview.close()
