"""Launches and bytes of one training step, counted without a GPU: `python -m bench.step_cost [--write FILE]`.

The step runs on fake tensors (shapes and dtypes, no memory). Every ATen call that computes counts as one launch; its
bytes are those of its distinct tensor arguments and results. Triton launches count by the formulas beside the kernels.
A convolution counts as one launch here and may be several in cuDNN; a fused optimiser call counts as one. The plain
kernels are the Triton kernels' references: short, not fast; dropout's counter-based bits alone are most of their calls.
Own convolutions are those of the static plans; fewer bytes and more launches are not yet less time.
A batch is given as loaders give it, in uint8.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # lets the Triton side be chosen on a CPU; nothing is run

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpix2pix.config import train_config
from fastpix2pix.files import write_text
from fastpix2pix.kernels.dispatch import recorded
from fastpix2pix.profiling import Counter
from fastpix2pix.training.step import build_state

STEPS = {
    "modules, fp32": {"step": "modules", "precision": "fp32"},
    "modules, bf16 autocast": {"step": "modules", "precision": "bf16"},
    "explicit, bf16, plain kernels": {"step": "explicit", "impl": "reference", "precision": "bf16"},
    "explicit, bf16, Triton kernels": {"step": "explicit", "impl": "triton", "precision": "bf16"},
    "the same, own convolutions": {"step": "explicit", "impl": "triton", "precision": "bf16", "convolutions": "own"},
}
BATCHES = (1, 64)


class Cost(NamedTuple):
    """Of one step."""

    aten: int  # ATen calls that compute
    triton: int  # Triton launches
    megabytes: float  # read and written by both


def cost(options: dict[str, Any], batch: int) -> Cost:
    """One step of the paper's networks at 256x256."""
    config = train_config(**options, batch=batch, device="cpu")
    state = build_state(config, torch.device("cpu"))  # real parameters, which fake operations see as fake
    for net in filter(None, (state.generator, state.discriminator)):
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # all of it, as on a GPU
    with FakeTensorMode(allow_non_fake_inputs=True), recorded(run=False) as tape:
        shape = (batch, 3, 256, 256)
        x, y = (torch.empty(shape, dtype=torch.uint8).to(memory_format=torch.channels_last) for _ in range(2))
        state.step(x, y, 0, 2e-4)  # the optimiser makes its moments here
        tape.clear()
        with Counter() as counted:
            state.step(x, y, 1, 2e-4)
        triton = sum(launch.read + launch.written for launch in tape)
        return Cost(counted.calls, len(tape), (counted.bytes + triton) / 1e6)


def table() -> str:
    """Markdown: a row per step, launches and megabytes per batch."""
    head = "| step | " + " | ".join(f"B={b}: ATen | Triton | MB" for b in BATCHES) + " |"
    lines = [head, "|---|" + "--:|" * 3 * len(BATCHES)]
    for name, options in STEPS.items():
        costs = [cost(options, batch) for batch in BATCHES]
        cells = [f"{c.aten} | {c.triton} | {c.megabytes:,.0f}" for c in costs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or write it with its explanation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="file for the table")
    arguments = parser.parse_args()
    text = table()
    print(text)
    if arguments.write:
        note = "\n".join((__doc__ or "").strip().splitlines()[2:])
        title = (
            "# Launches and bytes of one training step\n\nMade by `python -m bench.step_cost --write docs/step_cost.md`"
        )
        versions = f"torch {torch.__version__}, unet_256 with ngf 64, 70x70 PatchGAN with ndf 64, 256x256"
        write_text(arguments.write, f"{title} ({versions}).\n\n{note}\n\n{text}\n")


if __name__ == "__main__":
    main()
