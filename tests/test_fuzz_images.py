"""Folders of images made up by hypothesis: they load as they should, or one line says why not.

What is in the images is known without Pillow: each has one colour, worked out by hand.
"""

import contextlib
import io
import os
import signal
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import InputError
from dataloaders import load_dataset

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""As README promises."""

reproducible = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# ---------------------------------------------------------------------------------------------
# Images of one colour


@dataclass(frozen=True)
class Picture:
    """The bytes of an image file, the colour that it has to be read as, and how far from it."""

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


byte = st.integers(0, 255)
colours = st.tuples(byte, byte, byte)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@st.composite
def grey(draw):
    size, value = draw(sizes), draw(byte)
    kind, lossy = draw(st.sampled_from([("PNG", 0), ("TIFF", 0), ("BMP", 0), ("PPM", 0),
                                        ("JPEG", 1)]))  # fmt: skip
    options = {"quality": 100} if lossy else {}
    return Picture(encoded(Image.new("L", size, value), kind, **options), (value,) * 3, lossy)


@st.composite
def grey_of_other_depths(draw):
    """1, 2, 4 or 16 bits, as PNG written by hand, with transparency where PNG has it."""
    depth = draw(st.sampled_from([1, 2, 4, 16]))
    value = draw(st.integers(0, 2**depth - 1))
    if depth == 16 and draw(st.booleans()):  # Pillow takes the first 8 bits of these
        content = png(draw(sizes), 16, 4, (value, draw(st.integers(0, 65535))))
        return Picture(content, (value >> 8,) * 3)
    grey = value // 257 if depth == 16 else value * (255 // (2**depth - 1))
    return Picture(png(draw(sizes), depth, 0, (value,)), (grey,) * 3)


@st.composite
def grey_of_16_bits(draw):
    size, value = draw(sizes), draw(st.integers(0, 65535))
    pixels = np.full(size[::-1], value, draw(st.sampled_from(["<u2", ">u2"])))
    if draw(st.booleans()):
        content = encoded(Image.fromarray(pixels), draw(st.sampled_from(["PNG", "TIFF"])))
    else:
        content = b"P5 %d %d 65535\n" % size + pixels.astype(">u2").tobytes()
    return Picture(content, (value // 257,) * 3)


@st.composite
def two_colours(draw):
    value = draw(st.integers(0, 1))
    kind = draw(st.sampled_from(["PNG", "TIFF", "BMP", "PPM"]))
    return Picture(encoded(Image.new("1", draw(sizes), value), kind), (255 * value,) * 3)


@st.composite
def colour(draw):
    rgb, size = draw(colours), draw(sizes)
    if draw(st.booleans()):  # of 16 bits, of which Pillow takes the first 8
        alpha = [draw(st.integers(0, 65535))] if draw(st.booleans()) else []
        samples = [256 * x + draw(byte) for x in rgb]
        return Picture(png(size, 16, 6 if alpha else 2, samples + alpha), rgb)
    kind, tolerance, options = draw(
        st.sampled_from([("PNG", 0, {}), ("TIFF", 0, {"compression": "tiff_lzw"}), ("BMP", 0, {}),
                         ("PPM", 0, {}), ("WEBP", 0, {"lossless": True}), ("GIF", 0, {}),
                         ("JPEG", 3, {"quality": 100})])
    )  # fmt: skip
    return Picture(encoded(Image.new("RGB", size, rgb), kind, **options), rgb, tolerance)


@st.composite
def transparent(draw):
    """The colour is what counts, even where nothing of it can be seen."""
    rgb, alpha, size = draw(colours), draw(byte), draw(sizes)
    if draw(st.booleans()):
        image = Image.new("LA", size, (rgb[0], alpha))
        return Picture(encoded(image, draw(st.sampled_from(["PNG", "TIFF"]))), rgb[:1] * 3)
    kind, options = draw(
        st.sampled_from([("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})])
    )
    return Picture(encoded(Image.new("RGBA", size, (*rgb, alpha)), kind, **options), rgb)


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
def cmyk(draw):
    c, m, y, k = draw(st.tuples(byte, byte, byte, byte))
    image = Image.new("CMYK", draw(sizes), (c, m, y, k))
    rgb = tuple((255 - x) * (255 - k) / 255 for x in (c, m, y))
    if draw(st.booleans()):
        return Picture(encoded(image, "TIFF"), rgb, 1)
    return Picture(encoded(image, "JPEG", quality=100), rgb, 4)


@st.composite
def ycbcr(draw):
    y, cb, cr = draw(colours)
    green = y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128)
    rgb = (y + 1.402 * (cr - 128), green, y + 1.772 * (cb - 128))
    image = Image.new("YCbCr", draw(sizes), (y, cb, cr))
    return Picture(encoded(image, "TIFF"), tuple(min(max(x, 0), 255) for x in rgb), 2)


@st.composite
def several_frames(draw):
    first, second, size = draw(colours), draw(colours), draw(sizes)
    frames = [Image.new("RGB", size, rgb) for rgb in (first, second)]
    kind = draw(st.sampled_from(["PNG", "WEBP", "TIFF", "GIF"]))
    options = {"lossless": True} if kind == "WEBP" else {}
    return Picture(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options),
                   first)  # fmt: skip


pictures = st.one_of(
    grey(), grey_of_other_depths(), grey_of_16_bits(), two_colours(), colour(), transparent(),
    palette(), cmyk(), ycbcr(), several_frames(),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Folders


@dataclass(frozen=True)
class Entry:
    """What a folder of a class holds under a name.

    `what` is file, link (to a file that holds the content), folder, nowhere (a link that leads
    there), loop, pipe or device. `fate` is good, bad, or unknown where a file is damaged.
    """

    name: str
    what: str
    picture: Picture
    fate: str

    @property
    def has_images_name(self):
        return not self.name.startswith(".") and self.name.lower().endswith(SUFFIXES)

    def make(self, where, elsewhere):
        path = where / self.name
        if self.what == "file":
            path.write_bytes(self.picture.content)
        elif self.what == "link":
            target = elsewhere / str(len(list(elsewhere.iterdir())))
            target.write_bytes(self.picture.content)
            path.symlink_to(target)
        elif self.what == "folder":
            path.mkdir()
        elif self.what == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to({"nowhere": "is nowhere", "loop": self.name, "device": "/dev/zero"}
                            [self.what])  # fmt: skip


odd = st.sampled_from([
    "-rf", "--", " ", "a b", "'", '"', "\\", "$(x)", "%s%d", "{0}", "con", "~", "*", "..a", "a.",
    ".hidden", "new\nline", "\r", "\t", "\x1b[2J", "\x85", "\u2028", "\u202e", "ä", "漢字", "🐈",
    os.fsdecode(b"\xff\xfe"), os.fsdecode(b"\xc3"), "x" * 240,
])  # fmt: skip
stems = st.one_of(
    odd,
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1,
            max_size=12),
    st.binary(min_size=1, max_size=12).map(
        lambda name: os.fsdecode(name.translate(None, b"/\0") or b"_")
    ),
)  # fmt: skip
suffixes = st.sampled_from([*SUFFIXES, ".PNG", ".Jpeg"])
image_names = st.builds(str.__add__, stems, suffixes)
other_names = st.builds(str.__add__, stems, st.sampled_from([".txt", ".gif", ".png ", ".npy"]))
class_names = stems.filter(lambda name: not name.startswith("."))


@st.composite
def damaged(draw, picture):
    """Some of it cut off, or some bytes of it changed."""
    content = bytearray(picture.content)
    if draw(st.booleans()):
        return Picture(bytes(content[: draw(st.integers(0, len(content) - 1))]), picture.rgb)
    for _ in range(draw(st.integers(1, 8))):
        content[draw(st.integers(0, min(len(content), 400) - 1))] = draw(byte)
    return Picture(bytes(content), picture.rgb)


@st.composite
def entries(draw, harmless):
    """Harmless ones, or whatever there may be."""
    picture = draw(pictures)
    kinds = ["image", "image", "image", "other", "folder"]
    if not harmless:
        kinds += ["damaged", "damaged", "nonsense", "empty", "nowhere", "loop", "pipe", "device"]
    kind = draw(st.sampled_from(kinds))
    if kind == "other":
        what = st.sampled_from(["file", "folder", "nowhere", "loop", "pipe", "device"])
        return Entry(draw(other_names), draw(what), picture, "good")
    name = draw(image_names)
    if kind == "image":
        return Entry(name, draw(st.sampled_from(["file", "link"])), picture, "good")
    if kind == "damaged":
        return Entry(name, "file", draw(damaged(picture)), "unknown")
    if kind in ("nonsense", "empty"):
        content = draw(st.binary(min_size=1, max_size=64)) if kind == "nonsense" else b""
        fate = "unknown" if kind == "nonsense" else "bad"
        return Entry(name, "file", Picture(content, (0, 0, 0)), fate)
    return Entry(name, kind, picture, "good" if kind == "folder" else "bad")


@st.composite
def parts(draw, names, harmless):
    """Class -> what is in it, for one part of a data set."""
    listed = st.lists(entries(harmless), min_size=1, max_size=4, unique_by=lambda e: e.name)
    if harmless:
        listed = listed.filter(lambda e: any(x.what in ("file", "link") and x.has_images_name
                                             for x in e))  # fmt: skip
    return {name: draw(listed) for name in names}


@st.composite
def data_sets(draw, harmless):
    """train and test, each as `parts` has it."""
    names = draw(st.lists(class_names, min_size=1, max_size=2, unique=True))
    others = names
    if not harmless and draw(st.integers(0, 9)) == 0:
        others = draw(st.lists(class_names, min_size=1, max_size=2, unique=True))
    return {"train": draw(parts(names, harmless)), "test": draw(parts(others, harmless))}


@contextlib.contextmanager
def made(data_set):
    """The path of a data set while it is there; nothing may change it meanwhile, or take long."""
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = Path(folder) / "elsewhere"
        elsewhere.mkdir()
        for part, classes in data_set.items():
            for name, listed in classes.items():
                where = Path(folder) / part / name
                where.mkdir(parents=True)
                for entry in listed:
                    entry.make(where, elsewhere)
        before = state(folder)
        with no_longer_than(seconds=20):
            yield Path(folder)
        assert state(folder) == before


def state(folder):
    found = {}
    for path in Path(folder).rglob("*"):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[path] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


@contextlib.contextmanager
def no_longer_than(seconds):
    def stop(*_):
        raise TimeoutError(f"takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def to_be_read(classes):
    """(class, entry) for what should be read, in order."""
    return [
        (index, entry)
        for index, name in enumerate(sorted(classes))
        for entry in sorted(classes[name], key=lambda entry: entry.name)
        if entry.has_images_name and entry.what != "folder"
    ]


def check_split(split, classes, image_size):
    """Everything of these classes is there, and what is whole has its colour."""
    expected = to_be_read(classes)
    assert split.images.shape == (len(expected), 3, image_size, image_size)
    assert (split.images.dtype, split.targets.dtype) == (torch.uint8, torch.int64)
    assert split.targets.tolist() == [index for index, _ in expected]
    for image, (_, entry) in zip(split.images, expected, strict=True):
        if entry.fate == "good":
            colour = torch.tensor(entry.picture.rgb)[:, None, None]
            off = (image - colour).abs().max().item()
            assert off <= entry.picture.tolerance, (entry.picture.rgb, image[:, 0, 0].tolist())


image_sizes = st.sampled_from([1, 8, 33])


@settings(reproducible, max_examples=150)
@given(data_sets(harmless=True), image_sizes)
def test_a_folder_of_whole_images_loads(data_set, image_size):
    with made(data_set) as folder:
        data = load_dataset("folder", folder, image_size)
    assert data.classes == sorted(data_set["train"])
    check_split(data.train, data_set["train"], image_size)
    check_split(data.test, data_set["test"], image_size)


def has_to_fail(data_set):
    """Whether something is wrong for certain."""
    parts = data_set.values()
    return (
        len({frozenset(classes) for classes in parts}) == 2
        or any(not to_be_read({"": listed}) for part in parts for listed in part.values())
        or any(e.fate == "bad" for part in parts for _, e in to_be_read(part))
    )


def may_fail(data_set):
    return any(e.fate == "unknown" for part in data_set.values() for _, e in to_be_read(part))


@settings(reproducible, max_examples=300)
@given(data_sets(harmless=False), image_sizes)
def test_any_folder_loads_or_one_line_says_why_not(data_set, image_size):
    with made(data_set) as folder, few_pixels():
        try:
            data = load_dataset("folder", folder, image_size)
        except InputError as error:
            assert has_to_fail(data_set) or may_fail(data_set), error
            assert str(error).isprintable()
            assert str(error).encode()
            return
    assert not has_to_fail(data_set)
    check_split(data.train, data_set["train"], image_size)
    check_split(data.test, data_set["test"], image_size)


@contextlib.contextmanager
def few_pixels():
    """A damaged header may claim a size that takes long to decode."""
    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 10**6
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = most
