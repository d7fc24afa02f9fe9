"""Data sets as uint8 tensors, decoded once, and batches, augmented on the training device.

`load_dataset` returns a training and a test `Split`. `Batches` iterates over a split: it copies
bytes to the device and pads, crops, flips and normalises each batch there. Copies to a CUDA device
overlap with the computation on the batch before.
"""

import contextlib
import errno
import importlib
import inspect
import math
import os
import sys
import tarfile
import unicodedata
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import find_classes, is_image_file

from configs import DATASETS, DatasetConfig, InputError, one_line, printable

if TYPE_CHECKING:
    from filelock import FileLock


class Split(NamedTuple):
    """Images (N, 3, S, S) uint8 and class indices (N,) int64, both on the CPU."""

    images: Tensor
    targets: Tensor


class ImageData(NamedTuple):
    """A data set.

    Attributes:
        classes: names, in the order of their indices.
        val: the validation split, if there is one.
        notes: what the user should know of how it was read, in lines.
    """

    train: Split
    test: Split
    classes: list[str]
    val: Split | None = None
    notes: Sequence[str] = ()


Watch = Callable[[Iterable, str, int], Iterable]
"""(things, what is done with them, how many) -> the things; it shows how many are done."""


def unwatched(things: Iterable, title: str, total: int) -> Iterable:
    """Return the things; show nothing."""
    return things


# ---------------------------------------------------------------------------------------------
# Reading


def load_dataset(
    name: str,
    data_dir: str | Path,
    image_size: int,
    limit_per_class: int | None = None,
    test_only: bool = False,
    *,
    limit_test: int | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
    watch: Watch = unwatched,
) -> ImageData:
    """Read a data set; download it first if it is not there and torchvision can.

    Args:
        name: a name in `configs.DATASETS`.
        data_dir: where the files are, or go.
        image_size: side to which the images of `folder` are resized.
        limit_per_class: keep the first so many training images of each class, in file order.
        test_only: do not read the training images of `folder`; its training split is empty. There
            is no validation split.
        limit_test: keep so many test images, as `spread_over_classes` chooses them.
        val_fraction: part of the training images that is kept, to make a validation split of them.
        seed: which images that part has.
        watch: shows progress while the images of `folder` are read.
    Raises:
        InputError: the data cannot be downloaded, read, or divided.
    """
    data_dir = Path(data_dir)
    if name == "folder":
        data = _folder(data_dir, image_size, limit_per_class, limit_test, test_only, watch)
    else:
        check_image_size(name, image_size)
        read = DATASETS[name].read or READERS[name]
        data = read(data_dir)
        data = data._replace(
            train=_rows(data.train, first_of_each_class(data.train.targets, limit_per_class)),
            test=_rows(data.test, spread_over_classes(data.test.targets, limit_test)),
        )
    if val_fraction is None or test_only:
        return data
    kept, held_out = _divide(data.train.targets, val_fraction, seed)
    return data._replace(train=_rows(data.train, kept), val=_rows(data.train, held_out))


def check_image_size(name: str, image_size: int) -> None:
    """Raise InputError if a data set, other than `folder`, has images of another size."""
    native = DATASETS[name].image_size
    if name != "folder" and image_size != native:
        raise InputError(f"{name} has images of {native}x{native}; image_size is for folder")


def first_of_each_class(targets: Tensor, limit: int | None) -> Tensor:
    """Return the indices, ascending, of the first `limit` samples of each class; None for all."""
    if limit is None:
        return torch.arange(len(targets))
    return (_places(targets) < limit).nonzero().flatten()


def spread_over_classes(targets: Tensor, count: int | None) -> Tensor:
    """Return the indices, ascending, of `count` samples; None for all.

    They are the first of each class, as many of each as there are, and one more of the first
    classes where `count` does not divide by them.
    """
    if count is None:
        return torch.arange(len(targets))
    order = _places(targets) * len(targets.bincount()) + targets
    return order.argsort()[:count].sort().values


