import numpy as np
import pytest
import torch
from PIL import Image

from fastpix2pix.building.samples import samples
from fastpix2pix.config import Build, Generator
from fastpix2pix.data.synthetic import write_demo_set
from fastpix2pix.errors import InputError

SIZE = ((64, 64),)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_painted_images_have_the_models_channels_and_size(channels):
    config = Generator(depth=5, ngf=4, in_channels=channels)
    found = samples(Build(gate_images=2, calibration_images=2), config, "AtoB", ((64, 96),), True)
    assert [image.shape for _, image in found.gate] == [(channels, 64, 96)] * 2
    assert [tuple(image.shape) for image in found.calibration] == [(1, channels, 64, 96)] * 2
    assert found.gate[0][1].dtype == torch.uint8
    assert -1 <= float(found.calibration[0].min()) < float(found.calibration[0].max()) <= 1
    assert found.source == "painted facades"
    assert len({image.sum().item() for _, image in found.gate}) == 2, "they differ"


def test_direction_says_which_half():
    config = Generator(depth=5, ngf=4)
    labels, photos = (samples(Build(gate_images=1), config, d, SIZE, False).gate[0][1] for d in ("AtoB", "BtoA"))
    assert len(labels.flatten(1).unique(dim=1).T) < 20 < len(photos.flatten(1).unique(dim=1).T)


def test_of_three_sizes_the_ends_have_one_image_each():
    sizes = ((32, 32), (64, 64), (96, 128))
    found = samples(Build(gate_images=4, calibration_images=2), Generator(depth=5, ngf=4), "AtoB", sizes, True)
    assert [tuple(image.shape[1:]) for _, image in found.gate] == [(32, 32), (96, 128), (64, 64), (64, 64)]
    assert {tuple(image.shape[2:]) for image in found.calibration} == {(64, 64)}


def test_pairs_of_a_folder(tmp_path):
    data = write_demo_set(tmp_path / "pairs", train=6, val=3, size=64)
    build = Build(calibration=str(data), gate_images=2, calibration_images=3)
    found = samples(build, Generator(depth=5, ngf=4), "BtoA", SIZE, True)
    assert found.source == str(data)
    assert [name for name, _ in found.gate] == ["0001", "0002"]
    picture = np.asarray(Image.open(data / "val" / "0001.png"))[:, 64:]
    assert np.array_equal(found.gate[0][1].permute(1, 2, 0).numpy(), picture)
    halves = [np.asarray(Image.open(data / "train" / f"000{i}.png"))[:, 64:] for i in (1, 3, 5)]
    for image, half in zip(found.calibration, halves, strict=True):
        assert torch.allclose(image[0].permute(1, 2, 0), torch.from_numpy(half.copy()) / 127.5 - 1)


def test_without_validation_pairs_training_pairs_serve(tmp_path):
    data = write_demo_set(tmp_path / "pairs", train=2, val=0, size=64)
    found = samples(Build(calibration=str(data)), Generator(depth=5, ngf=4), "AtoB", SIZE, False)
    assert [name for name, _ in found.gate] == ["0001", "0002"]
    assert found.calibration == ()


def test_a_folder_without_pairs_is_refused(tmp_path):
    with pytest.raises(InputError, match="no images"):
        samples(Build(calibration=str(tmp_path)), Generator(depth=5, ngf=4), "AtoB", SIZE, True)
