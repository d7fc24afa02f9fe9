"""Images as uint8 tensors, decoded once; batches are augmented on the training device.

A data set is a `Split` for training and one for testing. A `Batches` goes over a split: only
bytes travel to the device, where whole batches are padded, cropped, flipped and normalised. To a
CUDA device they travel while the batch before them is computed with.
"""

import os
import stat
import tarfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from configs import DATASETS, DatasetConfig, InputError, one_line, printable


class Split(NamedTuple):
    """Images (N, 3, S, S) uint8 and class indices (N,) int64, both on the CPU."""

    images: Tensor
    targets: Tensor


class ImageData(NamedTuple):
    """A data set: both splits and the names of its classes, in the order of their indices."""

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
    """Decode a data set, downloading it first where torchvision can and it is not there yet.

    Args:
        name: a name in `configs.DATASETS`.
        data_dir: where the files are, or go.
        image_size: side that the images of `folder` are resized to; the others have their own.
        limit_per_class: keep the first so many images of each class, in file order (train only).
        test_only: leave the training images of `folder` unread; its training split is empty.
    Raises:
        InputError: the data cannot be had, or cannot be trained on.
    """
    data_dir = Path(data_dir)
    if name == "folder":
        return _folder(data_dir, image_size, limit_per_class, test_only)
    check_image_size(name, image_size)
    data = READERS[name](data_dir)
    kept = first_of_each_class(data.train.targets, limit_per_class)
    return data._replace(train=Split(data.train.images[kept], data.train.targets[kept]))


def check_image_size(name: str, image_size: int) -> None:
    """InputError if a data set has images of another size, and they are not resized."""
    native = DATASETS[name].image_size
    if name != "folder" and image_size != native:
        raise InputError(f"{name} has images of {native}x{native}; image_size is for folder")


def first_of_each_class(targets: Tensor, limit: int | None) -> Tensor:
    """Indices, ascending, of the first `limit` samples of each class; of all where None."""
    if limit is None:
        return torch.arange(len(targets))
    kept = [(targets == c).nonzero().flatten()[:limit] for c in targets.unique()]
    return torch.cat(kept).sort().values


def _digits(data_dir: Path) -> ImageData:
    """scikit-learn's 8x8 grey images, each pixel 4x4 as large, split 80/20 with equal classes."""
    digits = load_digits()
    grey = torch.from_numpy(digits.images) * (255 / 16)  # 17 levels, 0..16
    images = grey.round().to(torch.uint8)[:, None].repeat(1, 3, 1, 1)
    images = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    targets = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        np.arange(len(targets)), test_size=0.2, random_state=0, stratify=digits.target
    )
    train, test = np.sort(train), np.sort(test)
    return ImageData(
        Split(images[train], targets[train]),
        Split(images[test], targets[test]),
        [str(d) for d in range(10)],
    )


# torchvision's data sets. It knows the hashes of archives, and extracts no other; and of CIFAR's
# and SVHN's files, and reads no others: CIFAR's are pickles, which can run code. Files of STL-10
# that have another hash are extracted anew.

Part = tuple[Split, list[str]]
"""One split and the names of the classes."""


def _cifar(dataset: type[datasets.CIFAR10]) -> Callable[[Path, bool, bool], Part]:
    def read(root: Path, train: bool, download: bool) -> Part:
        part = dataset(root, train, download=download)
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        return Split(images, torch.tensor(part.targets)), part.classes

    return read


def _svhn(root: Path, train: bool, download: bool) -> Part:
    part = datasets.SVHN(root, "train" if train else "test", download=download)
    return _from_arrays(part), [str(d) for d in range(10)]


def _stl10(root: Path, train: bool, download: bool) -> Part:
    """The 5,000 labelled images for training, the 8,000 test images."""
    part = datasets.STL10(root, "train" if train else "test", download=download)
    classes = getattr(part, "classes", [])  # torchvision does without the file
    if len(classes) != 10:
        raise ValueError(f"{part.class_names_file} does not name 10 classes")
    return _from_arrays(part), classes


