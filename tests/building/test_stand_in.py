"""What runs in place of an engine: the file's own graph, with the rounding that a GPU would do."""

import onnx
import pytest
import torch

from fastpix2pix.building.exportable import Exportable
from fastpix2pix.building.onnx_graph import export_onnx
from fastpix2pix.building.stand_in import stand_in
from fastpix2pix.config import Form, Modes
from fastpix2pix.errors import InputError
from fastpix2pix.runtime.onnx_engine import OnnxEngine


@pytest.mark.parametrize("precision, norm_stats", [("fp16", "image"), ("fp16", "running"), ("bf16", "image")])
def test_halves_round_as_torch_half_modules(exports, network, pictures, precision, norm_stats):
    """Its error against fp32 is the twin's, within a factor; alone, ONNX Runtime's fp16 is nearer to fp32."""
    net, modes, form = network(), Modes(norm_stats), Form(precision, 1, 32, 32)
    path = exports(form, modes).path
    x = pictures(16, 3, 32, 32)
    with torch.no_grad():
        wanted, twin = net(x, modes), Exportable(net, modes, form).eval()(x)
    run, name = stand_in(path)
    error, twins = ((y - wanted).abs().mean() for y in (run(x, 0), twin))
    assert 0.5 * twins <= error <= 2 * twins
    assert name == f"ONNX Runtime on the CPU, rounded to {precision} after every node"
    if precision == "bf16":
        with pytest.raises(InputError, match=r"cannot run it on cpu .*on a CPU run fp32, fp16 and int8"):
            OnnxEngine(path)
    else:
        alone = (OnnxEngine(path).translate(x) - wanted).abs().mean()
        assert alone < 0.95 * error


def test_fp32_runs_as_it_is(exports, pictures):
    path = exports(Form("fp32", 1, 32, 32)).path
    run, name = stand_in(path)
    x = pictures(2, 3, 32, 32)
    assert torch.equal(run(x, 0), OnnxEngine(path).translate(x))
    assert name == "ONNX Runtime on the CPU"


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_it_is_the_file_that_runs(exports, pictures, tmp_path, precision):
    """A weight changed in the file, not in the network, changes the picture."""
    given, path = exports(Form(precision, 1, 32, 32), Modes("running")).path, tmp_path / "x.onnx"
    x = pictures(1, 3, 32, 32)
    before = stand_in(given)[0](x, 0)
    model = onnx.load(given)
    last = next(i for i in model.graph.initializer if i.name == "up.4.weight")
    last.raw_data = bytes(len(last.raw_data))
    onnx.save(model, path)
    after = stand_in(path)[0](x, 0)
    assert before.std() > 0.1
    assert after.std(dim=(2, 3)).max() == 0  # only the last bias is left


def test_fp16_overflow_shows(network, pictures, tmp_path):
    """Activations beyond 65504 are infinite in the engine; in fp32 kernels they would pass."""
    net, path = network(norm="none"), tmp_path / "x.onnx"
    with torch.no_grad():
        net.down[1].conv.weight.mul_(1e4)
        net.down[2].conv.weight.mul_(1e4)
    export_onnx(net, Modes(), path, Form("fp16", 1, 32, 32), record={})
    x = pictures(1, 3, 32, 32)
    with torch.no_grad():
        assert net(x).isfinite().all()
    assert not stand_in(path)[0](x, 0).isfinite().all()
