"""What test_processes.py starts, as torchrun would: tasks in and answers out, a line of JSON each."""

import json
import os
import sys

import torch

from fastpix2pix.config import train_config
from fastpix2pix.training import loop
from fastpix2pix.training.processes import joined
from fastpix2pix.training.step import build_state

LR = 2e-4


def batches(steps: int, images: int, channels: int = 3, size: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same for everybody: inputs and targets of `images` images."""
    draws = torch.Generator().manual_seed(9)
    both = [torch.rand(2, images, channels, size, size, generator=draws) * 2 - 1 for _ in range(steps)]
    return [tuple(t.contiguous(memory_format=torch.channels_last) for t in pair) for pair in both]


def steps(options: dict, count: int, out: str, overflow: int | None = None) -> dict:
    """Steps on this process's slice of the batches; weights and the first moments go to OUT<rank>.pt.

    overflow: the process whose first input does not fit into fp16.
    """
    config = train_config(**options)
    with joined("cpu") as (group, device):
        state = build_state(config, device, None, group)
        mine = slice(group.rank * config.batch, (group.rank + 1) * config.batch)
        losses = []
        for number, (x, y) in enumerate(batches(count, group.size * config.batch)):
            x = x[mine] * (1e6 if number == 0 and overflow == group.rank else 1)
            losses.append(state.step(x, y[mine], number, LR).tolist())
        found = {f"{n}/{k}": p for n in ("generator", "discriminator") for k, p in getattr(state, n).named_parameters()}
        found |= {k: t for k, t in state.tensors().items() if k.startswith("adam") or k == "scaler" or k == "scale"}
        torch.save({k: t.detach().clone() for k, t in found.items()}, f"{out}{group.rank}.pt")
    return {"losses": losses}


def train(data: str, out: str, resume: bool = False, **options: object) -> dict:
    """A whole run."""
    result = loop.train(data, out, resume=resume, quiet=True, **options)
    return {"step": result.step, "epochs": result.epochs, "stopped": result.stopped, "rank": result.rank}


def main() -> None:
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        try:
            answer = {"steps": steps, "train": train}[task["do"]](**task["given"])
        except BaseException as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert "RANK" in os.environ
    main()
