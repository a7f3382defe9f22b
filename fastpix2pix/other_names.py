"""What an unknown option may mean: one of ours that has another name elsewhere, or is written nearly so."""

from __future__ import annotations

import difflib
from collections.abc import Collection

# of pytorch-CycleGAN-and-pix2pix, and what is usual in other trainers
_OTHER_NAMES = {
    "amp": "precision",
    "batch_size": "batch",
    "checkpoints_dir": "out",
    "continue_train": "resume",
    "dataroot": "data",
    "eval": "norm_stats",
    "fp16": "precision",
    "gan_mode": "gan_loss",
    "gpu_ids": "device",
    "gpus": "device",
    "image_size": "crop_size",
    "img_size": "crop_size",
    "input_nc": "in_channels",
    "learning_rate": "lr",
    "lr_policy": "schedule",
    "max_epochs": "epochs",
    "n_epochs": "epochs",
    "n_epochs_decay": "decay_epochs",
    "n_layers_D": "n_layers",
    "name": "out",
    "netD": "n_layers",  # basic is 3, pixel is 0
    "netG": "depth",  # unet_128 is 7, unet_256 is 8
    "no_dropout": "dropout",
    "num_epochs": "epochs",
    "num_threads": "workers",
    "num_workers": "workers",
    "output_dir": "out",
    "output_nc": "out_channels",
    "phase": "split",
    "pool_size": "pool",
    "pretrained": "init",
    "print_freq": "log_steps",
    "results_dir": "out",
    "save_latest_freq": "checkpoint_steps",
}


def meant(name: str, known: Collection[str]) -> str | None:
    """The one of the `known` options that an unknown `name` has most likely meant, if any."""
    if (ours := _OTHER_NAMES.get(name)) in known:
        return ours
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)
