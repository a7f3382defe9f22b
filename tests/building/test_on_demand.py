import pytest
import torch

from fastpix2pix.building.on_demand import engine_for
from fastpix2pix.config import Generator, Modes
from fastpix2pix.errors import EnvironmentFailed
from fastpix2pix.model import build_generator
from fastpix2pix.model.weights import save_network
from fastpix2pix.runtime.engine_cache import EngineCache
from fastpix2pix.runtime.plan import read_plan
from fastpix2pix.runtime.tensorrt_library import target_for


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    save_network(tmp_path / "g.safetensors", build_generator(Generator(depth=5, ngf=8)).eval(), modes=Modes(), size=64)
    return tmp_path / "g.safetensors"


def test_on_the_cpu_it_says_what_else_runs(model, tmp_path):
    cache = EngineCache(tmp_path / "engines")
    with (
        pytest.raises(EnvironmentFailed, match=r"tensorrt-rtx: .*GPU.*Or use another backend: torch, onnx"),
        engine_for(model, "tensorrt-rtx", cache=cache, device="cpu"),
    ):
        pass
    assert not cache.folder.exists()


@pytest.mark.gpu
def test_an_engine_is_built_once_for_its_options(model, tmp_path):
    try:
        target = target_for("sm{}{}".format(*torch.cuda.get_device_capability()))
    except EnvironmentFailed as error:
        pytest.skip(str(error))
    cache, lines = EngineCache(tmp_path / "engines"), []

    def engine(**options):
        with engine_for(model, target, cache=cache, say=lines.append, **options) as path:
            return path

    first = engine()
    count = len(lines)
    plan = read_plan(first)
    assert plan.form.precision == "fp16"
    assert plan.sizes == ((32, 32), (64, 64), (1024, 1024))
    assert engine(device="cuda") == first
    assert len(lines) == count, "not built again"
    others = {engine(norm_stats="running"), engine(batch=4), engine(precision="fp32"), first}
    assert len(others) == 4
    with engine_for(model, target, cache=None) as path:
        assert path.is_file()
    assert not path.exists()
