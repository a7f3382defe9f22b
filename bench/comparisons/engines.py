"""One translated batch: every backend of the runtime against PyTorch called plainly.

All translate the same picture to within the gate's tolerance of the fp32 generator before they are timed.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from fastpix2pix.building.onnx_graph import export_onnx
from fastpix2pix.config import Form, Generator, Modes, Train
from fastpix2pix.errors import EnvironmentFailed
from fastpix2pix.model import Unet, build_generator
from fastpix2pix.runtime.engine import Engine, TorchEngine
from fastpix2pix.runtime.onnx_engine import OnnxEngine
from fastpix2pix.runtime.triton_engine import TritonEngine

from ..baselines import Translate, graphed_translate, onnx_translate, plain_translate
from ..comparison import Comparison, Make
from ..devices import Setting, synthetic_pairs
from ..report import Mismatch, Skipped
from ..roofline import FULL, HALF, Device, inference_work
from ..timing import WARM_UP, Run

PLAIN = "eager fp32 nchw"
MEAN = {"fp32": 1e-4, "bf16": 0.02, "fp16": 0.005}  # mean difference from the fp32 generator that passes, of [-1, 1]


def comparisons(at: Setting) -> Iterator[Comparison]:
    """Stored statistics at every batch size, the image's own at batch 1; on a CPU, the paper's generator at batch 1."""
    for batch in sorted({*at.batches, *((1, 2, 4, 8) if at.scale == "full" else ())}):
        yield _comparison(at, "running", batch)
    yield _comparison(at, "image", 1)
    if at.device.type != "cuda" and at.scale == "full":
        paper = at._replace(options={})
        for statistics in ("running", "image"):
            yield _comparison(paper, statistics, 1, ", unet_256")


def _comparison(at: Setting, statistics: str, batch: int, note: str = "") -> Comparison:
    config, half = at.config(batch), at.device.type == "cuda"
    fast = "fp16" if half else "fp32"
    modes = Modes(norm_stats=statistics)  # type: ignore[arg-type]
    made = partial(_checked, at, modes, batch)
    nhwc = torch.channels_last

    def plain(
        dtype: torch.dtype = torch.float32, memory_format: torch.memory_format = torch.contiguous_format
    ) -> Translate:
        return plain_translate(generator(config.generator), statistics, at.device, dtype, memory_format)

    def compiled(mode: str | None) -> Translate:
        torch._dynamo.reset()
        translate = plain(torch.float16 if half else torch.float32, nhwc)
        return torch.compile(translate, backend=at.compile_backend, mode=mode, dynamic=False)

    ways: dict[str, Make] = {
        PLAIN: partial(made, plain, "fp32"),
        "eager fp32 channels-last": partial(made, partial(plain, memory_format=nhwc), "fp32"),
        "torch engine fp32": partial(made, partial(_engine, TorchEngine, at, modes, "fp32"), "fp32"),
        f"ONNX engine {'' if not half else 'fp32'}".strip(): partial(made, partial(_onnx, at, modes, batch), "fp32"),
    }
    if statistics == "running" and batch == at.batches[0]:
        ways["ONNX Runtime, plain export"] = partial(made, partial(_plain_onnx, at, batch), "fp32")
    if half:
        ways["eager fp16 channels-last"] = partial(made, partial(plain, torch.float16, nhwc), fast)
        ways["eager fp16, CUDA graph"] = partial(made, partial(_graphed, at, batch, plain), fast)
        ways["torch engine bf16"] = partial(made, partial(_engine, TorchEngine, at, modes, "bf16"), "bf16")
        ways["Triton engine fp16"] = partial(made, partial(_engine, TritonEngine, at, modes, "fp16"), "fp16")
        ways["TensorRT engine fp16"] = partial(made, partial(_tensorrt, at, modes, batch), "fp16")
    ways[f"torch.compile {fast}"] = partial(made, partial(compiled, None), fast)
    if at.compile_backend == "inductor":
        ways[f"torch.compile {fast}, max-autotune"] = partial(made, partial(compiled, "max-autotune"), fast)

    def floor_ms(device: Device) -> float:
        return inference_work(config, batch, HALF if half else FULL).floor_ms(device)

    ours = "Triton engine fp16" if half else "ONNX engine"
    slow = frozenset(name for name in ways if name.startswith(("torch.compile", "TensorRT")))
    return Comparison(
        "engines", f"{statistics} batch {batch}{note}", ways, ours, PLAIN, batch, floor_ms=floor_ms, slow=slow
    )


@cache
def generator(config: Generator) -> Unet:
    """A generator whose outputs span most of [-1, 1] and whose running statistics are those of pictures."""
    torch.manual_seed(0)
    net = build_generator(config)
    last = net.get_parameter(f"up.{config.depth - 1}.conv.weight")
    with torch.no_grad():
        last.mul_(10)
        for _ in range(3):
            net(torch.rand(4, config.in_channels, 2 * config.multiple, 2 * config.multiple) * 2 - 1)
    return net.eval().requires_grad_(False)


def _checked(at: Setting, modes: Modes, batch: int, make: object, precision: str) -> Run:
    """Called as often as a graph needs to be captured, then compared with the module on a CPU."""
    config = at.config(batch)
    (x, _), (other, _) = synthetic_pairs(config, 2, at.device, seed=9)
    with torch.no_grad():
        wanted = generator(config.generator)(x.cpu(), modes)
    try:
        translate: Translate = make()  # type: ignore[operator]
    except EnvironmentFailed as error:
        raise Skipped(str(error)) from None
    for _ in range(WARM_UP if at.device.type == "cuda" else 1):
        translate(other)
        got = translate(x)
    mean = float((got.cpu().float() - wanted).abs().mean())
    if not mean <= MEAN[precision]:
        raise Mismatch(f"mean difference {mean:.3g} from the fp32 generator, allowed {MEAN[precision]:g}")
    return lambda: translate(x)


def _engine(kind: type[TorchEngine] | type[TritonEngine], at: Setting, modes: Modes, precision: str) -> Translate:
    engine: Engine = kind(copy.deepcopy(generator(at.config(1).generator)), modes, at.device, precision)
    return engine.translate


def _onnx(at: Setting, modes: Modes, batch: int) -> Translate:
    return OnnxEngine(_exported(at.config(1), modes), at.device).translate


@cache
def _exported(config: Train, modes: Modes) -> bytes:
    """One graph for every batch size."""
    size = config.data.crop_size
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(generator(config.generator), modes, file, Form(batch=None, height=size, width=size), record={})
        return file.read_bytes()


def _plain_onnx(at: Setting, batch: int) -> Translate:
    x = synthetic_pairs(at.config(batch), 1, at.device, seed=9)[0][0]
    provider = "CUDAExecutionProvider" if at.device.type == "cuda" else "CPUExecutionProvider"
    return onnx_translate(generator(at.config(batch).generator), x, provider)


def _graphed(at: Setting, batch: int, plain: object) -> Translate:
    x: Tensor = synthetic_pairs(at.config(batch), 1, at.device, seed=9)[0][0]
    return graphed_translate(plain(torch.float16, memory_format=torch.channels_last), x)  # type: ignore[operator]


def _tensorrt(at: Setting, modes: Modes, batch: int) -> Translate:
    """Built here, through the gate, by the library that knows this GPU."""
    from fastpix2pix.building.build import build
    from fastpix2pix.model.weights import save_network
    from fastpix2pix.runtime.tensorrt_engine import TensorRTEngine
    from fastpix2pix.runtime.tensorrt_library import target_for

    config = at.config(batch)
    target = target_for("sm{}{}".format(*torch.cuda.get_device_capability(at.device)))
    with tempfile.TemporaryDirectory() as folder:
        model, file = Path(folder) / "model.safetensors", Path(folder) / "model.engine"
        save_network(model, generator(config.generator), modes=modes)
        build(
            model, file, target=target, precision="fp16", size=str(config.data.crop_size), batch=str(batch),
            norm_stats=modes.norm_stats, gate_images=4, device=str(at.device),
        )  # fmt: skip
        return TensorRTEngine(file, at.device).translate
