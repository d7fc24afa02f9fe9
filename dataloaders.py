"""Data sets as uint8 tensors, decoded once, and batches, augmented on the training device.

`load_dataset` returns a training and a test `Split`. `Batches` iterates over a split: it copies
bytes to the device and pads, crops, flips and normalises each batch there. Copies to a CUDA device
overlap with the computation on the batch before.
"""

import os
import tarfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import find_classes, is_image_file

from configs import DATASETS, DatasetConfig, InputError, one_line, printable


class Split(NamedTuple):
    """Images (N, 3, S, S) uint8 and class indices (N,) int64, both on the CPU."""

    images: Tensor
    targets: Tensor


class ImageData(NamedTuple):
    """A data set: both splits, and the names of the classes in the order of their indices."""

    train: Split
    test: Split
    classes: list[str]


# ---------------------------------------------------------------------------------------------
# Reading


def load_dataset(
    name: str,
    data_dir: str | Path,
    image_size: int,
    limit_per_class: int | None = None,
    test_only: bool = False,
) -> ImageData:
    """Read a data set; download it first if it is not there and torchvision can.

    Args:
        name: a name in `configs.DATASETS`.
        data_dir: where the files are, or go.
        image_size: side to which the images of `folder` are resized.
        limit_per_class: keep the first so many training images of each class, in file order.
        test_only: do not read the training images of `folder`; its training split is empty.
    Raises:
        InputError: the data cannot be downloaded or read.
    """
    data_dir = Path(data_dir)
    if name == "folder":
        return _folder(data_dir, image_size, limit_per_class, test_only)
    check_image_size(name, image_size)
    read = DATASETS[name].read or READERS[name]
    data = read(data_dir)
    kept = first_of_each_class(data.train.targets, limit_per_class)
    return data._replace(train=Split(data.train.images[kept], data.train.targets[kept]))


def check_image_size(name: str, image_size: int) -> None:
    """Raise InputError if a data set, other than `folder`, has images of another size."""
    native = DATASETS[name].image_size
    if name != "folder" and image_size != native:
        raise InputError(f"{name} has images of {native}x{native}; image_size is for folder")


def first_of_each_class(targets: Tensor, limit: int | None) -> Tensor:
    """Return the indices, ascending, of the first `limit` samples of each class; None for all."""
    if limit is None:
        return torch.arange(len(targets))
    kept = [(targets == c).nonzero().flatten()[:limit] for c in targets.unique()]
    return torch.cat(kept).sort().values


DIGITS = [str(digit) for digit in range(10)]
STL10 = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