def _places(targets: Tensor) -> Tensor:
    """Return for each sample how many samples of its class come before it, (N,) int64."""
    order, counts = targets.argsort(stable=True), targets.bincount()
    places = torch.empty_like(targets)
    places[order] = torch.arange(len(targets)) - (counts.cumsum(0) - counts)[targets[order]]
    return places


def _rows(split: Split, rows: Tensor) -> Split:
    return Split(split.images[rows], split.targets[rows])


def _divide(targets: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices, ascending, of the samples to train on, and of the `fraction` to hold out.

    Both have the classes in the same proportions. Raises InputError where they cannot have.
    """
    try:
        rows = _scikit_learn("model_selection").train_test_split(
            np.arange(len(targets)), test_size=fraction, random_state=seed, stratify=targets.numpy()
        )
    except ValueError as error:
        raise _input_error(
            f"val_fraction {fraction} of {len(targets)} training images makes no validation split "
            f"with images of each class: {one_line(error)}"
        ) from error
    return tuple(torch.from_numpy(np.sort(part)) for part in rows)


def fingerprint(data: ImageData) -> dict[str, dict[str, Any]]:
    """Return `images`, the number of each class, and `crc32` of pixels and targets, by split."""
    splits = {"train": data.train, "val": data.val, "test": data.test}
    return {
        name: {
            "images": split.targets.bincount(minlength=len(data.classes)).tolist(),
            "crc32": zlib.crc32(
                split.targets.contiguous().numpy(),
                zlib.crc32(split.images.contiguous().numpy()),
            ),
        }
        for name, split in splits.items()
        if split is not None
    }


def changes(
    before: Mapping[str, Mapping], now: Mapping[str, Mapping], classes: Sequence[str]
) -> dict[str, str]:
    """Return in words how the splits that two fingerprints both have differ, by split."""
    found = {}
    for split in [name for name in now if name in before and before[name] != now[name]]:
        old, new = before[split]["images"], now[split]["images"]
        of_class = zip(classes, old, new, strict=False)
        differ = [f"{printable(c)} {n}, now {m}" for c, n, m in of_class if n != m]
        more = f" and {len(differ) - 5} more classes" if len(differ) > 5 else ""
        found[split] = (
            f"{sum(old):,} before, now {sum(new):,} ({'; '.join(differ[:5])}{more})" if differ
            else "as many of each class, but their pixels or their order differ (other files, or "
            "another version of Pillow)"
        )  # fmt: skip
    return found


DIGITS = [str(digit) for digit in range(10)]
STL10 = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


def _digits(data_dir: Path) -> ImageData:
    """Return scikit-learn's 8x8 grey images, enlarged by 4, in a stratified 80/20 split."""
    digits = _scikit_learn("datasets").load_digits()
    grey = torch.from_numpy(digits.images) * (255 / 16)  # 17 levels, 0..16
    images = grey.round().to(torch.uint8)[:, None].repeat(1, 3, 1, 1)
    images = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    targets = torch.from_numpy(digits.target).long()
    kept, held_out = _divide(targets, 0.2, seed=0)
    splits = Split(images[kept], targets[kept]), Split(images[held_out], targets[held_out])
    return ImageData(*splits, DIGITS)


def _scikit_learn(part: str) -> ModuleType:
    """Return a module of scikit-learn; raise InputError if that is not installed."""
    try:
        return importlib.import_module(f"sklearn.{part}")
    except ImportError as error:
        raise InputError(
            "scikit-learn, which has digits and divides data, is not installed: pip install "
            "scikit-learn, or choose another --dataset and no --val_fraction"
        ) from error


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

    A Python that cannot extract archives safely only reads files that are there already. Of several
    processes one downloads, and the others wait for it.
    """
    root = data_dir.absolute()  # torchvision would expand a leading ~

    def read(download: bool) -> ImageData:
        (train, classes), (test, _) = (
            _read_split(name, root, part, download) for part in (True, False)
        )
        return ImageData(train, test, classes)

    can_extract = hasattr(tarfile, "data_filter")
    before = vars(tarfile.TarFile).get("extraction_filter")
    tarfile.TarFile.extraction_filter = staticmethod(_safe_filter)
    try:
        try:
            return read(download=False)
        except Exception:
            if not can_extract:
                raise
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{name}.lock"):
            return read(download=True)
    except Exception as error:  # these libraries do not document what they raise
        remedy = "check the network" if can_extract else "take Python 3.11.4 or later to extract it"
        raise _input_error(
            f"{name} is not in {data_dir} and could not be downloaded and read "
            f"({one_line(error)}); {remedy}, or put {_files_of(name)} into a folder by hand and "
            "name that folder with --data_dir"
        ) from error
    finally:
        tarfile.TarFile.extraction_filter = before


def _files_of(name: str) -> str:
    """Return which files of a data set of torchvision belong into `data_dir`, and their source."""
    dataset = getattr(datasets, name.upper())
    if name == "svhn":
        (url, train, _), (_, test, _) = (dataset.split_list[part] for part in ("train", "test"))
        return f"{train} and {test} (from {os.path.dirname(url)})"
    return f"{dataset.base_folder}/ (extracted from {dataset.url})"


def file_lock(path: Path) -> "FileLock":
    """Return a lock of a file, which the system gives up when the process dies.

    Acquiring it raises TimeoutError while another process has it. Raises InputError if filelock is
    not installed.
    """
    try:
        from filelock import FileLock
    except ImportError as error:  # PyTorch's own packages ask for it: it is nearly always there
        raise InputError(
            "filelock, which locks files, is not installed: pip install filelock"
        ) from error
    # Not filelock's own choice: where files can't be locked it may take a lock that outlives us.
    is_soft = "fallback_to_soft" in inspect.signature(FileLock.__init__).parameters
    return FileLock(path, **({"fallback_to_soft": False} if is_soft else {}))


def cannot_lock(error: OSError | NotImplementedError) -> bool:
    """Return whether the file system has no locks; early filelocks raise NotImplementedError."""
    codes = errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP
    return getattr(error, "errno", errno.ENOSYS) in codes


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock a file, which stays; wait while another process holds it.

    The system gives up the lock of a process that dies.
    """
    lock = file_lock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            print(f"waiting for another process, which has {path}", file=sys.stderr, flush=True)
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            if not cannot_lock(error):  # else as good as alone
                raise
        yield
    finally:
        lock.release()


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
    data_dir: Path,
    image_size: int,
    limit_per_class: int | None,
    limit_test: int | None,
    test_only: bool,
    watch: Watch,
) -> ImageData:
    test, notes = _list_images(data_dir / "test")
    train: dict[str, list[Path]] = {name: [] for name in test}
    if not test_only:
        train, more_notes = _list_images(data_dir / "train")
        notes = more_notes + notes
    if differ := sorted(train.keys() ^ test.keys()):
        raise _input_error(
            f"train and test in {data_dir} must have the same classes, but only one of them has "
            f"{', '.join(differ)}"
        )
    return ImageData(
        _decode("training", train, partial(first_of_each_class, limit=limit_per_class),
                image_size, watch),
        _decode("test", test, partial(spread_over_classes, count=limit_test), image_size, watch),
        list(test),
        notes=notes,
    )  # fmt: skip