def _from_arrays(part: datasets.SVHN | datasets.STL10) -> Split:
    images = torch.from_numpy(part.data).contiguous()  # they come transposed
    return Split(images, torch.from_numpy(part.labels).long())


def _download(name: str, read: Callable[[Path, bool, bool], Part], data_dir: Path) -> ImageData:
    """Both splits; InputError where they cannot be fetched, stored or read.

    Without a Python that can extract safely, what is there already is read.
    """
    can_extract = hasattr(tarfile, "data_filter")
    try:
        root = data_dir.absolute()  # torchvision would take a first ~ for the home folder
        with _plain_extraction():
            (train, classes), (test, _) = (read(root, part, can_extract) for part in (True, False))
    except Exception as error:  # nobody says what all of these libraries raise
        failed = f"could not be downloaded and read ({one_line(error)}); check the network"
        if not can_extract:
            failed = "Python before 3.11.4 cannot extract it safely; take a later one"
        raise InputError(
            printable(
                f"{name} is not in {data_dir} and {failed}, or put the files there by hand and "
                "give their folder as data_dir"
            )
        ) from error
    return ImageData(train, test, classes)


@contextmanager
def _plain_extraction() -> Iterator[None]:
    """In here `tarfile` extracts files and folders alone, all within where it extracts to."""
    before = vars(tarfile.TarFile).get("extraction_filter")
    tarfile.TarFile.extraction_filter = staticmethod(_plain_member)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = before


def _plain_member(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
    """A member as it may be extracted to `path`; FilterError if it may not be.

    The data sets have no links, and some versions of `data_filter` can be led outside by them.
    """
    if not (member.isreg() or member.isdir()):
        raise tarfile.FilterError(f"{member.name!r} is neither a file nor a folder")
    return tarfile.data_filter(member, path)


READERS: dict[str, Callable[[Path], ImageData]] = {
    "cifar10": partial(_download, "CIFAR10", _cifar(datasets.CIFAR10)),
    "cifar100": partial(_download, "CIFAR100", _cifar(datasets.CIFAR100)),
    "svhn": partial(_download, "SVHN", _svhn),
    "stl10": partial(_download, "STL-10", _stl10),
    "digits": _digits,
}


# ---------------------------------------------------------------------------------------------
# The user's own images: train/<class>/* and test/<class>/*


def _folder(
    data_dir: Path, image_size: int, limit_per_class: int | None, test_only: bool
) -> ImageData:
    test = _list_images(data_dir / "test")
    train = _list_images(data_dir / "train") if not test_only else {name: [] for name in test}
    if list(train) != list(test):
        differ = sorted(set(train) ^ set(test))
        where = "train" if differ[0] in train else "test"
        raise InputError(
            printable(
                f"train and test must have the same classes, but {', '.join(differ)} "
                f"{'is' if len(differ) == 1 else 'are'} only in one of them "
                f"({differ[0]}: {data_dir / where})"
            )
        )
    train = {name: paths[:limit_per_class] for name, paths in train.items()}
    return ImageData(_decode(train, image_size), _decode(test, image_size), list(train))


def count_classes(data_dir: str | Path, part: str = "train") -> int:
    """Number of classes of a `folder` data set; InputError if one has no image, or there is none.

    Args:
        data_dir: holds train/<class>/* and test/<class>/*.
        part: `train` or `test`.
    """
    return len(_list_images(Path(data_dir) / part))


def count_images(name: str, data_dir: str | Path, limit_per_class: int | None = None) -> int:
    """Training images that `load_dataset` gives, none of which is read; errors are its own."""
    counts = DATASETS[name].per_class or [
        len(paths) for paths in _list_images(Path(data_dir) / "train").values()
    ]
    return sum(min(count, limit_per_class or count) for count in counts)


def _list_images(folder: Path) -> dict[str, list[Path]]:
    """Class -> its image files, both sorted by name, hidden ones left out; links are followed.

    InputError if there are none, a link leads nowhere, or what should be an image is no file.
    """
    where = "data_dir must hold train/<class>/* and test/<class>/*"
    try:
        names = sorted(x.name for x in folder.iterdir() if not _is_hidden(x) and _is_folder(x))
        files = {name: sorted(filter(_is_image, (folder / name).iterdir())) for name in names}
    except OSError as error:
        raise InputError(
            printable(f"cannot read the images in {folder}: {one_line(error)}; {where}")
        ) from error
    empty = [name for name in names if not files[name]]
    if empty or not names:
        what = f"classes without an image: {', '.join(empty)}" if empty else "no classes"
        raise InputError(printable(f"{folder} holds {what}; {where}"))
    return files


def _is_image(path: Path) -> bool:
    """By its name; InputError if that is the name of an image, but of neither a file nor folder."""
    if path.suffix.lower() not in IMG_EXTENSIONS or _is_hidden(path):
        return False
    mode = _mode(path)
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # to read a pipe may take for ever
        raise InputError(printable(f"{path} is not a file; take it out of the data set"))
    return stat.S_ISREG(mode)


def _is_folder(path: Path) -> bool:
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    """What kind of file it is or links to, as `stat` has it; InputError if it links to nothing."""
    try:
        return path.stat().st_mode
    except OSError as error:
        if not path.is_symlink():
            raise
        raise InputError(
            printable(
                f"{path} is a link that cannot be followed ({error.strerror}); "
                "mend it or take it out of the data set"
            )
        ) from error


def _is_hidden(path: Path) -> bool:
    """What desktops and notebooks leave behind: .ipynb_checkpoints, ._0.jpg."""
    return path.name.startswith(".")


def _decode(files: dict[str, list[Path]], image_size: int) -> Split:
    paths = [path for of_class in files.values() for path in of_class]
    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)

    def decode_into(index: int) -> None:
        images[index] = _decode_image(paths[index], image_size)

    warnings.filterwarnings("ignore", module=r"PIL\.")  # what cannot be read is an error below
    with ThreadPool(os.cpu_count()) as pool:  # Pillow decodes outside Python's lock
        pool.map(decode_into, range(len(paths)), chunksize=64)
    targets = [index for index, of_class in enumerate(files.values()) for _ in of_class]
    return Split(images, torch.tensor(targets, dtype=torch.int64))


