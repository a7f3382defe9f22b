"""Files in, files out: every mode against numpy or Pillow's own conversion, every refusal by name."""

import errno
import os
import resource
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastpix2pix.data import images
from fastpix2pix.data.images import MAX_PIXELS, open_image, read_image, to_uint8, to_unit, write_image
from fastpix2pix.errors import EnvironmentFailed, InputError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (13, 17, 3), np.uint8)
GRAY = COLOUR[:, :, 0]
ALPHA = np.concatenate((COLOUR, RNG.integers(0, 256, (13, 17, 1), np.uint8)), axis=2)
SIXTEEN = RNG.integers(0, 65536, (13, 17)).astype(np.uint16)


def gray_to_rgb(gray):
    return np.repeat(gray[:, :, None], 3, axis=2)


def palette(transparent: bool) -> Image.Image:
    image = Image.fromarray(COLOUR // 86 * 85).quantize(32)  # 27 colours: exact
    if transparent:
        image.info["transparency"] = 0
    return image


LOSSLESS = [  # image, suffix, the RGB expected, why
    (Image.fromarray(COLOUR), "png", COLOUR, "plain"),
    (Image.fromarray(COLOUR), "bmp", COLOUR, "plain"),
    (Image.fromarray(COLOUR), "tif", COLOUR, "plain"),
    (Image.fromarray(COLOUR), "ppm", COLOUR, "plain"),
    (Image.fromarray(GRAY), "png", gray_to_rgb(GRAY), "gray is expanded"),
    (Image.fromarray(GRAY), "pgm", gray_to_rgb(GRAY), "gray is expanded"),
    (Image.fromarray(GRAY), "gif", gray_to_rgb(GRAY), "a GIF of 256 grays is exact"),
    (Image.fromarray(GRAY > 127), "png", gray_to_rgb((GRAY > 127) * np.uint8(255)), "one bit"),
    (Image.fromarray(ALPHA), "png", COLOUR, "alpha is dropped, not blended"),
    (Image.fromarray(ALPHA), "tiff", COLOUR, "alpha is dropped, not blended"),
    (Image.fromarray(ALPHA[:, :, 2:]), "png", gray_to_rgb(COLOUR[:, :, 2]), "gray with alpha"),
    (palette(False), "png", COLOUR // 86 * 85, "palette is expanded"),
    (palette(True), "png", COLOUR // 86 * 85, "palette with a transparent colour"),
    (Image.fromarray(SIXTEEN), "png", gray_to_rgb(np.rint(SIXTEEN / 257).astype(np.uint8)), "16 bit"),
    (Image.fromarray(SIXTEEN), "tif", gray_to_rgb(np.rint(SIXTEEN / 257).astype(np.uint8)), "16 bit"),
    (Image.fromarray(SIXTEEN), "pgm", gray_to_rgb(np.rint(SIXTEEN / 257).astype(np.uint8)), "16 bit"),
]


@pytest.mark.parametrize(("image", "suffix", "expected", "why"), LOSSLESS)
def test_read_lossless(tmp_path, image, suffix, expected, why):
    image.save(path := tmp_path / f"ä <b> {suffix}.{suffix.upper()}")
    found = read_image(path)
    assert found.dtype == np.uint8
    assert found.flags.writeable
    np.testing.assert_array_equal(found, expected)


def test_channels(tmp_path):
    Image.fromarray(ALPHA).save(tmp_path / "rgba.png")
    Image.fromarray(GRAY).save(tmp_path / "gray.png")
    palette(True).save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png", 4), ALPHA)
    luma = np.rint(COLOUR @ np.array([0.299, 0.587, 0.114]))[:, :, None]
    assert np.abs(read_image(tmp_path / "rgba.png", 1) - luma).max() <= 1  # ITU-R 601, in fixed point
    np.testing.assert_array_equal(read_image(tmp_path / "gray.png", 1), GRAY[:, :, None])
    assert (read_image(tmp_path / "gray.png", 4)[:, :, 3] == 255).all()
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png", 4), np.asarray(palette(True).convert("RGBA")))
    for channels in (0, 2, 5):
        with pytest.raises(InputError, match=rf"rgba.png: channels = {channels}: images have 1 .*3 .*or 4"):
            read_image(tmp_path / "rgba.png", channels)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_read_lossy_equals_pillow(tmp_path, suffix, mode):
    if (suffix, mode) == ("webp", "CMYK"):
        mode = "RGBA"
    Image.fromarray(COLOUR).convert(mode).save(path := tmp_path / f"x.{suffix}")
    np.testing.assert_array_equal(read_image(path), np.asarray(Image.open(path).convert("RGB")))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), v, np.uint8)) for v in (10, 200)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert (read_image(tmp_path / "x.gif", 1) == 10).all()


