"""CUDA graphs that are recorded, and what is left where that breaks off."""

import threading
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from fastpix2pix import capture
from fastpix2pix.capture import capturing


def test_a_capture_that_breaks_off_leaves_the_current_stream_as_it_was(monkeypatch):
    streams = ["default"]  # the current one is the last

    @contextmanager
    def stream(given):
        before = streams[-1]
        streams.append(given)
        try:
            yield
        finally:
            streams.append(before)

    @contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        streams.append(stream)  # and its end raises before it gives this one back
        yield
        raise RuntimeError("not permitted")

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    left = []
    monkeypatch.setattr(capture, "_put_right", lambda *given: left.append(given))
    side = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(RuntimeError, match="not permitted"), capturing(object(), side):
        assert streams[-1] is side
    assert streams[-1] == "default"
    assert left == [(side.device, (0, 7))]


def test_captures_of_several_threads_are_one_after_the_other(monkeypatch):
    inside, most, dropped = [], [], []

    class Memory:
        def __del__(self):
            dropped.append(len(inside))

    @contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        inside.append(1)
        yield
        most.append(len(inside))
        inside.pop()

    monkeypatch.setattr(torch.cuda, "stream", lambda given: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))

    def work():
        with capturing(object(), SimpleNamespace(device=torch.device("cuda:0"))):
            capture.let_go_later([Memory()])
            time.sleep(0.05)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 3
    assert dropped == [0] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["refused", "raised"])
def test_after_a_capture_that_breaks_off_memory_and_random_numbers_can_be_used(how):
    gpu, side = torch.device("cuda"), torch.cuda.Stream()
    torch.cuda.manual_seed(3)
    first, second = (torch.rand(4, device=gpu) for _ in range(2))
    torch.cuda.manual_seed(3)
    assert torch.equal(torch.rand(4, device=gpu), first)
    with pytest.raises(RuntimeError), capturing(torch.cuda.CUDAGraph(), torch.cuda.Stream()):
        x = torch.ones(1 << 20, device=gpu)
        if how == "raised":
            raise RuntimeError("while it was captured")
        x.sum().item()  # asks the device, which a capture cannot
    assert torch.equal(torch.rand(4, device=gpu), second)
    reserved = []
    for _ in range(20):
        x = torch.empty(1 << 22, device=gpu)
        x.record_stream(side)  # of an engine's stream: memory goes back when that is past it
        del x
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[2]
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, torch.cuda.Stream()):
        y = torch.rand(4, device=gpu)
    graph.replay()
    assert ((y >= 0) & (y < 1)).all()
