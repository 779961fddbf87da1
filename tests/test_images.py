"""Images in every form a person has them, and files that are none."""

from __future__ import annotations

import base64
import io
import pickle

import httpx
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

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


def test_a_fetch_that_the_environment_spoils(monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(InputError, match=r"a\.invalid/a\.png: cannot be fetched"):
        load_image("https://a.invalid/a.png")


def test_a_host_that_sends_for_ever(monkeypatch):
    client = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, content=iter([b"x"] * 9))))
    monkeypatch.setattr(httpx, "stream", client.stream)
    monkeypatch.setattr("mllm_fast.core.image_urls._SECONDS_IN_ALL", -1.0)
    with client, pytest.raises(InputError, match="did not come within"):
        load_image("https://a.test/a.png")


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa"])
def test_every_kind_of_alpha(mode):
    half = Image.new("RGBA", (4, 4), (100, 100, 100, 128))
    made = (half if mode[0] == "R" else half.convert("LA")).convert(mode)
    assert load_image(made).getpixel((0, 0)) == pytest.approx((177, 177, 177), abs=1)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3, 4, 4, device="meta"), torch.zeros(3, 4, 4).to_sparse()], ids=["no data", "sparse"]
)
def test_tensors_without_plain_data(tensor):
    with pytest.raises(InputError, match="dense and has data"):
        load_image(tensor)


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


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", "no such file"),
        (17, "an image is a path, a URL"),
        (np.zeros((4, 4, 2), np.uint8), r"\[H, W, C\] with 1, 3 or 4"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"got uint8 \[2, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((4, 4, 3), np.int64), "uint8, uint16, bool or floating point, got int64"),
        (np.full((4, 4), 1.5), "0 to 1, got 1.5 to 1.5"),
        (np.full((4, 4), -0.1), "0 to 1, got -0.1"),
        (np.full((4, 4), np.nan), "no finite numbers"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), "got int32"),
        (torch.zeros(5, 4, 6), r"\[C, H, W\] or \[H, W, C\]"),
        (io.StringIO("text"), "is binary"),
        (io.BytesIO(b""), "not an image"),
        ("data:text/plain,hello", "data URL of an image"),
        ("https://", "cannot be fetched"),
    ],
)
def test_what_is_no_image_is_named(source, message):
    with pytest.raises(InputError, match=message):
        load_image(source)


def grey(picture) -> np.ndarray:
    pixels = np.asarray(picture)
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0]


RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


def test_arrays_and_tensors_of_every_kind():
    """The same picture each time, whichever way it comes."""
    rgb = np.stack([RAMP, 255 - RAMP, RAMP // 2], 2)
    clear = np.concatenate([rgb, np.full((6, 8, 1), 255, np.uint8)], 2)
    for source in (
        rgb,
        clear,
        rgb / 255.0,
        (rgb / 255.0).astype(np.float32),
        rgb.astype(np.uint16) * 257,
        torch.from_numpy(rgb),
        torch.from_numpy(rgb).permute(2, 0, 1),
        torch.from_numpy(rgb).permute(2, 0, 1).float() / 255,
        torch.from_numpy(clear).permute(2, 0, 1),
        torch.from_numpy(rgb / 255.0).requires_grad_(),
        np.nextafter(rgb / np.float32(255), np.float32(2)),  # as resizing rounds
        (rgb / 255.0) * 1.002 - 0.001,
        (rgb.astype(np.uint16) * 257).astype(">u2"),
        (rgb / 255.0).astype(">f4"),
        torch.from_numpy(rgb).permute(2, 0, 1).conj(),
        Image.fromarray(rgb),
    ):
        assert (np.asarray(load_image(source)) == rgb).all()
    for source in (RAMP, RAMP[:, :, None], torch.from_numpy(RAMP)[None], RAMP / 255.0):
        assert (grey(load_image(source)) == RAMP).all()
    assert (grey(load_image(RAMP > 100)) == 255 * (RAMP > 100)).all()
    square = torch.zeros(3, 8, 3)
    square[0] = 1  # both ends may be the channels: the first is
    assert load_image(square).size == (3, 8)
    assert load_image(square).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (RAMP.astype(np.int32), RAMP),  # came out black
        (RAMP.astype(np.int32) * 257, RAMP),
        (RAMP.astype(np.float32), RAMP),  # came out white
        (RAMP.astype(np.float32) / 255, RAMP),
        (np.nextafter(RAMP / np.float32(255), np.float32(2)), RAMP),
        (RAMP.astype(np.float32) - np.float32(0.3), RAMP),
        (RAMP.astype(np.uint16) * 257, RAMP),
        (RAMP.astype(np.int32) * 1000, "0 to 255 or 0 to 65,535, got 0 to 235000"),
        (RAMP.astype(np.int32) - 1, "got -1 to"),
        (RAMP.astype(np.float32) * 4, "0 to 1 or 0 to 255, got 0 to 940"),
        (RAMP.astype(np.float32) * np.nan, "no finite numbers"),
    ],
)
def test_wide_values_are_taken_by_their_range(values, wanted, tmp_path):
    path = save(tmp_path, Image.fromarray(values), "a.tif")
    for source in (path, Image.fromarray(values), path.read_bytes()):
        if isinstance(wanted, str):
            with pytest.raises(InputError, match=wanted):
                load_image(source)
        else:
            assert (grey(load_image(source)) == wanted).all()


