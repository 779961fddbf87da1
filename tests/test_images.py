"""Images in every form a person has them, and files that are none."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mllm_fast import InputError
from mllm_fast.core.images import load_image

ORANGE = (255, 128, 0)


def save(tmp_path, image, name="picture.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def test_cmyk(tmp_path):
    path = save(tmp_path, Image.new("CMYK", (8, 8), (0, 127, 255, 0)), "c.tif")
    assert np.abs(np.asarray(load_image(path), int) - ORANGE).max() <= 2


def test_palette(tmp_path):
    path = save(tmp_path, Image.new("RGB", (8, 8), ORANGE).convert("P", palette=Image.Palette.ADAPTIVE))
    assert np.abs(np.asarray(load_image(path), int) - ORANGE).max() <= 8


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, *ORANGE])
    image.putpixel((0, 0), 1)
    path = save(tmp_path, image, transparency=0)
    pixels = np.asarray(load_image(path))
    assert tuple(pixels[0, 0]) == ORANGE
    assert tuple(pixels[4, 4]) == (255, 255, 255)


def test_alpha_lies_over_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (*ORANGE, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    pixels = np.asarray(load_image(save(tmp_path, image)))
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert abs(int(pixels[0, 1, 0]) - 127) <= 1
    assert tuple(pixels[4, 4]) == ORANGE


def test_sixteen_bits_are_scaled(tmp_path):
    values = np.full((8, 8), 32896, np.uint16)  # 128 * 257
    values[0, 0] = 65535
    pixels = np.asarray(load_image(save(tmp_path, Image.fromarray(values))))
    assert tuple(pixels[4, 4]) == (128, 128, 128)
    assert tuple(pixels[0, 0]) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (12, 8), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright
    loaded = load_image(save(tmp_path, image, exif=exif))
    assert loaded.size == (8, 12)
    assert loaded.getpixel((7, 0)) == (255, 255, 255)
    assert load_image(loaded).size == (8, 12), "reading again must not turn it again"


def test_arrays_and_images_and_grey():
    array = np.zeros((4, 6, 3), np.uint8)
    assert load_image(array).size == (6, 4)
    assert load_image(Image.new("L", (3, 2), 9)).getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"not an image at all", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 20, "not an image|damaged"),
    ],
)
def test_files_that_are_no_pictures(tmp_path, content, message):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_image(path)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "bmp"])
def test_truncated(tmp_path, ending):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = save(tmp_path, noise, f"x.{ending}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"damaged, truncated or unreadable|not an image"):
        load_image(path)


def test_too_large_is_refused_before_decoding(tmp_path):
    """A PNG of 40,000 x 40,000 pixels is 1.6 MB of zeros on disk and 4.8 GB in memory."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)))
    with pytest.raises(InputError, match=r"the limit is .*--max-pixels"):
        load_image(path)


def test_the_limit_can_be_raised_beyond_pillows(tmp_path, monkeypatch):
    """Pillow has a limit of its own, a global one; ours is the one that counts."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = save(tmp_path, Image.new("RGB", (30, 30)))
    assert load_image(path, max_pixels=900).size == (30, 30)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_the_limit_can_be_raised_and_lowered(tmp_path):
    path = save(tmp_path, Image.new("RGB", (20, 20)))
    assert load_image(path, max_pixels=400).size == (20, 20)
    with pytest.raises(InputError, match="20 x 20"):
        load_image(path, max_pixels=399)


@pytest.mark.parametrize("source", ["missing.png", 17, np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8)])
def test_other_sources(source):
    with pytest.raises(InputError):
        load_image(source)