def count_classes(data_dir: str | Path, part: str = "train") -> int:
    """Return the number of classes in a part of a `folder` data set.

    Raises InputError if there are none, or one has no images.
    """
    return len(_list_images(Path(data_dir) / part)[0])


def count_images(
    name: str,
    data_dir: str | Path,
    limit_per_class: int | None = None,
    val_fraction: float | None = None,
) -> int:
    """Return the number of training images that `load_dataset` returns.

    They are read only where a data set of the user's own has no `per_class`.
    """
    data = DATASETS[name]
    if data.per_class is None and data.read is not None:
        counts = data.read(Path(data_dir)).train.targets.bincount().tolist()
    else:
        counts = data.per_class or [
            len(paths) for paths in _list_images(Path(data_dir) / "train")[0].values()
        ]
    count = sum(min(count, limit_per_class or count) for count in counts)
    return count - math.ceil(count * (val_fraction or 0))  # as train_test_split rounds


def _list_images(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the image files of each class, sorted by name, and a line on what is left out, if any.

    Links are followed. Names of classes are in Unicode's normal form C: systems and archives differ
    in the form of the same name.

    Hidden files and folders are left out: desktops and notebooks make them (._0.jpg,
    .ipynb_checkpoints). So are folders in that of a class: torchvision's make_dataset would walk
    through them, and never end where links lead in circles.

    Raises InputError if there are no classes, one has no images, or two have the same name.
    """
    try:
        folders = find_classes(folder)[0]
        left_out = Counter(
            "hidden" if name.startswith(".") else "outside the folders of classes"
            for name in os.listdir(folder)
            if name.startswith(".") or name not in folders
        )
        files: dict[str, list[Path]] = {}
        for name in folders:
            if name.startswith("."):
                continue
            label = unicodedata.normalize("NFC", name)
            if label in files:
                raise _input_error(
                    f"two folders in {folder} have the same name, {label}, in two normal forms of "
                    "Unicode: put their images into one of them"
                )
            files[label] = []
            for path in sorted((folder / name).iterdir()):
                if reason := _why_left_out(path):
                    left_out[reason] += 1
                else:
                    files[label].append(path)
        if not files or not all(files.values()):
            empty = [name for name, paths in files.items() if not paths]
            reasons = "".join(f"; left out: {n} {reason}" for reason, n in left_out.most_common(3))
            raise FileNotFoundError(
                f"there is no image of {', '.join(empty) or 'any class'}{reasons}"
            )
    except OSError as error:
        raise _input_error(
            f"cannot read the images in {folder}: {one_line(error)}; data_dir must hold "
            "train/<class>/* and test/<class>/*"
        ) from error
    notes = []
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common(8))
        more = ", ..." if len(left_out) > 8 else ""
        notes.append(printable(f"left out of {folder}: {left_out.total()} ({reasons}{more})"))
    return dict(sorted(files.items())), notes


def _why_left_out(path: Path) -> str | None:
    """Return why a file in a class's folder is not read; None for an image."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "folders in that of a class"
    if is_image_file(path.name):
        return None
    return f"*{path.suffix.lower()}" if path.suffix else "without a suffix"


def _decode(
    what: str,
    files: dict[str, list[Path]],
    choose: Callable[[Tensor], Tensor],
    image_size: int,
    watch: Watch,
) -> Split:
    """Return the images of each class in `files` whose indices `choose` returns for the targets."""
    of_classes = enumerate(files.values())
    every = [(path, index) for index, of_class in of_classes for path in of_class]
    targets = torch.tensor([index for _, index in every], dtype=torch.int64)
    kept = choose(targets)
    paths = [every[i][0] for i in kept.tolist()]
    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)

    def decode_into(index: int) -> None:
        images[index] = _decode_image(paths[index], image_size)

    # Pillow decodes outside Python's lock. Each thread holds an image: os.cpu_count would start too
    # many, because it counts CPUs that this process may not use.
    available = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    with warnings.catch_warnings(), ThreadPool(len(available(0))) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what cannot be read is an error below
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        decoded = pool.imap(decode_into, range(len(paths)), chunksize=64)
        for _ in watch(decoded, f"reading {what} images", len(paths)):
            pass
    return Split(images, targets[kept])


def _decode_image(path: Path, image_size: int) -> Tensor:
    """Return an image as (3, image_size, image_size) uint8 RGB; resizing may change its aspect.

    It is turned as its EXIF says. Only the first of several frames is read. Transparency is
    dropped, colours stay.
    """
    try:
        if not path.is_file():  # reading a pipe may never end
            raise ValueError("it is not a file, or a link to one")
        with Image.open(path) as image:
            if image.format == "EPS":  # with any suffix; Pillow would run Ghostscript
                raise ValueError("it is PostScript, a program; convert it")
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF turns nothing
                ImageOps.exif_transpose(image, in_place=True)
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
