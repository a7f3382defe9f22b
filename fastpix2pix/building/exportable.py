"""The generator as a graph for one form: what is constant is folded, every type is written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import Form, Modes
from ..data.images import to_unit
from ..model import Unet
from ..model.layers import EPS, Block, ResizeConv, noise_mask
from ..model.unet import check_modes
from ..runtime.masks import mask_inputs, mask_shape

# of activations and weights; int8 and fp8 are quantised fp16 graphs
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float16,
    "fp8": torch.float16,
}


class Exportable(nn.Module):
    """A generator in one pair of modes and one form; the same function as `net` up to rounding. Copies its weights.

    - Running statistics are folded into the convolutions in fp32, before anything is rounded: no norm is left. Image
      statistics are an affine instance norm in fp32 between two casts.
    - The rectified skip is taken from the leaky activation (relu(leaky(z)) = relu(z)), so that both activations can
      be fused into the convolution before them.
    - Fixed masks are constants where the size is fixed; all others are inputs (runtime/masks.py).
    - tanh and everything about pixels is fp32.
    """

    def __init__(self, net: Unet, modes: Modes, form: Form) -> None:
        check_modes(net.config, modes)
        super().__init__()
        self.dtype = DTYPES[form.precision]
        self.skips, self.uint8 = net.config.kind == "unet", form.pixels == "uint8"
        self.inputs = mask_inputs(net.config, modes, form)  # {name: up-block}
        self.down = nn.ModuleList(_Layer(block, modes, form) for block in _blocks(net.down))
        self.up = nn.ModuleList(
            _Layer(block, modes, form, None if self.inputs else _baked_mask(net, block, modes, form))
            for block in _blocks(net.up)
        )

    def forward(
        self,
        image: Tensor,  # [N, C, H, W] fp32 in [-1, 1], or [N, H, W, C] uint8
        *masks: Tensor,  # [1 or N, C, h, w] uint8, 0 or 2, in the order of `inputs`
    ) -> Tensor:  # the same kind
        x = to_unit(image).permute(0, 3, 1, 2) if self.uint8 else image
        given = dict(zip(self.inputs.values(), masks, strict=True))
        h, features = x.to(self.dtype), []
        for layer in self.down[:-1]:
            h = F.leaky_relu(layer(h), 0.2)
            features.append(h)
        h = F.relu(self.down[-1](h))
        for number, layer in enumerate(self.up[:-1]):
            h = F.relu(layer(h, given.get(number)))
            skip = features.pop()
            if self.skips:
                h = torch.cat((F.relu(skip), h), 1)
        y = torch.tanh(self.up[-1](h).float())
        if not self.uint8:
            return y
        return ((y + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)  # as data.images.to_uint8


class _Layer(nn.Module):
    """One block: the product with what could be folded into it, the norm that could not, dropout."""

    weight: Tensor  # as the convolution's, compute dtype
    bias: Tensor | None  # [C] compute dtype
    gamma: Tensor | None  # [C] fp32, of a norm by the image's statistics
    beta: Tensor | None  # [C] fp32
    mask: Tensor | None  # [1, C, h, w] compute dtype

    def __init__(self, block: Block, modes: Modes, form: Form, mask: Tensor | None = None) -> None:
        super().__init__()
        dtype, conv = DTYPES[form.precision], block.conv
        self.stride, self.enlarge = conv.stride, isinstance(conv, ResizeConv)
        self.transposed = isinstance(conv, nn.ConvTranspose2d)
        # TensorRT-RTX has no transposed convolution in bf16
        self.recast = self.transposed and dtype == torch.bfloat16
        weight, bias, affine = _folded(block, modes)
        if self.recast:
            weight, bias = transposed_as_conv(weight), None if bias is None else bias.repeat_interleave(4)
        self.register_buffer("weight", weight.to(dtype, memory_format=torch.contiguous_format))
        self.register_buffer("bias", None if bias is None else bias.to(dtype))
        self.register_buffer("gamma", None if affine is None else affine[0])
        self.register_buffer("beta", None if affine is None else affine[1])
        self.register_buffer("mask", mask)

    def forward(
        self,
        x: Tensor,  # [N, C, H, W] compute dtype
        mask: Tensor | None = None,  # [1 or N, C, h, w] uint8
    ) -> Tensor:
        if self.enlarge:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.recast:
            x = F.pixel_shuffle(F.conv2d(x, self.weight, self.bias, 1, 1), 2)
        elif self.transposed:
            x = F.conv_transpose2d(x, self.weight, self.bias, self.stride, 1)
        else:
            x = F.conv2d(x, self.weight, self.bias, self.stride, 1)
        if self.gamma is not None:
            x = F.instance_norm(x.float(), weight=self.gamma, bias=self.beta, eps=EPS).to(x.dtype)
        if mask is not None:
            return x * mask.to(x.dtype)
        return x if self.mask is None else x * self.mask


def _blocks(modules: nn.ModuleList) -> list[Block]:
    return [block for block in modules if isinstance(block, Block)]


def _baked_mask(net: Unet, block: Block, modes: Modes, form: Form) -> Tensor | None:
    """The mask of noise = fixed for the one size of the form, [1, C, h, w] compute dtype."""
    if block.dropout is None or modes.noise == "off":
        return None
    assert form.height is not None and form.width is not None
    number = block.dropout.block
    mask = noise_mask(mask_shape(net.config, number, form.height, form.width), modes.seed, number)
    return mask.to(DTYPES[form.precision], memory_format=torch.contiguous_format)


def _folded(block: Block, modes: Modes) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """Weight, bias and, where statistics of the image are needed, (gamma, beta): all fp32."""
    conv, norm = block.conv, block.norm
    weight = conv.weight.detach().float()
    bias = None if conv.bias is None else conv.bias.detach().float()
    if isinstance(norm, nn.Identity):
        return weight, bias, None
    if not isinstance(norm, _BatchNorm):
        ones = weight.new_ones(conv.out_channels)
        return weight, None, (ones, 0 * ones)  # the mean takes the bias out again
    gamma, beta = norm.weight.detach().float(), norm.bias.detach().float()
    if modes.norm_stats == "image":
        return weight, None, (gamma, beta)
    assert norm.running_mean is not None and norm.running_var is not None
    scale = gamma * torch.rsqrt(norm.running_var.float() + norm.eps)
    shift = beta - norm.running_mean.float() * scale
    axis = 1 if isinstance(conv, nn.ConvTranspose2d) else 0
    weight = weight * scale.view([-1 if d == axis else 1 for d in range(4)])
    return weight, shift if bias is None else shift + bias * scale, None


def transposed_as_conv(
    weight: Tensor,  # [I, O, 4, 4] of a transposed convolution, stride 2, padding 1
) -> Tensor:  # [4 O, I, 3, 3] of a convolution, stride 1, padding 1
    """The kernel whose output, depth to space by 2 (channel, row, column order), is the transposed convolution's.

    Output row 2 y + p takes input row y + d (d = -1, 0, 1) times kernel row p + 1 - 2 d, where there is one.
    """
    inputs, outputs = weight.shape[:2]
    kernel = weight.new_zeros(outputs, 2, 2, inputs, 3, 3)
    taps = [(p, d, p + 1 - 2 * d) for p in (0, 1) for d in (-1, 0, 1) if 0 <= p + 1 - 2 * d < 4]
    for p, d, row in taps:
        for q, e, column in taps:
            kernel[:, p, q, :, d + 1, e + 1] = weight[:, :, row, column].T
    return kernel.view(4 * outputs, inputs, 3, 3)
