"""Image files made up by hypothesis: they have the right colour, or one line says what is wrong.

What is in an image is known without Pillow: it has one colour, computed by hand.
"""

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import InputError
from dataloaders import load_dataset

REPRODUCIBLE = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
MANY = [50, pytest.param(400, marks=pytest.mark.slow)]
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".PNG")


class Picture(NamedTuple):
    """The bytes of an image file, the colour that it must be read as, and how far from it."""

    content: bytes
    rgb: tuple[float, float, float]
    tolerance: int = 0


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(size, depth, colour, samples):
    """A PNG written by hand: bits of a sample, PNG's number of the colour type, one pixel."""
    bits = "".join(format(x, f"0{depth}b") for x in samples) * size[0]
    row = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress((b"\0" + row) * size[1])), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


byte, word = st.integers(0, 255), st.integers(0, 65535)
colours = st.tuples(byte, byte, byte)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
LOSSLESS = {"WEBP": {"lossless": True, "exact": True}}


@st.composite
def grey(draw):
    """Grey of 8 bits, and two colours."""
    size, value = draw(sizes), draw(byte)
    kind = draw(st.sampled_from(["PNG", "TIFF", "BMP", "PPM", "JPEG"]))
    if kind == "JPEG":
        return Picture(encoded(Image.new("L", size, value), kind, quality=100), (value,) * 3, 1)
    mode, value = draw(st.sampled_from([("L", value), ("1", 255 * (value % 2))]))
    return Picture(encoded(Image.new(mode, size, value), kind), (value,) * 3)