def _digits(data_dir: Path) -> ImageData:
    """Return scikit-learn's 8x8 grey images, enlarged by 4, in a stratified 80/20 split."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        what = "scikit-learn is not installed, which has digits: pip install scikit-learn, or "
        raise InputError(f"{what}choose another --dataset") from error
    digits = load_digits()
    grey = torch.from_numpy(digits.images) * (255 / 16)  # 17 levels, 0..16
    images = grey.round().to(torch.uint8)[:, None].repeat(1, 3, 1, 1)
    images = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    targets = torch.from_numpy(digits.target).long()
    rows = train_test_split(
        np.arange(len(targets)), test_size=0.2, random_state=0, stratify=digits.target
    )
    train, test = (Split(images[part], targets[part]) for part in map(np.sort, rows))
    return ImageData(train, test, DIGITS)


def _read_split(name: str, root: Path, train: bool, download: bool) -> tuple[Split, list[str]]:
    """Return the training or test split of a data set of torchvision, and the names of its classes.

    torchvision checks the MD5 of archives before it extracts them, and that of SVHN's and CIFAR's
    files before it reads them: CIFAR's are pickles, which could run code.
    """
    dataset = getattr(datasets, name.upper())
    if name.startswith("cifar"):
        part = dataset(root, train, download=download)
        images, targets, classes = part.data.transpose(0, 3, 1, 2), part.targets, part.classes
    else:
        part = dataset(root, "train" if train else "test", download=download)
        images, targets = part.data, part.labels
        classes = STL10 if name == "stl10" else DIGITS
    return Split(torch.from_numpy(images).contiguous(), torch.as_tensor(targets).long()), classes


def _download(name: str, data_dir: Path) -> ImageData:
    """Return a data set of torchvision; raise InputError if it cannot be downloaded or read.

    A Python that cannot extract archives safely only reads files that are there already.
    """
    can_extract = hasattr(tarfile, "data_filter")
    before = vars(tarfile.TarFile).get("extraction_filter")
    tarfile.TarFile.extraction_filter = staticmethod(_safe_filter)
    try:
        root = data_dir.absolute()  # torchvision would expand a leading ~
        (train, classes), (test, _) = (
            _read_split(name, root, part, can_extract) for part in (True, False)
        )
    except Exception as error:  # these libraries do not document what they raise
        remedy = "check the network" if can_extract else "take Python 3.11.4 or later to extract it"
        raise _input_error(
            f"{name} is not in {data_dir} and could not be downloaded and read "
            f"({one_line(error)}); {remedy}, or put the files there by hand and give their folder "
            "as data_dir"
        ) from error
    finally:
        tarfile.TarFile.extraction_filter = before
    return ImageData(train, test, classes)


def _safe_filter(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
    """Let `tarfile` extract only files and folders, and only inside the target folder.

    Links are refused too: some versions of `tarfile.data_filter` can be led outside by them.
    """
    if not (member.isreg() or member.isdir()):
        raise tarfile.FilterError(f"{member.name!r} is neither a file nor a folder")
    return tarfile.data_filter(member, path)


def _input_error(message: str) -> InputError:
    """Return an error whose message is one printable line, whatever the names of files in it."""
    return InputError(printable(message))


READERS: dict[str, Callable[[Path], ImageData]] = {
    "digits": _digits,
    **{name: partial(_download, name) for name in ("cifar10", "cifar100", "svhn", "stl10")},
}
"""Data set -> function that reads it from a folder, unless its entry in DATASETS has one."""


# ---------------------------------------------------------------------------------------------
# `folder`: the user's images in train/<class>/* and test/<class>/*


def _folder(
    data_dir: Path, image_size: int, limit_per_class: int | None, test_only: bool
) -> ImageData:
    test = _list_images(data_dir / "test")
    train = _list_images(data_dir / "train") if not test_only else {name: [] for name in test}
    if differ := sorted(train.keys() ^ test.keys()):
        raise _input_error(
            f"train and test in {data_dir} must have the same classes, but only one of them has "
            f"{', '.join(differ)}"
        )
    train = {name: paths[:limit_per_class] for name, paths in train.items()}
    return ImageData(_decode(train, image_size), _decode(test, image_size), list(test))


def count_classes(data_dir: str | Path, part: str = "train") -> int:
    """Return the number of classes in a part of a `folder` data set.

    Raises InputError if there are none, or one has no images.
    """
    return len(_list_images(Path(data_dir) / part))


def count_images(name: str, data_dir: str | Path, limit_per_class: int | None = None) -> int:
    """Return the number of training images that `load_dataset` returns, without reading them."""
    counts = DATASETS[name].per_class or [
        len(paths) for paths in _list_images(Path(data_dir) / "train").values()
    ]
    return sum(min(count, limit_per_class or count) for count in counts)


def _list_images(folder: Path) -> dict[str, list[Path]]:
    """Return the image files of each class, sorted by name. Links are followed.

    Hidden files and folders are left out: desktops and notebooks make them (._0.jpg,
    .ipynb_checkpoints). So are folders in that of a class: torchvision's make_dataset would walk
    through them, and never end where links lead in circles.

    Raises InputError if there are no classes, or one has no images.
    """
    try:
        classes = [name for name in find_classes(folder)[0] if not name.startswith(".")]
        files = {name: sorted(filter(_is_image, (folder / name).iterdir())) for name in classes}
        if not files or not all(files.values()):
            empty = [name for name, paths in files.items() if not paths]
            raise FileNotFoundError(f"there is no image of {', '.join(empty) or 'any class'}")
    except OSError as error:
        raise _input_error(
            f"cannot read the images in {folder}: {one_line(error)}; data_dir must hold "
            "train/<class>/* and test/<class>/*"
        ) from error
    return files


def _is_image(path: Path) -> bool:
    return is_image_file(path.name) and not path.name.startswith(".") and not path.is_dir()


def _decode(files: dict[str, list[Path]], image_size: int) -> Split:
    paths = [path for of_class in files.values() for path in of_class]
    targets = [index for index, of_class in enumerate(files.values()) for _ in of_class]
    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)

    def decode_into(index: int) -> None:
        images[index] = _decode_image(paths[index], image_size)

    # Pillow decodes outside Python's lock. Each thread holds an image: os.cpu_count would start too
    # many, because it counts CPUs that this process may not use.
    available = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    with warnings.catch_warnings(), ThreadPool(len(available(0))) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what cannot be read is an error below
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        pool.map(decode_into, range(len(paths)), chunksize=64)
    return Split(images, torch.tensor(targets, dtype=torch.int64))


def _decode_image(path: Path, image_size: int) -> Tensor:
    """Return an image as (3, image_size, image_size) uint8 RGB; resizing may change its aspect.

    Only the first of several frames is read. Transparency is dropped, colours stay.
    """
    try:
        if not path.is_file():  # reading a pipe may never end
            raise ValueError("it is not a file, or a link to one")
        with Image.open(path) as image:
            if image.format == "EPS":  # with any suffix; Pillow would run Ghostscript
                raise ValueError("it is PostScript, a program; convert it")
            image = _eight_bits(image).convert("RGB")
        if image.size != (image_size, image_size):
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    except Exception as error:  # Pillow does not document what its decoders raise
        raise _input_error(f"{path} is not an image that can be read: {one_line(error)}") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, which Pillow would clip; raise ValueError for 32 bits."""
    is_pgm = image.mode == "I" and image.format == "PPM"  # Pillow has scaled these to 16 bits
    if image.mode.startswith("I;16") or is_pgm:
        return Image.fromarray((np.array(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits or a sign; convert it to 8 or 16 without")
    return image


# ---------------------------------------------------------------------------------------------
# Batches


class Batches:
    """Batches of a split on `device`, normalised, and optionally augmented and shuffled.

    Args:
        data: has padding, flip, mean and std.
        batch_size: samples in a batch; the last one may have fewer.
        seed: seed of order, crops and flips, together with the epoch.
        augment: crop the padded images at random, and flip them if `data` says so.
        shuffle: draw a new order in each epoch.
        on_device: copy the split to `device` now, instead of batch by batch.
        share: (rank, world_size): return only this rank's part of each batch.
    Raises:
        InputError: a batch has fewer samples than there are ranks.
    Attributes:
        device_bytes: memory of the split on `device` if `on_device`, else 0.
    """

    def __init__(
        self,
        split: Split,
        data: DatasetConfig,
        batch_size: int,
        device: torch.device,
        *,
        seed: int = 0,
        augment: bool = False,
        shuffle: bool = False,
        channels_last: bool = False,
        on_device: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.split = Split(*(x.to(device) for x in split)) if on_device else split
        self.data, self.batch_size, self.device, self.share = data, batch_size, device, share
        self.seed, self.augment, self.shuffle = seed, augment, shuffle
        self.channels_last = channels_last
        self.device_bytes = sum(x.nbytes for x in self.split) if on_device else 0
        self.mean, self.std = (self._as_image(x) for x in (data.mean, data.std))
        self._copies = CudaCopies(device) if device.type == "cuda" and not on_device else None
        fewest = min(self.sizes(), default=share[1])
        if fewest < share[1]:
            raise InputError(
                f"{len(split.targets)} samples in batches of {batch_size} leave a batch of "
                f"{fewest} to {share[1]} processes: choose a batch size that gives each of them "
                "a sample in every batch, or run fewer processes"
            )

    def __len__(self) -> int:
        return -(-len(self.split.targets) // self.batch_size)

    def sizes(self) -> list[int]:
        """Return the number of samples in each batch of an epoch, of all ranks together."""
        full, rest = divmod(len(self.split.targets), self.batch_size)
        return [self.batch_size] * full + [rest] * bool(rest)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over images (N, 3, S, S) float32 and targets (N,) int64, from batch `skip` on.

        Order, crops and flips depend on seed and epoch only, not on device, batch size or share:
        every rank draws them for all samples.
        """
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch, stream=0))
        count, pad = len(self.split.targets), self.data.pad
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        corners = torch.randint(2 * pad + 1, (count, 2), generator=generator).to(self.device)
        flips = (torch.rand(count, generator=generator) < 0.5).to(self.device)
        start, (rank, world_size) = skip * self.batch_size, self.share
        if start >= count:
            return iter(())

        def shares(drawn: Tensor) -> list[Tensor]:
            """Return this rank's part of each batch of a tensor (count, ...)."""
            batches = drawn[start:].split(self.batch_size)
            return [batch.tensor_split(world_size)[rank] for batch in batches]

        rows = shares(order.to(self.split.images.device))
        if self._copies is not None:
            samples = self._copies.of_rows(self.split, rows)
        else:
            samples = ([x.index_select(0, part) for x in self.split] for part in rows)
        return map(self._prepare, samples, shares(corners), shares(flips))

    def _prepare(
        self, sample: Sequence[Tensor], corners: Tensor, flips: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Augment uint8 images, with corners (N, 2) and flips (N,), and normalise them."""
        images, targets = sample
        if self.augment:
            size = images.shape[-1]
            images = crop(pad_images(images, self.data.pad, self.data.reflect), corners, size)
            if self.data.flip:
                images = flip(images, flips)
        return self._normalise(images), targets

    def spread(self, count: int) -> Tensor:
        """Return `count` evenly spaced images (count, 3, S, S) of the split, not augmented.

        They are on the CPU, so that they occupy no memory of the device.
        """
        size = len(self.split.images)
        rows = torch.linspace(0, size - 1, min(count, size)).long()
        images = self.split.images.index_select(0, rows.to(self.split.images.device))
        return self._normalise(images.to(self.device)).cpu()

    def _normalise(self, images: Tensor) -> Tensor:
        """Return uint8 images (N, 3, S, S) as normalised float32."""
        return self._set_format(images).float().sub_(self.mean).div_(self.std)

    def _set_format(self, images: Tensor) -> Tensor:
        """Return images (N, 3, S, S) in the memory format of the batches."""
        if not self.channels_last:
            return images.contiguous()
        return torch.stack(images.unbind(1), dim=-1).permute(0, 3, 1, 2)  # faster than contiguous()

    def _as_image(self, channels: Sequence[float]) -> Tensor:
        """Return a pixel as an image (1, 3, S, S): same format, so arithmetic is fastest."""
        pixel = torch.tensor(channels, device=self.device).view(1, 3, 1, 1)
        return self._set_format(pixel.expand(1, *self.split.images.shape[1:]))


def share_sizes(size: int, world_size: int) -> list[int]:
    """Return the number of samples of each rank in a batch that torch.tensor_split divides."""
    return [(size + world_size - 1 - rank) // world_size for rank in range(world_size)]


class CudaCopies:
    """Copies of batches from the CPU to a CUDA device, one batch ahead, on a separate stream.

    The host never waits: a batch is copied during the computation on the one before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def of_rows(
        self, tensors: Sequence[Tensor], parts: Iterable[Tensor]
    ) -> Iterator[Sequence[Tensor]]:
        """Iterate over copies on the device of the rows (N,) of each part, of all tensors."""
        under_way = deque()
        for part in parts:
            under_way.append(self._send(tensors, part))
            if len(under_way) == 2:
                yield self._receive(*under_way.popleft())
        yield self._receive(*under_way.popleft())

    def _send(
        self, tensors: Sequence[Tensor], part: Tensor
    ) -> tuple[Sequence[Tensor], torch.cuda.Event]:
        """Start to copy; return the copies and the event of their completion."""
        with torch.cuda.stream(self.stream):
            sent = [pinned_rows(x, part).to(self.device, non_blocking=True) for x in tensors]
            return sent, self.stream.record_event()

    def _receive(self, sent: Sequence[Tensor], done: torch.cuda.Event) -> Sequence[Tensor]:
        """Make the computing stream, not the host, wait for the copies."""
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(done)
        for tensor in sent:  # else a later copy may reuse its memory too early
            tensor.record_stream(computing)
        return sent


def pinned_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return rows (N,) of a tensor (M, ...) in pinned memory.

    PyTorch's allocator does not reuse that memory before copies from it are complete.
    """
    out = torch.empty((len(rows), *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=True)
    return torch.index_select(tensor, 0, rows, out=out)


def epoch_seed(seed: int, epoch: int, stream: int, *more: int) -> int:
    """Return a seed for torch that depends on all arguments, each 0 or more.

    Stream 0 is for the data of an epoch; stream n is for the dropout of step n, where `more` is the
    index of the module.
    """
    state = np.random.SeedSequence([seed, epoch, stream, *more]).generate_state(1, np.uint64)
    return int(state[0]) >> 1


# The functions below use index_select, which copies rows: on a CPU it is faster than advanced
# indexing and torch.where, which copy byte by byte.


def pad_images(images: Tensor, pad: int, reflect: bool) -> Tensor:
    """Pad images (N, C, H, W) uint8 on each side, by reflection or with black."""
    padded = F.pad(images, (pad, pad, pad, pad))
    if reflect:  # by hand, because F.pad cannot reflect uint8 on every device
        for dim in (3, 2):
            end = padded.shape[dim] - pad
            for border, inside in ((0, pad + 1), (end, end - pad - 1)):
                mirrored = padded.narrow(dim, inside, pad).flip(dim)
                padded.narrow(dim, border, pad).copy_(mirrored)
    return padded


def crop(images: Tensor, corners: Tensor, size: int) -> Tensor:
    """Cut (N, C, size, size) out of (N, C, H, W), each at its own corner (N, 2) = (top, left)."""
    images = images.contiguous()
    count, channels, height, width = images.shape
    # All windows of the memory, by their first byte; most of them span two images.
    extent = ((channels - 1) * height + size - 1) * width + size
    windows = images.as_strided(
        (images.numel() - extent + 1, channels, size, size), (1, height * width, width, 1)
    )
    first = torch.arange(count, device=images.device) * (channels * height * width)
    return windows.index_select(0, first + corners[:, 0] * width + corners[:, 1])


def flip(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror images (N, C, H, W) left to right where flips (N,) is true."""
    count = len(images)
    both = torch.cat([images, images.flip(3)])
    return both.index_select(0, torch.arange(count, device=images.device) + count * flips)
