"""Images as uint8 tensors, decoded once; batches are augmented on the training device.

A data set is a `Split` for training and one for testing. A `Batches` goes over a split: only
bytes travel to the device, where whole batches are padded, cropped, flipped and normalised.
"""

import os
import warnings
from collections.abc import Callable, Iterator
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

from configs import DATASETS, DatasetConfig, InputError, one_line


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


def _cifar(dataset: type[datasets.CIFAR10]) -> Callable[[Path], ImageData]:
    def read(data_dir: Path) -> ImageData:
        parts = _download(
            dataset.__name__, data_dir, lambda train: dataset(data_dir, train, download=True)
        )
        splits = [
            Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
                  torch.tensor(part.targets))
            for part in parts
        ]  # fmt: skip
        return ImageData(*splits, parts[0].classes)

    return read


def _svhn(data_dir: Path) -> ImageData:
    parts = _download(
        "SVHN",
        data_dir,
        lambda train: datasets.SVHN(data_dir, "train" if train else "test", download=True),
    )
    return ImageData(*map(_from_arrays, parts), [str(d) for d in range(10)])


def _stl10(data_dir: Path) -> ImageData:
    """The 5,000 labelled images for training, the 8,000 test images."""
    parts = _download(
        "STL-10",
        data_dir,
        lambda train: datasets.STL10(data_dir, "train" if train else "test", download=True),
    )
    return ImageData(*map(_from_arrays, parts), parts[0].classes)


READERS: dict[str, Callable[[Path], ImageData]] = {
    "cifar10": _cifar(datasets.CIFAR10),
    "cifar100": _cifar(datasets.CIFAR100),
    "svhn": _svhn,
    "stl10": _stl10,
    "digits": _digits,
}


def _from_arrays(part: datasets.SVHN | datasets.STL10) -> Split:
    return Split(torch.from_numpy(part.data), torch.from_numpy(part.labels).long())


def _download(name: str, data_dir: Path, open_split: Callable[[bool], object]) -> list:
    """torchvision's train and test split; InputError where they cannot be fetched or stored."""
    try:
        return [open_split(train) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise InputError(
            f"{name} is not in {data_dir} and could not be downloaded ({one_line(error)}); "
            f"check the network, or put the files there by hand and give their folder as data_dir"
        ) from error


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
            f"train and test must have the same classes, but {', '.join(differ)} "
            f"{'is' if len(differ) == 1 else 'are'} only in one of them "
            f"({differ[0]}: {data_dir / where})"
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


def _list_images(folder: Path) -> dict[str, list[Path]]:
    """Class -> its image files, both sorted by name, hidden ones left out; InputError if none."""
    where = "data_dir must hold train/<class>/* and test/<class>/*"
    try:
        names = sorted(x.name for x in folder.iterdir() if x.is_dir() and not _is_hidden(x))
        files = {name: sorted(filter(_is_image, (folder / name).iterdir())) for name in names}
    except OSError as error:
        raise InputError(
            f"cannot read the images in {folder}: {one_line(error)}; {where}"
        ) from error
    empty = [name for name in names if not files[name]]
    if empty or not names:
        what = f"classes without an image: {', '.join(empty)}" if empty else "no classes"
        raise InputError(f"{folder} holds {what}; {where}")
    return files


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMG_EXTENSIONS and path.is_file() and not _is_hidden(path)


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
    """(3, image_size, image_size) uint8 RGB; another size is resized, its aspect not kept."""
    try:
        with Image.open(path) as image:
            image = _eight_bits(image).convert("RGB")
    except Exception as error:  # Pillow does not say what its decoders raise
        raise InputError(f"{path} is not an image that can be read: {one_line(error)}") from error
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, which Pillow would clip; ValueError for what has no range."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.array(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; convert it to 8 or 16")
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
    ) -> None:
        self.split, self.data, self.batch_size, self.device = split, data, batch_size, device
        self.seed, self.augment, self.shuffle = seed, augment, shuffle
        self.mean, self.std = (torch.tensor(x, device=device) for x in (data.mean, data.std))

    def __len__(self) -> int:
        return -(-len(self.split.targets) // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images (N, 3, S, S) float32 and targets (N,) int64.

        What is random depends on (seed, epoch) alone, not on the device or the batch size.
        """
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch, stream=0))
        count, pad = len(self.split.targets), self.data.pad
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        corners = torch.randint(2 * pad + 1, (count, 2), generator=generator).to(self.device)
        flips = (torch.rand(count, generator=generator) < 0.5).to(self.device)
        for parts in zip(*(x.split(self.batch_size) for x in (order, corners, flips)), strict=True):
            yield self._batch(*parts)

    def _batch(self, part: Tensor, corners: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        """The samples `part` (N,), cropped at corners (N, 2), mirrored where flips (N,) says so."""
        images = self.split.images[part].to(self.device)
        if self.augment:
            images = pad_images(images, self.data.pad, self.data.reflect)
            images = crop(images, corners, self.split.images.shape[-1])
            if self.data.flip:
                images = flip(images, flips)
        return normalise(images, self.mean, self.std), self.split.targets[part].to(self.device)


def epoch_seed(seed: int, epoch: int, stream: int) -> int:
    """A seed for torch that depends on all three (0 or more each): stream 0 data, 1 dropout."""
    state = np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def pad_images(images: Tensor, pad: int, reflect: bool) -> Tensor:
    """(N, C, H, W) uint8 -> (N, C, H + 2 pad, W + 2 pad), by reflection or in black."""
    if not reflect:
        return F.pad(images, (pad, pad, pad, pad))
    for dim in (2, 3):  # by index: reflection padding of bytes is not to be had everywhere
        size = images.shape[dim]
        position = torch.arange(-pad, size + pad, device=images.device).abs()
        position = size - 1 - (size - 1 - position).abs()
        images = images.index_select(dim, position)
    return images


def crop(images: Tensor, corners: Tensor, size: int) -> Tensor:
    """Cut (N, C, size, size) out of (N, C, H, W), each at its own corner (N, 2) = (top, left)."""
    windows = images.unfold(2, size, 1).unfold(3, size, 1)  # a view: (N, C, tops, lefts, ...)
    return windows[torch.arange(len(images), device=images.device), :, corners[:, 0], corners[:, 1]]


def flip(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror those of (N, C, H, W) left to right whose entry in flips (N,) is true."""
    return torch.where(flips[:, None, None, None], images.flip(3), images)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> float32; mean and std, in pixels of 0..255, are (3,)."""
    return (images - mean[:, None, None]) / std[:, None, None]
