"""When the step is captured, and, on a GPU, that replaying it is the same training."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from fastpix2pix.config import train_config
from fastpix2pix.data.images import to_unit
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.training import checkpoint
from fastpix2pix.training import graph as graph_module
from fastpix2pix.training.graph import WARM_UP, GraphedBody, eager_reasons, use_graph
from fastpix2pix.training.processes import Group
from fastpix2pix.training.step import build_state, describe_step

SMALL = {
    "depth": 5,
    "ngf": 8,
    "ndf": 8,
    "n_layers": 2,
    "crop_size": 32,
    "step": "explicit",
    "batch": 2,
    "device": "cuda",
}


def test_reasons_are_all_named():
    cpu, config = torch.device("cpu"), train_config(**SMALL, pool=5)
    assert eager_reasons(config, cpu) == ["the device is cpu", "pool = 5: the image pool decides on the host"]
    assert eager_reasons(train_config(), torch.device("cuda")) == ["step = auto: only the explicit step is captured"]
    assert not use_graph(config, cpu)
    with pytest.raises(EnvironmentFailed, match=r"the device is cpu.*image pool"):
        use_graph(train_config(**SMALL, pool=5, graph="on"), cpu)


def test_person_is_told_what_runs_and_why():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert describe_step(train_config(), cpu) == "step: modules"
    assert describe_step(train_config(**SMALL), cuda) == "step: explicit, as one CUDA graph"
    assert describe_step(train_config(**SMALL), cpu) == "step: explicit, eagerly (the device is cpu)"
    assert describe_step(train_config(**SMALL, graph="off"), cuda) == "step: explicit, eagerly (graph = off)"
    assert "image pool" in describe_step(train_config(**SMALL, pool=1), cuda)
    several = describe_step(train_config(**SMALL), cuda, processes=2)
    assert several == "step: explicit, as CUDA graphs, between which the processes average gradients"


def test_captured_where_it_can_be():
    cuda = torch.device("cuda")
    assert use_graph(train_config(**SMALL), cuda)
    assert not use_graph(train_config(**SMALL, graph="off"), cuda)
    assert not use_graph(train_config(**SMALL, pool=1), cuda)


def test_on_is_refused_before_anything_is_built():
    with pytest.raises(EnvironmentFailed, match=r"graph = on cannot be done"):
        build_state(train_config(**SMALL, graph="on"), torch.device("cpu"))


def test_steps_after_a_capture_that_broke_off_run_where_they_are_called(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    ran = []

    class Broken(GraphedBody):
        def _on_side_stream(self, x, y, number):
            ran.append("beside")

        def _capture(self, x, y):
            raise RuntimeError("not permitted")

    graphed = Broken(lambda x, y, number: ran.append("here"))
    for number in range(WARM_UP + 2):
        graphed(torch.ones(1), torch.ones(1), number)
    assert ran == ["beside"] * WARM_UP + ["here"] * 2
    graphed.forget()  # a checkpoint was loaded: captures still break off
    graphed(torch.ones(1), torch.ones(1), 0)
    assert ran[-1] == "here"
    assert capsys.readouterr().err.count("broke off: not permitted") == 1


def test_work_between_graphs_is_in_none(monkeypatch):
    """A stand-in records what the body does into graphs, and does it when they are replayed."""
    recorded: list[list] = []

    class Graph(list):
        def replay(self):
            for act in self:
                act()

    @contextmanager
    def capturing(graph, stream, pool):
        assert not recorded, "a recording within another"
        recorded.append(graph)
        yield
        recorded.clear()

    monkeypatch.setattr(graph_module, "capturing", capturing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("Stream", "graph_pool_handle", "synchronize", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    done = []

    def act(name: str) -> None:
        recorded[-1].append(partial(done.append, name)) if recorded else done.append(name)

    def body(x, y, number):
        act("gradients")
        graphed.between(partial(done.append, "sum"))
        act("update")
        return x

    graphed = GraphedBody(body)
    monkeypatch.setattr(graphed, "_on_side_stream", body)
    for number in range(WARM_UP + 2):
        assert graphed(torch.ones(1), torch.ones(1), number).shape == (1,)
        assert done == ["gradients", "sum", "update"] * (number + 1)
    assert [len(graph) for graph in graphed.graphs] == [1, 1] and not recorded
    graphed.forget()
    graphed(torch.ones(1), torch.ones(1), 0)
    assert done[-3:] == ["gradients", "sum", "update"] and not graphed.graphs


class Others(Group):
    """One of two processes; the other has twice its gradients, of the other sign: a sum left out goes the wrong way."""

    def reduce(self, flat):
        flat.mul_(-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}, {"objective": "l1"}])
def test_graphs_with_a_sum_between_them_are_the_eager_step(options):
    cuda, draws = torch.device("cuda"), torch.Generator().manual_seed(1)
    states = [build_state(train_config(**SMALL, **options, graph=g), cuda, group=Others(0, 2)) for g in ("on", "off")]
    weights = [
        [*state.generator.parameters(), *(state.discriminator or state.generator).parameters()] for state in states
    ]
    before = [p.detach().clone() for p in weights[0]]
    for number in range(WARM_UP + 4):
        x, y = (torch.rand(2, 3, 32, 32, generator=draws).mul(2).sub(1).to(cuda) for _ in "xy")
        x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
        found, expected = (state.step(x, y, number, 2e-4).clone() for state in states)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2)
    networks = 2 if states[0].discriminator else 1
    assert len(states[0].graph.graphs) == networks + 1
    with torch.no_grad():
        (apart, moved) = (
            torch.stack([(a - b).norm() for a, b in zip(weights[1], others, strict=True)]).norm()
            for others in (weights[0], before)
        )
    assert moved > 0 and apart <= 0.3 * moved


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}, {"precision": "fp32", "ema": 0.9}])
def test_replay_equals_eager_over_rate_changes_validation_and_resume(tmp_path, options):
    cuda = torch.device("cuda")
    draws = torch.Generator().manual_seed(1)
    steps = WARM_UP + 6
    data = [
        tuple(
            torch.randint(256, (2, 32, 32, 3), generator=draws, dtype=torch.uint8).permute(0, 3, 1, 2).to(cuda)
            for _ in "xy"
        )
        for _ in range(steps)
    ]
    rates = [2e-4] * (steps - 2) + [1e-4] * 2
    graphed, eager = (build_state(train_config(**SMALL, **options, graph=g), cuda) for g in ("on", "off"))
    for n, (x, y) in enumerate(data):
        if n == steps - 1:  # a validation pass and a checkpoint in between
            graphed.generator.eval()(to_unit(x))
            graphed.generator.train()
            checkpoint.save(tmp_path / str(n), graphed, {"step": n}, {}, {"step": n})
        found, expected = (s.step(x, y, n, rates[n]).clone() for s in (graphed, eager))
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2)
    assert len(graphed.graph.graphs) == 1
    with pytest.raises(InputError, match=r"torch.float32 \[2, 3, 32, 32\]: this step was captured with torch.uint8 \["):
        graphed.step(*(to_unit(t) for t in data[-1]), steps, rates[-1])
    assert graphed.counters.tolist() == eager.counters.tolist()
    resumed = build_state(train_config(**SMALL, **options, graph="on"), cuda)
    checkpoint.restore(tmp_path / str(steps - 1), resumed)
    checkpoint.restore(tmp_path / str(steps - 1), graphed)  # what was captured is not replayed after it
    assert not graphed.graph.graphs
    for state in (resumed, graphed):
        again = state.step(*data[-1], steps - 1, rates[-1])
        torch.testing.assert_close(again, found, rtol=2e-2, atol=1e-2)


@pytest.mark.gpu
def test_a_capture_that_breaks_off_is_said_or_refused(capsys):
    """What torch leaves of it is put right (capture.py)."""
    x = torch.ones(2, device="cuda")

    def body(x: torch.Tensor, y: torch.Tensor, number: int) -> torch.Tensor:
        return x * y * (x.sum().item() > 0)  # asks the device, which a capture cannot

    graphed, stream = GraphedBody(body), torch.cuda.current_stream()
    for number in range(WARM_UP + 3):
        assert graphed(x, number * x, number).tolist() == [number] * 2
    assert torch.cuda.current_stream() == stream
    assert capsys.readouterr().err.count("the capture as a CUDA graph broke off") == 1
    required = GraphedBody(body, required=True)
    for number in range(WARM_UP):
        required(x, x, number)
    with pytest.raises(EnvironmentFailed, match="graph = on: the capture broke off"):
        required(x, x, WARM_UP)
