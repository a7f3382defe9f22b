"""Small pairs and small networks: a step takes milliseconds."""

from pathlib import Path

import numpy as np
import pytest

from fastpix2pix.data.images import write_image

SMALL = {
    "crop_size": 32, "depth": 5, "ngf": 4, "ndf": 4, "n_layers": 1, "device": "cpu", "workers": 0,
    "tensorboard": False, "log_steps": 3, "batch": 2,
}  # fmt: skip


def smooth(rng: np.random.Generator, size: int) -> np.ndarray:
    """A smooth random picture uint8 [size, size, 3]."""
    y, x = np.mgrid[0:size, 0:size] / size
    waves = [np.sin(2 * np.pi * (rng.uniform(0.5, 2) * x + rng.uniform(0.5, 2) * y + rng.uniform())) for _ in range(3)]
    return ((np.stack(waves, -1) + 1) * 127).astype(np.uint8)


def write_pairs(folder: Path, count: int, size: int, seed: int) -> None:
    """A|B files: B is A with its channels swapped and inverted, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        a = smooth(rng, size)
        write_image(folder / f"{i}.png", np.concatenate((a, 255 - a[..., ::-1]), axis=1))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 training and 3 validation pairs of 40x40 pixels: 5 is no multiple of the batch."""
    root = tmp_path_factory.mktemp("pairs")
    write_pairs(root / "train", 5, 40, seed=1)
    write_pairs(root / "val", 3, 40, seed=2)
    return root


@pytest.fixture
def small() -> dict:
    return dict(SMALL)
