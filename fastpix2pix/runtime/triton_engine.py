"""The generator as the project's own kernels: half weights packed once, one CUDA graph per shape of a batch.

A block is one product with what is around it fused in, or two launches where its sum is split or it normalises. What an
up-block reads is written side by side by the blocks before it. Or `lazy`: a large map is written once, raw, and its
readers normalise and activate while loading, which moves fewer bytes and takes more instructions.
"""

from __future__ import annotations

import copy
import itertools
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..capture import capturing, let_go_later
from ..config import Modes
from ..device import resolve_precision
from ..errors import EnvironmentFailed, InputError
from ..kernels.bias_act import bias_act
from ..kernels.conv import conv, problem_of
from ..kernels.conv_plan import LAZY_ROWS, TILE_ROWS, ConvPlan, Problem
from ..kernels.dispatch import environment_reasons, overlap_reasons, overlapping
from ..kernels.finalise import finalise
from ..kernels.geometry import Geometry, Map, Source
from ..kernels.norm_act import Output, norm_act
from ..kernels.philox import Noise
from ..kernels.rows import Tiles
from ..model import Unet
from ..model.layers import Block, ResizeConv
from ..model.unet import check_modes
from ..tuning.cache import PlanCache
from ..tuning.products import measured_choice, measured_ways
from .engine import Layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_GRAPHS = 8  # shapes of a batch kept


class _Vectors(NamedTuple):
    """Of a normalisation that is not folded, [K] fp32 each."""

    gamma: Tensor | None = None
    beta: Tensor | None = None
    mean: Tensor | None = None  # running statistics
    var: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """One block, ready to run: what is constant is folded into the kernel and the bias."""

    w: Tensor  # kernel in the compute dtype, channels-last in memory
    geometry: Geometry
    enlarge: bool  # nearest 2x before the product
    bias: Tensor | None  # [K] fp32
    activation: str
    norm: str  # none, image, or running where dropout stands between it and the activation
    vectors: _Vectors
    noise: Noise | None

    @property
    def channels(self) -> int:
        """Of its output."""
        return self.geometry.forward().channels(tuple(self.w.shape))[1]

    def counting(self, counters: Tensor) -> Layer:
        """Drawing its noise from these counters."""
        return replace(self, noise=self.noise and self.noise._replace(counters=counters))


def not_supported_reasons(device: torch.device) -> list[str]:
    """Why the kernels cannot run on a device here."""
    return environment_reasons(device.type)