def test_sixteen_bits_are_rounded():
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert (grey(load_image(every)) == np.rint(every / 257)).all()


def test_sixteen_bits_with_a_transparent_value(tmp_path):
    values = np.full((8, 8), 32896, np.uint16)
    values[0, 0] = 700
    path = save(tmp_path, Image.fromarray(values), transparency=700)
    pixels = np.asarray(load_image(path))
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert tuple(pixels[4, 4]) == (128, 128, 128)


def block(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


EXIF = {
    "doubled header": (b"Exif\0\0" + block(6), True),
    "no TIFF": (b"Exif\0\0no TIFF at all, but some text", False),
    "cut": (block(6)[:18], False),
    "garbage": (bytes(range(256)), False),
    "empty": (b"", False),
    "header alone": (b"Exif\0\0", False),
    "whole": (block(6), True),
    "odd orientation": (block(77), False),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", EXIF)
def test_damaged_metadata_refuses_no_pixels(name, kind, tmp_path):
    content, turned = EXIF[name]
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 8, 8))
    path = tmp_path / f"a.{kind.lower()}"
    options = {"exif": content} if content else {}
    image.save(path, kind, **options, **({"lossless": True} if kind == "WEBP" else {}))
    for source in (path, path.read_bytes()):
        found = load_image(source)
        if turned and found.size != (16, 32):
            # Pillow takes the header away when it writes WebP, so that none is left of a doubled one
            assert (name, kind) == ("doubled header", "WEBP")
            continue
        assert found.size == ((16, 32) if turned else (32, 16))
        corner = (15, 0) if turned else (0, 0)
        assert min(found.getpixel(corner)) > 240
        assert max(found.getpixel((corner[0], 31 if turned else 15))) < 15
        for again in (found, found.copy(), found.crop((0, 0, *found.size)), pickle.loads(pickle.dumps(found))):
            assert load_image(again).size == found.size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillow_s(orientation, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(pixels), exif=block(orientation))
    with Image.open(path) as opened:
        wanted = np.asarray(ImageOps.exif_transpose(opened))
    assert (np.asarray(load_image(path)) == wanted).all()


def test_images_that_were_opened_and_closed(tmp_path):
    path = save(tmp_path, Image.fromarray(RAMP))
    with Image.open(path) as lazy:
        pass
    assert (grey(load_image(lazy)) == RAMP).all()
    with Image.open(path) as lazy:
        assert (grey(load_image(lazy)) == RAMP).all()
        lazy.load()
    assert (grey(load_image(lazy)) == RAMP).all()
    with Image.open(io.BytesIO(path.read_bytes())) as gone:
        pass
    with pytest.raises(InputError, match="closed before it was read"):  # nobody knows where it came from
        load_image(gone)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    cut = tmp_path / "cut.png"
    cut.write_bytes(save(tmp_path, noise).read_bytes()[:2000])
    with Image.open(cut) as damaged, pytest.raises(InputError, match="damaged"):
        load_image(damaged)


def test_the_caller_s_image_stays_as_it_is():
    mine = Image.fromarray(np.stack([RAMP] * 3, 2))
    found = load_image(mine)
    found.putpixel((0, 0), (9, 9, 9))
    assert mine.getpixel((0, 0)) == (0, 0, 0)
    assert load_image(found).getpixel((0, 0)) == (9, 9, 9)
    load_image(found).putpixel((0, 0), (0, 0, 0))
    assert found.getpixel((0, 0)) == (9, 9, 9)


def test_files_and_urls(tmp_path, monkeypatch):
    path = save(tmp_path, Image.fromarray(RAMP))
    content = path.read_bytes()
    with path.open("rb") as file:
        for _ in range(2):  # from its beginning each time, as Pillow does
            assert (grey(load_image(file)) == RAMP).all()
    for unreadable in (file, io.BytesIO, (tmp_path / "new").open("wb")):
        with pytest.raises(InputError, match="the open file of an image cannot be read"):
            load_image(unreadable)
    unreadable.close()
    stretched = np.repeat(np.frombuffer(content, np.uint8), 2).tobytes()
    assert (grey(load_image(memoryview(stretched)[::2])) == RAMP).all()
    text = base64.b64encode(content).decode()
    for source in (io.BytesIO(content), bytearray(content), memoryview(content), f"data:image/png;base64,{text}"):
        assert (grey(load_image(source)) == RAMP).all()

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/moved":
            return httpx.Response(302, headers={"Location": "/a.png"})
        if request.url.path == "/a.png":
            return httpx.Response(200, content=content)
        if request.url.path == "/page":
            return httpx.Response(200, content=b"<html>")
        if request.url.path == "/large":
            return httpx.Response(200, content=bytes(2000))
        return httpx.Response(404)

    client = httpx.Client(transport=httpx.MockTransport(answer))
    monkeypatch.setattr(httpx, "stream", client.stream)
    monkeypatch.setattr("mllm_fast.core.image_urls.MAX_BYTES", 1000)
    for url in ("https://a.test/a.png", "HTTP://a.test/moved"):
        assert (grey(load_image(url)) == RAMP).all()
    for url, message in (
        ("https://a.test/none.png", "answered with 404"),
        ("https://a.test/page", "not an image"),
        ("https://a.test/large", "at most 1,000 bytes"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_image(url)
        assert "no such file" not in str(caught.value)
    client.close()