@pytest.mark.parametrize("turn", range(10))  # 0 and 9 do not exist and count as 1
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_exif_orientation(tmp_path, suffix, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(COLOUR).save(path := tmp_path / f"x.{suffix}", exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert expected.shape == ((17, 13, 3) if 5 <= turn <= 8 else (13, 17, 3))
    np.testing.assert_array_equal(read_image(path), expected)


def test_orientation_of_16_bit(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(SIXTEEN).save(path := tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(read_image(path, 1)[:, :, 0], np.rot90(np.rint(SIXTEEN / 257), -1))


def test_damaged_exif_costs_no_image(tmp_path):
    Image.fromarray(COLOUR).save(path := tmp_path / "x.jpg", exif=b"Exif\0\0XX*\0garbage")
    assert read_image(path).shape == (13, 17, 3)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: p.write_bytes(b""), "not an image of a known format"),
        (lambda p: p.write_text("hello " * 100), "not an image of a known format"),
        (lambda p: None, "No such file"),
        (lambda p: p.mkdir(), "Is a directory"),
        (
            lambda p: Image.fromarray(SIXTEEN.astype(np.int32)).save(p, "TIFF"),
            "32-bit integer images are not supported",
        ),
        (lambda p: Image.fromarray(SIXTEEN / np.float32(7)).save(p, "TIFF"), "floating point images are not supported"),
        (lambda p: Image.fromarray(COLOUR).convert("LAB").save(p, "TIFF"), "LAB images are not supported"),
        (lambda p: Image.fromarray(COLOUR).save(p, "ICO"), "not an image of a known format"),
    ],
)
def test_refused(tmp_path, make, reason):
    make(path := tmp_path / "broken.png")
    with pytest.raises(InputError, match=rf"^.*broken\.png: .*{reason}[^\n]*$"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "ppm", "gif"])
def test_truncated(tmp_path, suffix):
    big = RNG.integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(big).save(path := tmp_path / f"x.{suffix}")
    whole = path.read_bytes()
    for part in (0.9, 0.5, 0.1):
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(InputError, match=rf"^.*x\.{suffix}: [^\n]*$"):
            read_image(path)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about damaged blocks
def test_damaged_bytes_name_the_file_or_decode(tmp_path):
    """Whatever Pillow raises on a damaged file arrives as one InputError; nothing else gets out."""
    refused = 0
    for suffix in ("png", "jpg", "tif", "webp"):
        Image.fromarray(COLOUR).save(path := tmp_path / f"x.{suffix}")
        whole = path.read_bytes()
        for at in RNG.integers(0, len(whole), 60):
            path.write_bytes(whole[:at] + bytes([RNG.integers(256)]) + whole[at + 1 :])
            message = None
            try:
                read_image(path)
            except InputError as error:
                message = str(error)
            refused += message is not None
            assert message is None or (f"x.{suffix}" in message and "\n" not in message)
    assert refused >= 20


