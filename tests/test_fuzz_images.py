"""Image files made up by hypothesis: they have the right colour, or one line says what is wrong.

What is in an image is known without Pillow: it has one colour, computed by hand.
"""

import io
import shutil
import struct
import zlib
from typing import NamedTuple

import PIL
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import InputError
from dataloaders import load_dataset

REPRODUCIBLE = settings(
    max_examples=100, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # Pillow's are kept from the user
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

    def chunk(name, data):
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    bits = "".join(format(x, f"0{depth}b") for x in samples) * size[0]
    bits += "0" * (-len(bits) % 8)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(row * size[1]))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


byte = st.integers(0, 255)
colours = st.tuples(byte, byte, byte)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
KINDS = {
    "1": ["PNG", "TIFF", "BMP", "PPM"], "L": ["PNG", "TIFF", "BMP", "PPM", "JPEG"],
    "LA": ["PNG", "TIFF"], "RGBA": ["PNG", "TIFF", "WEBP"],
    "RGB": ["PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG"],
}  # fmt: skip
OPTIONS = {
    "JPEG": {"quality": 100}, "TIFF": {"compression": "tiff_lzw"},
    "WEBP": {"lossless": True, "exact": True},
}  # fmt: skip


@st.composite
def of_8_bits(draw):
    """Grey or colour, which counts even where it cannot be seen; a second frame does not."""
    mode = draw(st.sampled_from(sorted(KINDS)))
    kind, size = draw(st.sampled_from(KINDS[mode])), draw(sizes)
    rgb, alpha = draw(colours), draw(byte)
    if mode in ("1", "L", "LA"):
        rgb = (255 * (rgb[0] % 2) if mode == "1" else rgb[0],) * 3
    pixel = {"LA": (rgb[0], alpha), "RGB": rgb, "RGBA": (*rgb, alpha)}.get(mode, rgb[0])
    options = dict(OPTIONS.get(kind, {}))
    if mode == "RGB" and kind in ("PNG", "TIFF", "WEBP", "GIF") and draw(st.booleans()):
        options |= {"save_all": True, "append_images": [Image.new("RGB", size, 255)]}
    content = encoded(Image.new(mode, size, pixel), kind, **options)
    return Picture(content, rgb, 3 if kind == "JPEG" else 0)


@st.composite
def of_other_depths(draw):
    """1, 2 or 4 bits of grey, or 16 bits, of which Pillow takes the first 8 if not just grey."""
    depth, size = draw(st.sampled_from([1, 2, 4, 16])), draw(sizes)
    value, *others = (draw(st.integers(0, 2**depth - 1)) for _ in range(4))
    kinds = [(0, 1), (2, 3), (4, 2), (6, 4)] if depth == 16 else [(0, 1)]
    colour, samples = draw(st.sampled_from(kinds))  # grey, RGB, grey and alpha, RGBA
    content = png(size, depth, colour, [value, *others][:samples])
    if colour == 0:
        return Picture(content, (255 * value // (2**depth - 1),) * 3)
    rgb = (value,) * 3 if colour == 4 else (value, *others[:2])
    return Picture(content, tuple(x >> 8 for x in rgb))


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
    if draw(st.booleans()) and not PIL.__version__.startswith("12."):  # which can't read its own
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


pictures = st.one_of(of_8_bits(), of_other_depths(), palette(), other_colour_spaces())


@st.composite
def damaged(draw):
    """A picture of which something is cut off or changed, or bytes that never were one."""
    content = bytearray(draw(pictures).content)
    if draw(st.booleans()):
        return bytes(content[: draw(st.integers(0, len(content) - 1))])
    for _ in range(draw(st.integers(1, 8))):
        content[draw(st.integers(0, min(len(content), 400) - 1))] = draw(byte)
    return draw(st.sampled_from([bytes(content), draw(st.binary(max_size=64))]))


def load(folder, contents, suffix, size):
    """The test images of a data set whose files have these contents."""
    shutil.rmtree(folder / "test", ignore_errors=True)
    (folder / "test" / "a").mkdir(parents=True)
    for number, content in enumerate(contents):
        (folder / "test" / "a" / f"{number:02}{suffix}").write_bytes(content)
    return load_dataset("folder", folder, size, test_only=True).test.images


@REPRODUCIBLE
@given(
    st.lists(pictures, min_size=1, max_size=6),
    st.sampled_from(SUFFIXES),
    st.sampled_from([1, 8, 33]),
)
def test_an_image_has_its_colour(tmp_path, found, suffix, size):
    images = load(tmp_path, [picture.content for picture in found], suffix, size)
    assert (images.shape, images.dtype) == ((len(found), 3, size, size), torch.uint8)
    for image, picture in zip(images, found, strict=True):
        off = (image - torch.tensor(picture.rgb)[:, None, None]).abs().max()
        assert off <= picture.tolerance, (picture.rgb, image[:, 0, 0].tolist())


@REPRODUCIBLE
@given(damaged(), st.sampled_from(SUFFIXES))
def test_a_damaged_image_is_read_or_one_line_names_it(tmp_path, monkeypatch, content, suffix):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # for headers that claim more
    try:
        images = load(tmp_path, [content], suffix, 8)
    except InputError as error:
        assert f"00{suffix} is not an image that can be read" in str(error)
        assert str(error).isprintable()
    else:
        assert images.shape == (1, 3, 8, 8)
        assert content