@st.composite
def grey_of_other_depths(draw):
    """Grey of 1, 2, 4 or 16 bits; Pillow takes the first 8 of 16 bits that have transparency."""
    depth = draw(st.sampled_from([1, 2, 4, 16]))
    value, size = draw(st.integers(0, 2**depth - 1)), draw(sizes)
    if depth < 16:
        return Picture(png(size, depth, 0, (value,)), (value * (255 // (2**depth - 1)),) * 3)
    pixels = np.full(size[::-1], value, draw(st.sampled_from(["<u2", ">u2"])))
    content = draw(st.sampled_from([
        png(size, 16, 0, (value,)), encoded(Image.fromarray(pixels), "PNG"),
        encoded(Image.fromarray(pixels), "TIFF"),
        b"P5 %d %d 65535\n" % size + pixels.astype(">u2").tobytes(),
    ]))  # fmt: skip
    if draw(st.booleans()):
        return Picture(png(size, 16, 4, (value, draw(word))), (value >> 8,) * 3)
    return Picture(content, (value // 257,) * 3)


@st.composite
def colour(draw):
    """RGB of 8 bits in one frame or two, or of 16 bits, of which Pillow takes the first 8."""
    rgb, size = draw(colours), draw(sizes)
    if draw(st.booleans()):
        alpha = [draw(word)] if draw(st.booleans()) else []
        samples = [256 * x + draw(byte) for x in rgb]
        return Picture(png(size, 16, 6 if alpha else 2, samples + alpha), rgb)
    kind = draw(st.sampled_from(["PNG", "TIFF", "BMP", "PPM", "WEBP", "GIF", "JPEG"]))
    options = {"JPEG": {"quality": 100}, "TIFF": {"compression": "tiff_lzw"}} | LOSSLESS
    if kind in ("PNG", "TIFF", "WEBP", "GIF") and draw(st.booleans()):
        options = {kind: {"save_all": True, "append_images": [Image.new("RGB", size, 255)]}
                         | LOSSLESS.get(kind, {})}  # fmt: skip
    content = encoded(Image.new("RGB", size, rgb), kind, **options.get(kind, {}))
    return Picture(content, rgb, 3 if kind == "JPEG" else 0)


@st.composite
def transparent(draw):
    """The colour counts, even where it cannot be seen."""
    rgb, alpha, size = draw(colours), draw(byte), draw(sizes)
    kind = draw(st.sampled_from(["PNG", "TIFF", "WEBP"]))
    if kind != "WEBP" and draw(st.booleans()):
        return Picture(encoded(Image.new("LA", size, (rgb[0], alpha)), kind), rgb[:1] * 3)
    image = Image.new("RGBA", size, (*rgb, alpha))
    return Picture(encoded(image, kind, **LOSSLESS.get(kind, {})), rgb)


@st.composite
def palette(draw):
    colour_of, index = draw(st.lists(colours, min_size=256, max_size=256)), draw(byte)
    image = Image.new("P", draw(sizes), index)
    image.putpalette([x for rgb in colour_of for x in rgb])
    kind = draw(st.sampled_from(["PNG", "TIFF", "BMP"]))
    see_through = st.one_of(st.none(), byte, st.binary(min_size=1, max_size=256))
    options = {"transparency": draw(see_through)} if kind == "PNG" else {}
    return Picture(encoded(image, kind, **options), colour_of[index])


@st.composite
def other_colour_spaces(draw):
    first, second, third = draw(colours)
    if draw(st.booleans()):
        y, cb, cr = first, second - 128, third - 128
        image = Image.new("YCbCr", draw(sizes), (first, second, third))
        rgb = (y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb)
        return Picture(encoded(image, "TIFF"), tuple(min(max(x, 0), 255) for x in rgb), 2)
    k = draw(byte)
    image = Image.new("CMYK", draw(sizes), (first, second, third, k))
    rgb = tuple((255 - x) * (255 - k) / 255 for x in (first, second, third))
    kind, tolerance = draw(st.sampled_from([("TIFF", 1), ("JPEG", 4)]))
    options = {"quality": 100} if kind == "JPEG" else {}
    return Picture(encoded(image, kind, **options), rgb, tolerance)


pictures = st.one_of(
    grey(), grey_of_other_depths(), colour(), transparent(), palette(), other_colour_spaces()
)


@st.composite
def damaged(draw):
    """A picture of which something is cut off or changed, or bytes that never were one."""
    content = bytearray(draw(pictures).content)
    if draw(st.booleans()):
        return bytes(content[: draw(st.integers(0, len(content) - 1))])
    for _ in range(draw(st.integers(1, 8))):
        content[draw(st.integers(0, min(len(content), 400) - 1))] = draw(byte)
    return draw(st.sampled_from([bytes(content), draw(st.binary(max_size=64))]))


def write(folder, contents, suffix):
    """Make a data set of which the training images have these contents."""
    for part in ("train", "test"):
        (folder / part / "a").mkdir(parents=True, exist_ok=True)
        for old in (folder / part / "a").iterdir():
            old.unlink()
    for number, content in enumerate(contents):
        (folder / "train" / "a" / f"{number:02}{suffix}").write_bytes(content)
    Image.new("L", (1, 1)).save(folder / "test" / "a" / "0.png")
    return folder


@pytest.mark.parametrize("examples", MANY)
def test_an_image_has_its_colour(tmp_path, examples):
    @settings(REPRODUCIBLE, max_examples=examples)
    @given(
        st.lists(pictures, min_size=1, max_size=6),
        st.sampled_from(SUFFIXES),
        st.sampled_from([1, 8, 33]),
    )
    def check(found, suffix, size):
        folder = write(tmp_path, [picture.content for picture in found], suffix)
        images = load_dataset("folder", folder, size).train.images
        assert (images.shape, images.dtype) == ((len(found), 3, size, size), torch.uint8)
        for image, picture in zip(images, found, strict=True):
            off = (image - torch.tensor(picture.rgb)[:, None, None]).abs().max()
            assert off <= picture.tolerance, (picture.rgb, image[:, 0, 0].tolist())

    check()


@pytest.mark.parametrize("examples", MANY)
def test_a_damaged_image_is_read_or_one_line_names_it(tmp_path, monkeypatch, examples):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # for headers that claim more

    @settings(REPRODUCIBLE, max_examples=examples)
    @given(damaged(), st.sampled_from(SUFFIXES))
    def check(content, suffix):
        try:
            data = load_dataset("folder", write(tmp_path, [content], suffix), 8)
        except InputError as error:
            assert f"00{suffix} is not an image that can be read" in str(error)
            assert str(error).isprintable()
        else:
            assert data.train.images.shape == (1, 3, 8, 8)
            assert content

    check()