def png(width: int, height: int, depth: int = 8, pixels: bytes = b"") -> bytes:
    """An RGB PNG by hand; without pixels, it is a header with nothing behind it."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)), (b"IDAT", zlib.compress(pixels))]
    parts.append((b"IEND", b""))
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_sixteen_bit_colour_keeps_the_high_byte(tmp_path):
    colour = RNG.integers(0, 65536, (5, 7, 3)).astype(">u2")
    (path := tmp_path / "x.png").write_bytes(png(7, 5, 16, b"".join(b"\0" + row.tobytes() for row in colour)))
    np.testing.assert_array_equal(read_image(path), colour >> 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(8193, 8192), (10_000, 10_000), (100_000, 100_000)])  # ours, Pillow's warning, error
def test_pixel_limit_is_checked_in_the_header(tmp_path, size):
    (path := tmp_path / "x.png").write_bytes(png(*size))
    with pytest.raises(InputError, match=r"x\.png: .*over the limit of 67\.11 megapixels"):
        read_image(path)


def test_pixel_limit_is_inclusive(tmp_path):
    assert MAX_PIXELS == 8192 * 8192
    Image.fromarray(COLOUR).save(path := tmp_path / "x.png")
    assert read_image(path, max_pixels=13 * 17).shape == (13, 17, 3)
    with pytest.raises(InputError, match="17x13 pixels are over the limit"):
        read_image(path, max_pixels=13 * 17 - 1)


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".tif", ".tiff", ".ppm"])
@pytest.mark.parametrize("array", [GRAY[:, :, None], COLOUR, ALPHA], ids=["gray", "rgb", "rgba"])
def test_write_and_read_again(tmp_path, suffix, array):
    path, channels = tmp_path / f"x{suffix}", array.shape[2]
    if suffix in (".ppm", ".bmp") and channels == 4:
        with pytest.raises(InputError, match=rf"{suffix} cannot hold transparent"):
            write_image(path, array)
        return
    path.write_text("before")
    write_image(path, array[:, ::-1])  # a view with negative strides
    np.testing.assert_array_equal(read_image(path, channels), array[:, ::-1])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".jfif", ".webp"])
def test_write_lossy(tmp_path, suffix):
    ramp = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[:, None, None], (64, 64, 3))
    write_image(tmp_path / f"x{suffix}", ramp)
    assert np.abs(read_image(tmp_path / f"x{suffix}").astype(int) - ramp).max() <= 4
    if suffix != ".webp":
        Image.fromarray(ramp).save(tmp_path / "95.jpg", quality=95)
        assert (tmp_path / f"x{suffix}").read_bytes() == (tmp_path / "95.jpg").read_bytes()


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("x.jpg", ALPHA, r"\.jpg cannot hold transparent \(RGBA\) images; use \.png"),
        ("x.pgm", COLOUR, r"\.pgm cannot hold colour images"),
        ("x.gif", COLOUR, r"cannot write \.gif; allowed are \.png"),
        ("x", COLOUR, "cannot write no suffix"),
        ("x.png", GRAY, r"not uint8 \[13, 17\]"),
        ("x.png", COLOUR / 2, r"not float64"),
        ("x.png", ALPHA[:, :, :2], r"not uint8 \[13, 17, 2\]"),
        ("x.png", COLOUR[:0], r"not uint8 \[0, 17, 3\]"),
    ],
)
def test_write_refused(tmp_path, name, array, reason):
    with pytest.raises(InputError, match=reason):
        write_image(tmp_path / name, array)
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_nothing_behind(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = RNG.integers(0, 256, (256, 256, 3), np.uint8)
    (path := tmp_path / "x.png").write_text("before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the kernel refuses, as a full disk does
    try:
        with pytest.raises(EnvironmentFailed, match=r"x\.png: File too large"):
            write_image(path, noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]


def test_unit_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(levels)
    assert unit.dtype == torch.float32
    np.testing.assert_array_equal(unit.numpy(), np.arange(256, dtype=np.float32) / np.float32(127.5) - 1)
    assert torch.equal(to_uint8(unit), levels)
    half_a_level = torch.tensor([0.49, -0.49]) / 127.5
    assert torch.equal(to_uint8(unit[1:255] + half_a_level[0]), levels[1:255])  # rounds where truncation would not
    assert torch.equal(to_uint8(unit[1:255] + half_a_level[1]), levels[1:255])
    beyond = torch.tensor([-2.0, 2.0, -torch.inf, torch.inf, torch.nan])
    assert to_uint8(beyond).tolist() == [0, 255, 0, 255, 0]
    assert to_uint8(unit.double()).tolist() == levels.tolist()
    assert torch.equal(to_uint8(unit.bfloat16()), levels)  # 8 bits of mantissa are just enough, where they are rounded
    with pytest.raises(InputError, match=r"to_unit takes uint8, not torch\.float32"):
        to_unit(unit)
    with pytest.raises(InputError, match=r"to_uint8 takes floats in \[-1, 1\], not torch\.uint8"):
        to_uint8(levels)


def failing(monkeypatch, number: int, times: int) -> list[float]:
    """Pillow's next `times` attempts to open a file fail; returns what is slept in between."""
    slept, opened, left = [], Image.open, iter(range(times))

    def opens(*given, **options):
        if next(left, None) is not None:
            raise OSError(number, os.strerror(number))
        return opened(*given, **options)

    monkeypatch.setattr(images.Image, "open", opens)
    monkeypatch.setattr(images.time, "sleep", slept.append)
    return slept


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_an_error_that_passes_is_waited_for(tmp_path, monkeypatch, number):
    write_image(path := tmp_path / "x.png", COLOUR)
    slept = failing(monkeypatch, number, 2)
    np.testing.assert_array_equal(read_image(path), COLOUR)
    assert slept == [0.1, 1.0]


def test_an_error_that_does_not_pass_is_the_disk_s(tmp_path, monkeypatch):
    write_image(path := tmp_path / "x.png", COLOUR)
    slept = failing(monkeypatch, errno.ESTALE, 10)
    with pytest.raises(EnvironmentFailed, match=rf"^{path}: Stale file handle, 4 times; check the disk or the network"):
        open_image(path)
    assert len(slept) == 3


def test_a_missing_file_is_not_waited_for(tmp_path, monkeypatch):
    slept = failing(monkeypatch, errno.ENOENT, 1)
    with pytest.raises(InputError, match=r"x\.png: No such file or directory"):
        open_image(tmp_path / "x.png")
    assert slept == []