class TritonEngine:
    """The generator in Triton kernels; `net` is not changed and not kept.

    Raises EnvironmentFailed where Triton cannot run on the device; impl="reference" runs the kernels' twins anywhere.
    """

    layout: Layout = "nhwc"

    def __init__(
        self,
        net: Unet,
        modes: Modes,
        device: torch.device | None = None,
        precision: str = "auto",
        *,
        impl: str = "triton",
        graph: bool = True,  # capture on a GPU
        choose: Callable[[Problem], ConvPlan] | None = None,  # default: as `fastpix2pix tune` measured, else static
        overlap: bool | None = None,  # kernels begin while those before them end; default: as measured, else not
        lazy: bool | None = None,  # readers of large maps normalise them; default: as measured, else not
    ) -> None:
        check_modes(net.config, modes)
        self.device = device or torch.device("cpu")
        if impl == "triton" and (reasons := not_supported_reasons(self.device)):
            raise EnvironmentFailed(f"backend = triton cannot run: {'; '.join(reasons)}; use backend = torch")
        self.precision = resolve_precision(precision, self.device)
        self.modes = modes
        self.in_channels, self.out_channels = net.config.in_channels, net.config.out_channels
        self.multiple = net.config.multiple
        self._skips = net.config.kind == "unet"
        self._dtype, self._impl = DTYPES[self.precision], impl
        cache = PlanCache(self.device)
        self._choose = choose or measured_choice(cache, self.precision)
        ways = measured_ways(cache, self.precision)
        self.overlap = ways.overlap if overlap is None else overlap
        self.lazy = ways.lazy if lazy is None else lazy
        if self.overlap and (reasons := overlap_reasons(self.device)):
            raise EnvironmentFailed(f"overlap = True: {'; '.join(reasons)}")
        self._counters = torch.tensor([modes.seed, int(modes.noise == "random"), 0], device=self.device)
        self._graphs_on = graph and self.device.type == "cuda"
        last = net.config.depth - 1
        self._down = [self._layer(b, "leaky" if i < last else "relu") for i, b in enumerate(_blocks(net.down))]
        self._up = [self._layer(b, "relu" if i < last else "tanh") for i, b in enumerate(_blocks(net.up))]
        self._blocks_of_pixels = self._up[-1].geometry.transposed
        if self._blocks_of_pixels:
            self._up[-1] = _as_convolution(self._up[-1])
        self._take_memory()

    def _take_memory(self) -> None:
        self._pool: list[Any] = []  # one torch.cuda.MemPool, where graphs are captured
        if self._graphs_on:
            with torch.cuda.device(self.device):  # a pool is of the current one
                self._pool.append(torch.cuda.MemPool())
            weakref.finalize(self, let_go_later, self._pool)
        self._captured: dict[Map, _Captured] = {}
        self._alone = threading.Lock()  # a graph has one input and one output, whichever thread calls

    @torch.no_grad()
    def translate(
        self,
        batch: Tensor,  # [N, in_channels, H, W] float32 in [-1, 1], channels-last
        first: int = 0,  # running number of the first image
    ) -> Tensor:
        """[N, out_channels, H, W] float32 in [-1, 1], channels-last."""
        n, _, h, w = batch.shape
        output = torch.empty(n, h, w, self.out_channels, device=self.device).permute(0, 3, 1, 2)
        self._run(batch, output, first)
        return output

    @torch.no_grad()
    def enqueue(
        self,
        input: Tensor,  # [N, in_channels, H, W] float32 in [-1, 1] on `device`, any memory format
        output: Tensor,  # [N, out_channels, H, W] float32; written
        stream: torch.cuda.Stream | None = None,
        first: int = 0,  # running number of the first image
    ) -> None:
        """One call on the caller's buffers and stream.

        Can be captured in a CUDA graph after it ran at the same size; the engine owns the memory between its layers, so
        such graphs run one after the other (an engine `apart` has its own), and `first` is part of them.
        """
        with torch.cuda.stream(stream):  # None: as it is
            self._run(input, output, first)

    def apart(self) -> TritonEngine:
        """Graphs, memory and counters of its own; the weights are this engine's."""
        other = copy.copy(self)
        other._counters = self._counters.clone()
        other._down, other._up = (
            [layer.counting(other._counters) for layer in layers] for layers in (self._down, self._up)
        )
        other._take_memory()
        return other

    def describe(self) -> dict[str, Any]:
        """Backend, device (with the GPU's name) and precision."""
        described = {"backend": "triton", "device": str(self.device), "precision": self.precision}
        if self.device.type == "cuda":
            described["gpu"] = torch.cuda.get_device_name(self.device)
        return described

    def _run(self, input: Tensor, output: Tensor, first: int) -> None:
        self._check(input, output)
        others = bool(self._pool) and torch.cuda.is_current_stream_capturing()
        # who records has locked out all others: to wait here for one of them would be for ever
        with nullcontext() if others else self._alone:
            self._write(input, output, first)

    def _write(self, input: Tensor, output: Tensor, first: int) -> None:
        if self.modes.noise == "random":
            self._counters[2].fill_(first)
        n, _, h, w = input.shape
        size = Map(n, h, w)
        if not self._pool:
            y = self._forward(self._rows(input), size)
        elif torch.cuda.is_current_stream_capturing():  # somebody else's graph: it records the kernels themselves
            with torch.cuda.use_mem_pool(*self._pool):
                y = self._forward(self._rows(input), size)
        else:
            y = self._graph(size, input)(input)
        if self._blocks_of_pixels:  # [n, h / 2, w / 2, 2, 2, C]
            blocks = output.unflatten(3, (w // 2, 2)).unflatten(2, (h // 2, 2))  # [n, C, h / 2, 2, w / 2, 2]
            blocks.copy_(y.view(n, h // 2, w // 2, 2, 2, -1).permute(0, 5, 1, 3, 2, 4))
        else:
            output.copy_(y.view(n, h, w, -1).permute(0, 3, 1, 2))

    def _check(self, input: Tensor, output: Tensor) -> None:
        n, channels, *sides = input.shape
        wanted = (n, self.out_channels, *sides)
        if channels != self.in_channels or not sides or any(side < 1 or side % self.multiple for side in sides):
            raise InputError(
                f"input {list(input.shape)}: [N, {self.in_channels}, H, W] with multiples of {self.multiple} is taken"
            )
        if tuple(output.shape) != wanted:
            raise InputError(f"output {list(output.shape)} for input {list(input.shape)}: {list(wanted)} is written")

    def _rows(self, x: Tensor) -> Tensor:
        """[N, C, H, W] float32 as rows [N * H * W, C] in the compute dtype."""
        return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).to(self._dtype)

    def _graph(self, size: Map, input: Tensor) -> _Captured:
        """The graph of this shape, captured at its first use."""
        if size not in self._captured:
            while len(self._captured) >= _GRAPHS:
                del self._captured[next(iter(self._captured))]
            self._captured[size] = _Captured(lambda x: self._forward(x, size), self._rows(input))
        return self._captured[size]

    def _forward(
        self,
        x: Tensor,  # [N * H * W, in_channels] compute dtype
        size: Map,
    ) -> Tensor:  # [N * H * W, out_channels], or [N * H * W / 4, 4 * out_channels] where pixels come in blocks
        left: list[Source] = []  # what the up-block of a level finds on its left, outermost first
        a, last = Source(x.contiguous()), len(self._down) - 1
        with overlapping(self.overlap):
            for level, layer in enumerate(self._down):
                skip = self._skips and level < last
                joined = self._joined(layer, size, x) if skip and not self.lazy else None
                second = None if joined is None else Output(joined[:, : layer.channels], "relu")
                a, size = self._apply(layer, [a], size, second=second)
                if skip:
                    left.append(a if joined is None else Source(joined))
            for number, layer in enumerate(self._up):
                beside = left.pop() if self._skips and number else None
                if beside is None or not self.lazy:  # `a` is in its half of `joined`
                    sources = [a if beside is None else beside]
                else:  # relu(leaky(z)) = relu(z): the skip is read as it lies, whether raw or activated
                    sources = [beside._replace(activation="relu"), a]
                into = left[-1].rows[:, -layer.channels :] if left and not self.lazy else None
                a, size = self._apply(layer, sources, size, into=into)
        return a.rows

    def _joined(self, layer: Layer, size: Map, like: Tensor) -> Tensor:  # [M, 2 * its channels]
        """The two inputs of the up-block that a down-block's output goes to, side by side."""
        height, width = layer.geometry.output(size.height), layer.geometry.output(size.width)
        return like.new_empty(size.images * height * width, 2 * layer.channels)

    def _apply(
        self,
        layer: Layer,
        sources: list[Source],
        size: Map,
        *,
        into: Tensor | None = None,  # [M, K] where the activated output goes; default: memory of its own
        second: Output | None = None,  # a second one
    ) -> tuple[Source, Map]:
        """One block: its activated output, or the raw one with what its readers apply."""
        if layer.enlarge:
            sources, size = [_enlarged(sources, size)], Map(size.images, 2 * size.height, 2 * size.width)
        geometry, gather, channels = layer.geometry, layer.geometry.forward(), layer.channels
        gamma, beta, mean, var = layer.vectors
        out = Map(size.images, geometry.output(size.height), geometry.output(size.width))
        per_image = out.rows // size.images
        fused = layer.norm == "image" and per_image // gather.parities**2 >= TILE_ROWS
        groups = size.images if fused or any(source.scale is not None for source in sources) else 1
        plan = self._choose(problem_of(gather, size, out, groups, sources, channels))
        plain = layer.norm == "none"
        more = [] if second is None else [second]
        raw = sources[0].rows.new_empty(out.rows, channels)
        y = raw if into is None or not plain else into
        product = conv(
            sources, layer.w, geometry, size, y,
            bias=layer.bias if plain else None,
            activation=layer.activation if plain else "none",
            second=second if plain else None,
            groups=groups,
            statistics=fused and plan.splits == 1,
            partials=layer.norm != "running",
            plan=plan,
            impl=self._impl,
        )  # fmt: skip
        if plain and product.partials is None:
            return Source(y), out
        if self.lazy and product.tiles is not None and layer.noise is None and per_image >= LAZY_ROWS:
            scale = finalise(product.tiles, gamma, beta, rows=per_image, impl=self._impl)
            return Source(raw, layer.activation, scale.scale, scale.shift), out
        z = torch.empty_like(raw) if into is None else into
        outputs = [Output(z, layer.activation), *more]
        if plain:
            bias_act(raw, layer.bias, outputs, partials=product.partials, impl=self._impl)
            return Source(z), out
        tiles, groups = product.tiles, size.images
        if layer.norm == "running":
            assert mean is not None and var is not None
            tiles, groups = Tiles(mean[None, None], var[None, None] * out.rows, out.rows), 1
        norm_act(
            raw, gamma, beta, outputs,
            groups=groups, images=size.images, noise=layer.noise, tiles=tiles, partials=product.partials,
            impl=self._impl,
        )  # fmt: skip
        return Source(z), out

    def _layer(self, block: Block, activation: str) -> Layer:
        """Fold what is constant: running statistics into kernel and bias, unless dropout follows them."""
        found, norm = block.conv, block.norm
        w = found.weight.detach().to(self.device, torch.float32, copy=True)
        bias = None if found.bias is None else found.bias.detach().to(self.device, torch.float32, copy=True)
        noise = None
        if block.dropout is not None and self.modes.noise != "off":
            noise = Noise(self._counters, block.dropout.block, self.modes.noise == "random")
        kind, vectors = "none", _Vectors()
        if isinstance(norm, _BatchNorm):
            kind = self.modes.norm_stats
            given = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            gamma, beta, mean, var = (
                v.detach().to(self.device, torch.float32, copy=True) for v in given if v is not None
            )
            mean = mean if bias is None else mean - bias
            vectors = _Vectors(gamma, beta, mean, var)
            if kind == "running" and noise is None:
                scale = gamma * torch.rsqrt(var + norm.eps)
                axis = 1 if isinstance(found, nn.ConvTranspose2d) else 0
                w = w * scale.view([-1 if d == axis else 1 for d in range(4)])
                kind, vectors, bias = "none", _Vectors(), beta - mean * scale
        elif not isinstance(norm, nn.Identity):
            kind = "image"  # instance norm
        if kind != "none":
            bias = None  # its own statistics take it out again, and the running mean has it
        half = w.to(self._dtype).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        stride, padding = found.stride[0], int(found.padding[0])
        geometry = Geometry(half.shape[2], stride, padding, isinstance(found, nn.ConvTranspose2d))
        return Layer(half, geometry, isinstance(found, ResizeConv), bias, activation, kind, vectors, noise)


def _as_convolution(layer: Layer) -> Layer:
    """A transposed 4x4 layer of few channels as one 3x3 convolution to the four pixels of a 2x2 block, row by row.

    Exactly the same sums, and no pixel of the input is read and activated for each parity and tap anew.
    """
    w, bias = layer.w, layer.bias
    inner, channels, *_ = w.shape
    found = w.new_zeros(2, 2, channels, inner, 3, 3)
    for ph, pw, th, tw in itertools.product(range(2), repeat=4):  # the taps of a parity (kernels/geometry.py)
        found[ph, pw, :, :, ph + th, pw + tw] = w[:, :, 3 - ph - 2 * th, 3 - pw - 2 * tw].T
    found = found.view(4 * channels, inner, 3, 3).contiguous(memory_format=torch.channels_last)
    return replace(layer, w=found, geometry=Geometry(3, 1, 1), bias=None if bias is None else bias.repeat(4))


class _Captured:
    """A function of one tensor as a CUDA graph with an input and an output of its own."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.x = x.clone()
        with torch.cuda.device(x.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles every kernel
                function(self.x)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with capturing(self.graph, stream):
                self.y = function(self.x)

    def __call__(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        self.x.view(pixels.shape).copy_(pixels)
        self.graph.replay()
        return self.y


def _enlarged(sources: list[Source], size: Map) -> Source:
    """Nearest 2x of all sources side by side, in plain torch."""
    x = torch.cat([source.value() for source in sources], 1).view(*size, -1)
    return Source(x.repeat_interleave(2, 1).repeat_interleave(2, 2).view(4 * size.rows, -1))


def _blocks(modules: nn.ModuleList) -> list[Block]:
    return [block for block in modules if isinstance(block, Block)]
