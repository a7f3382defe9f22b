import numpy as np
import pytest
import torch

from fastpix2pix.runtime.padding import Crop, pad_to_multiple

SIZES = [  # height, width, multiple, why
    (1, 1, 32, "a single pixel is repeated"),
    (2, 3, 32, "reflected to and fro many times"),
    (3, 1, 32, "one axis of a single pixel"),
    (31, 33, 32, "one short of and one past the multiple; odd pads"),
    (255, 257, 256, "the real multiple, pads of 1 and 255"),
    (64, 50, 32, "one axis fits"),
    (17, 16, 16, "pad is the picture less one: torch's own limit"),
]


@pytest.mark.parametrize("height, width, multiple, why", SIZES)
def test_equals_numpy_reflection_and_crops_back(height, width, multiple, why):
    x = torch.arange(2 * 3 * height * width, dtype=torch.float32).reshape(2, 3, height, width)
    padded, crop = pad_to_multiple(x, multiple)
    pads = [-size % multiple for size in (height, width)]
    wanted = np.pad(x.numpy(), [(0, 0), (0, 0), *((p // 2, p - p // 2) for p in pads)], mode="reflect")
    assert np.array_equal(padded.numpy(), wanted), why
    assert torch.equal(crop(padded), x)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_keeps_memory_format_and_dtype(form, dtype):
    x = torch.zeros(2, 3, 5, 9, dtype=dtype).contiguous(memory_format=form)
    padded, _ = pad_to_multiple(x, 8)
    assert padded.shape == (2, 3, 8, 16)
    assert padded.dtype == dtype
    assert padded.is_contiguous(memory_format=form)


def test_a_picture_that_fits_is_returned_itself():
    x = torch.zeros(1, 3, 64, 32)
    padded, crop = pad_to_multiple(x, 32)
    assert padded is x
    assert crop == Crop(0, 0, 64, 32)


def test_top_and_left_get_the_smaller_half():
    _, crop = pad_to_multiple(torch.zeros(1, 1, 29, 26), 32)
    assert crop == Crop(top=1, left=3, height=29, width=26)