def _decode_image(path: Path, image_size: int) -> Tensor:
    """(3, image_size, image_size) uint8 RGB; another size is resized, its aspect not kept.

    Of several frames or pages it is the first. Transparency is dropped: a pixel has the colour
    that it would have without.
    """
    try:
        with Image.open(path) as image:
            _check_header(image)
            image = _eight_bits(image).convert("RGB")
        if image.size != (image_size, image_size):
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    except Exception as error:  # Pillow does not say what its decoders raise
        why = one_line(error)
        if isinstance(error, Image.DecompressionBombError):
            why = f"{why.rstrip('.')}; make it smaller"
        raise InputError(printable(f"{path} is not an image that can be read: {why}")) from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _check_header(image: Image.Image) -> None:
    """Refuse what should not be decoded, before it is."""
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow lets twice as many pass
        raise Image.DecompressionBombError(
            f"it has {image.width}x{image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}"
        )
    if image.format == "EPS":  # whatever the suffix says; Pillow would have Ghostscript run it
        raise ValueError("it is PostScript, a program; convert it")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, which Pillow would clip; ValueError for what has no range."""
    of_pgm = image.mode == "I" and image.format == "PPM"  # Pillow has scaled these to 16 bits
    if image.mode.startswith("I;16") or of_pgm:
        return Image.fromarray((np.array(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits or a sign; convert it to 8 or 16 without")
    return image


# ---------------------------------------------------------------------------------------------
# Batches


class Batches:
    """Goes over a split in batches, on `device`, normalised; augmented and shuffled or neither.

    Args:
        split: what to go over.
        data: padding, flip, mean and std.
        batch_size: the last batch may be smaller.
        device: where the batches are made.
        seed: with the epoch, the seed of all that is random in it.
        augment: pad, crop and, where `data` says so, flip.
        shuffle: another order each epoch.
        channels_last: give images in `torch.channels_last` memory format, with the same values.
        on_device: move the split to `device` now, instead of batch by batch.
        share: (rank, number): give this rank's part of each batch alone, of as many parts.
    Raises:
        InputError: a batch has fewer samples than there are parts.
    Attributes:
        device_bytes: what the split takes on `device` because of `on_device`, else 0.
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
        self.share = share
        self.data, self.batch_size, self.device = data, batch_size, device
        self.seed, self.augment, self.shuffle = seed, augment, shuffle
        self.device_bytes = sum(x.nbytes for x in self.split) if on_device else 0
        self.channels_last = channels_last
        self.mean, self.std = (self._as_image(x) for x in (data.mean, data.std))
        self._copies = CudaCopies(device) if device.type == "cuda" and not on_device else None
        self._check_shares()

    def __len__(self) -> int:
        return -(-len(self.split.targets) // self.batch_size)

    def _check_shares(self) -> None:
        fewest, number = min(self.sizes(), default=0), self.share[1]
        if 0 < fewest < number:
            raise InputError(
                f"{len(self.split.targets)} samples in batches of {self.batch_size} leave a batch "
                f"of {fewest} to {number} processes: choose a batch size that gives each of them "
                "a sample in every batch, or run fewer processes"
            )

    def sizes(self) -> list[int]:
        """Samples of each batch of an epoch, of all ranks together."""
        whole, rest = divmod(len(self.split.targets), self.batch_size)
        return [self.batch_size] * whole + [rest] * bool(rest)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images (N, 3, S, S) float32 and targets (N,) int64, without the first `skip`.

        What is random depends on (seed, epoch) alone, not on the device, the batch size or the
        share: a rank draws for all samples, and makes its own.
        """
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch, stream=0))
        count, pad = len(self.split.targets), self.data.pad
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        corners = torch.randint(2 * pad + 1, (count, 2), generator=generator).to(self.device)
        flips = (torch.rand(count, generator=generator) < 0.5).to(self.device)
        start = skip * self.batch_size
        if start >= count:
            return iter(())
        drawn = (self._shares(x[start:]) for x in (corners, flips))
        return map(self._finished, self._samples(order[start:]), *drawn)  # map keeps no batch alive

    def _shares(self, drawn: Tensor) -> list[Tensor]:
        """What is drawn for samples (count, ...), of all ranks -> this rank's, batch by batch."""
        rank, number = self.share
        return [batch.tensor_split(number)[rank] for batch in drawn.split(self.batch_size)]

    def _samples(self, order: Tensor) -> Iterator[Sequence[Tensor]]:
        """Batches of bytes (N, 3, S, S) and targets (N,) on the device, in this order (count,)."""
        parts = self._shares(order.to(self.split.images.device))
        if self._copies is not None:
            return self._copies.of_rows(self.split, parts)
        return ([x.index_select(0, part) for x in self.split] for part in parts)

    def _finished(
        self, sample: Sequence[Tensor], corners: Tensor, flips: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Bytes (N, 3, S, S) cropped at corners (N, 2), mirrored where flips (N,), normalised."""
        images, targets = sample
        if self.augment:
            size = images.shape[-1]
            images = crop(pad_images(images, self.data.pad, self.data.reflect), corners, size)
            if self.data.flip:
                images = flip(images, flips)
        return self._normalised(images), targets

    def spread(self, count: int) -> Tensor:
        """Images (count, 3, S, S) from evenly all over the split, not augmented; at most all.

        On the CPU, so that they take nothing of the device's memory between two uses.
        """
        size = len(self.split.images)
        rows = torch.linspace(0, size - 1, min(count, size)).long()
        images = self.split.images.index_select(0, rows.to(self.split.images.device))
        return self._normalised(images.to(self.device)).cpu()

    def _normalised(self, images: Tensor) -> Tensor:
        """Bytes (N, 3, S, S) on the device -> float32 in the memory format of the batches."""
        return self._laid_out(images).float().sub_(self.mean).div_(self.std)

    def _laid_out(self, images: Tensor) -> Tensor:
        """Images (N, 3, S, S) in the memory format of the batches."""
        if not self.channels_last:
            return images.contiguous()
        return torch.stack(images.unbind(1), dim=-1).permute(0, 3, 1, 2)  # beats contiguous()

    def _as_image(self, channels: Sequence[float]) -> Tensor:
        """(1, 3, S, S), laid out as images are: so arithmetic with them has the longest loops."""
        pixel = torch.tensor(channels, device=self.device).view(1, 3, 1, 1)
        return self._laid_out(pixel.expand(1, *self.split.images.shape[1:]))


def share_sizes(size: int, number: int) -> list[int]:
    """Of how many samples the parts are that torch.tensor_split makes of a batch."""
    return [(size + number - 1 - rank) // number for rank in range(number)]


class CudaCopies:
    """Sends batches from the CPU to a CUDA device, one ahead, on a stream of its own.

    The host waits for none of it: a batch is copied while the one before it is computed with.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def of_rows(
        self, tensors: Sequence[Tensor], parts: Iterable[Tensor]
    ) -> Iterator[Sequence[Tensor]]:
        """For each of the parts, indices (N,): these rows of all the tensors, on the device."""
        on_their_way = deque()
        for part in parts:
            on_their_way.append(self._send(tensors, part))
            if len(on_their_way) == 2:
                yield self._receive(*on_their_way.popleft())
        yield self._receive(*on_their_way.popleft())

    def _send(
        self, tensors: Sequence[Tensor], part: Tensor
    ) -> tuple[Sequence[Tensor], torch.cuda.Event]:
        """Start to copy; the event is when that will be done."""
        with torch.cuda.stream(self.stream):
            sent = [pinned_rows(x, part).to(self.device, non_blocking=True) for x in tensors]
            return sent, self.stream.record_event()

    def _receive(self, sent: Sequence[Tensor], done: torch.cuda.Event) -> Sequence[Tensor]:
        """Make the stream that computes, not the host, wait for the copies."""
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(done)
        for tensor in sent:  # else its memory may go to a later copy while it is computed with
            tensor.record_stream(computing)
        return sent


def pinned_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows (N,) of a tensor (M, ...) as (N, ...) in pinned memory.

    PyTorch's allocator hands it out again only when the copies from it are done.
    """
    out = torch.empty((len(rows), *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=True)
    return torch.index_select(tensor, 0, rows, out=out)


def epoch_seed(seed: int, epoch: int, stream: int, *more: int) -> int:
    """A seed for torch that depends on all of them (0 or more each).

    Stream 0 is of the epoch's data, stream n of what its step n draws (dropout), `more` being the
    module that draws it.
    """
    state = np.random.SeedSequence([seed, epoch, stream, *more]).generate_state(1, np.uint64)
    return int(state[0]) >> 1


# What follows was chosen by its time on one CPU core: index_select copies whole rows, advanced
# indexing and torch.where go byte by byte.


def pad_images(images: Tensor, pad: int, reflect: bool) -> Tensor:
    """(N, C, H, W) uint8 -> (N, C, H + 2 pad, W + 2 pad), by reflection or in black."""
    padded = F.pad(images, (pad, pad, pad, pad))
    if reflect:  # by hand: reflection padding of bytes is not to be had everywhere
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
    # Every window that fits into the memory, by its first byte; most lie across two images.
    extent = ((channels - 1) * height + size - 1) * width + size
    windows = images.as_strided(
        (images.numel() - extent + 1, channels, size, size), (1, height * width, width, 1)
    )
    first = torch.arange(count, device=images.device) * (channels * height * width)
    return windows.index_select(0, first + corners[:, 0] * width + corners[:, 1])


def flip(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror those of (N, C, H, W) left to right whose entry in flips (N,) is true."""
    count = len(images)
    both = torch.cat([images, images.flip(3)])
    return both.index_select(0, torch.arange(count, device=images.device) + count * flips)
