"""What training and translation are measured against, each written as plainly as its users would."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpix2pix.config import Modes, Train
from fastpix2pix.errors import EnvironmentFailed
from fastpix2pix.model import PatchGAN, Unet
from fastpix2pix.model.layers import MODULE_RULE
from fastpix2pix.training.graph import GraphedBody
from fastpix2pix.training.losses import gan_loss
from fastpix2pix.training.module_step import ModuleStep

if TYPE_CHECKING:
    from PIL import Image


class StandardStep(ModuleStep):
    """Eager, as the standard implementation trains: two networks, two Adams, one backward pass and one update after the
    other.

    fp32 in NCHW; with `channels_last` in that format, and in a half precision under autocast where the config says so.
    `read`: the four losses are read on the host after every step (`.item()`), which waits for the device.
    """

    def __init__(self, config: Train, device: torch.device, *, read: bool, channels_last: bool = False) -> None:
        super().__init__(config, device)
        assert self.discriminator is not None
        self.read = read
        for net in (self.generator, self.discriminator):
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            net.to(memory_format=memory_format)  # type: ignore[call-overload]

    def step(self, x: Tensor, y: Tensor, number: int, lr: float) -> Tensor:
        net_d = self.discriminator
        assert net_d is not None and self.adam_d is not None
        with self._autocast():
            fake = generator_nchw(self.generator, x)

        net_d.requires_grad_(True)
        self.adam_d.zero_grad()
        with self._autocast():
            d_fake = gan_loss(_discriminator(net_d, torch.cat((x, fake), 1).detach()), False)
            d_real = gan_loss(_discriminator(net_d, torch.cat((x, y), 1)), True)
        self.scaler.scale((d_fake + d_real) * 0.5).backward()
        self._rate(self.adam_d, lr)
        self.scaler.step(self.adam_d)

        net_d.requires_grad_(False)
        self.adam_g.zero_grad()
        with self._autocast():
            g_gan = gan_loss(_discriminator(net_d, torch.cat((x, fake), 1)), True)
            g_l1 = F.l1_loss(fake, y)
        self.scaler.scale(g_gan + self.config.lambda_l1 * g_l1).backward()
        self._rate(self.adam_g, lr)
        self.scaler.step(self.adam_g)
        self.scaler.update()

        if self.read:
            return torch.tensor([loss.item() for loss in (d_fake, d_real, g_gan, g_l1)])
        return torch.stack((d_fake, d_real, g_gan, g_l1)).detach()

    def _adam(self, net: nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(net.parameters(), lr=self.config.lr, betas=(self.config.beta1, self.config.beta2))

    def _rate(self, adam: torch.optim.Adam, lr: float) -> None:
        adam.param_groups[0]["lr"] = lr


def generator_nchw(net: Unet, x: Tensor, modes: Modes = MODULE_RULE) -> Tensor:
    """`Unet.forward` without its memory format."""
    h = x
    skips: list[Tensor] = []
    for block in net.down:
        h = block(F.leaky_relu(h, 0.2) if skips else h, modes)
        skips.append(h)
    h = F.relu(skips.pop())
    for number, block in enumerate(net.up):
        h = block(h, modes)
        if number + 1 < len(net.up):
            h = F.relu(torch.cat((skips.pop(), h), 1))
    return torch.tanh(h)


def _discriminator(net: PatchGAN, x: Tensor) -> Tensor:
    """`PatchGAN.forward` without its memory format."""
    h = net.blocks[0](x)
    for block in net.blocks[1:]:
        h = block(F.leaky_relu(h, 0.2))
    return h


class CompiledStep(ModuleStep):
    """The plain step (channels-last, fused Adam, autocast) with both networks under torch.compile."""

    def __init__(self, config: Train, device: torch.device, backend: str, mode: str | None = None) -> None:
        super().__init__(config, device)
        for net in (self.generator, self.discriminator):
            if net is not None:
                net.compile(backend=backend, mode=mode, dynamic=False, fullgraph=True)


class CompiledGraphStep(CompiledStep):
    """The same with all of the step, optimisers included, in one CUDA graph; the rate is a device tensor."""

    def __init__(self, config: Train, device: torch.device, backend: str) -> None:
        self.lr = torch.full((), config.lr, device=device)
        super().__init__(config, device, backend)
        self.graph = GraphedBody(self._body, required=True)

    def step(self, x: Tensor, y: Tensor, number: int, lr: float) -> Tensor:
        self.lr.fill_(lr)
        return self.graph(x, y, number)

    def _body(self, x: Tensor, y: Tensor, number: int) -> Tensor:
        return super().step(x, y, number, self.lr)  # type: ignore[arg-type]

    def _adam(self, net: nn.Module) -> torch.optim.Adam:
        betas = self.config.beta1, self.config.beta2
        return torch.optim.Adam(net.parameters(), lr=self.lr, betas=betas, fused=True, capturable=True)


class PlainPairs(torch.utils.data.Dataset):
    """A|B files through Pillow, one pair at a time, as the standard implementation loads them.

    Each half is resized to `load`, cropped to `crop` and flipped, A and B alike. `draw(i)` gives (y, x, flip).
    """

    def __init__(
        self, files: Sequence[Path], load: int, crop: int, draw: Callable[[int], tuple[int, int, bool]]
    ) -> None:
        self.files, self.load, self.crop, self.draw = files, load, crop, draw

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """(A, B), [3, crop, crop] fp32 in [-1, 1] each."""
        from PIL import Image  # here, because make gpu-check does without it

        with Image.open(self.files[i]) as file:
            both = file.convert("RGB")
        width, height = both.size
        a, b = both.crop((0, 0, width // 2, height)), both.crop((width // 2, 0, width, height))
        top, left, flip = self.draw(i)
        return self._tensor(a, top, left, flip), self._tensor(b, top, left, flip)

    def _tensor(self, image: Image.Image, top: int, left: int, flip: bool) -> Tensor:
        from PIL import Image

        image = image.resize((self.load, self.load), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + self.crop, top + self.crop))
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255).sub(0.5).div(0.5)


Translate = Callable[[Tensor], Tensor]  # [N, C, H, W] fp32 in [-1, 1] -> the same


def plain_translate(
    net: Unet,  # copied
    statistics: str,  # running; or image, which batch norm in training mode computes of one image
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Translate:
    """The generator called as a module, without dropout."""
    own = copy.deepcopy(net).to(device, dtype, memory_format=memory_format).eval()  # type: ignore[call-overload]
    if statistics == "image":
        for module in own.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()

    def translate(x: Tensor) -> Tensor:
        with torch.no_grad():
            return generator_nchw(own, x.to(dtype=dtype, memory_format=memory_format)).float()

    return translate


def graphed_translate(translate: Translate, x: Tensor) -> Translate:
    """A translation of batches like x as one CUDA graph; the input is copied in, the output overwritten."""
    given = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            translate(given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = translate(given)

    def replay(x: Tensor) -> Tensor:
        given.copy_(x)
        graph.replay()
        return y

    return replay


class _Plain(nn.Module):
    """`generator_nchw` as a module."""

    def __init__(self, net: Unet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return generator_nchw(self.net, x)


def onnx_translate(net: Unet, x: Tensor, provider: str) -> Translate:
    """The plain module in eval mode, exported by torch and run by ONNX Runtime with its defaults; arrays in and out."""
    import onnxruntime

    logger = logging.getLogger("torch.onnx._internal.exporter._registration")  # speaks of torchvision
    level, logger.level = logger.level, logging.ERROR
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(_Plain(copy.deepcopy(net).cpu().eval()), (x.cpu(),), dynamo=True, verbose=False)
    logger.level = level
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=[provider])
    if session.get_providers()[0] != provider:  # it goes to the CPU with a mere warning
        raise EnvironmentFailed(f"this ONNX Runtime has no {provider}: pip install onnxruntime-gpu")
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.cpu().numpy()})[0])

    return run
