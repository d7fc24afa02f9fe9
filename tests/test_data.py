"""Reading data sets, and augmentation against plain loops."""

import hashlib
import io
import itertools
import os
import pickle
import shutil
import tarfile
import threading
import unicodedata
import weakref
from unittest import mock
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from cli import needs_fake_cuda
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import datasets

import dataloaders
from configs import DATASETS, InputError
from dataloaders import Batches, Split, load_dataset

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------
# Batches


def split_of(count, size=8):
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count))


def test_augmentation_and_normalisation_are_the_published_ones():
    cifar, half = ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)), ((127.5,) * 3,) * 2
    assert {n: (d.pad, d.reflect, d.flip, (d.mean, d.std)) for n, d in DATASETS.items()} == {
        "cifar10": (4, True, True, cifar), "cifar100": (4, True, True, cifar),
        "folder": (4, True, True, cifar), "svhn": (2, False, False, half),
        "stl10": (4, False, True, half), "digits": (2, False, False, half),
    }  # fmt: skip


def images_by_hand(split, data, augment, shuffle, seed, epoch):
    """Images and targets of an epoch, one sample after the other; the draws are the contract."""
    generator = torch.Generator().manual_seed(dataloaders.epoch_seed(seed, epoch, stream=0))
    count, pad, size = len(split.targets), data.pad, split.images.shape[-1]
    order = torch.randperm(count, generator=generator) if shuffle else torch.arange(count)
    corners = torch.randint(2 * pad + 1, (count, 2), generator=generator).tolist()
    flips = (torch.rand(count, generator=generator) < 0.5).tolist()
    mean, std = (np.array(x, dtype=np.float32)[:, None, None] for x in (data.mean, data.std))
    images = []
    for index, (top, left), flipped in zip(order.tolist(), corners, flips, strict=True):
        image = split.images[index].numpy()
        if augment:
            mode = "reflect" if data.reflect else "constant"
            image = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode=mode)
            image = image[:, top : top + size, left : left + size]
            if data.flip and flipped:
                image = image[:, :, ::-1]
        images.append((image.astype(np.float32) - mean) / std)
    return torch.from_numpy(np.stack(images)), split.targets[order]


@pytest.mark.parametrize(("channels_last", "on_device"), [(False, False), (True, True)])
@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("name", DATASETS)
def test_an_epoch_is_that_of_the_plain_loop(name, augment, channels_last, on_device):
    """To the last bit, whatever the sizes of batches; the split is left as it was."""
    data = DATASETS[name]
    split = split_of(30, data.image_size)
    before = split.images.clone()
    how = {"augment": augment, "shuffle": augment, "seed": 3}
    expected = images_by_hand(split, data, epoch=2, **how)
    where = {"channels_last": channels_last, "on_device": on_device}
    batches = Batches(split, data, 8, CPU, **where, **how)
    made = list(batches.epoch(2))
    assert [len(targets) for _, targets in made] == [8, 8, 8, 6]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for images, targets in made:
        assert images.is_contiguous(memory_format=layout)
        assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)
    for part, wanted in zip(zip(*made, strict=True), expected, strict=True):
        assert torch.equal(torch.cat(part), wanted)
    assert torch.equal(split.images, before)


def test_a_batch_that_is_let_go_is_freed():
    """Not held until the next one: memory is what this is all about."""
    epoch = Batches(split_of(12), DATASETS["cifar10"], 4, CPU, augment=True).epoch(1)
    for images, targets in epoch:
        alive = weakref.ref(images), weakref.ref(targets)
        del images, targets
        assert [x() for x in alive] == [None, None]


@pytest.fixture
def cuda(monkeypatch):
    """Stands in for CUDA's streams, for there may be no GPU; its mock_calls are in order."""
    cuda = mock.MagicMock()
    cuda.Stream().record_event.side_effect = itertools.count()
    cuda.reset_mock()
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: cuda.used(len(x), stream))
    return cuda


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", DATASETS)
def test_a_batch_is_made_on_the_device(name, channels_last, on_device, cuda):
    """On fake CUDA tensors, which raise where an operation mixes devices; no GPU is needed."""
    with FakeTensorMode():
        needs_fake_cuda()
        split = Split(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.zeros(6, dtype=torch.long))
        how = {"channels_last": channels_last, "on_device": on_device}
        device = torch.device("cuda")
        batches = Batches(split, DATASETS[name], 4, device, augment=True, shuffle=True, **how)
        sizes = []
        for images, targets in batches.epoch(1):
            assert images.device.type == targets.device.type == "cuda"
            assert images.shape == (len(targets), 3, 8, 8)
            sizes.append(len(targets))
        assert sizes == [4, 2]
    assert batches.device_bytes == (6 * 3 * 8 * 8 + 6 * 8 if on_device else 0)
    assert bool(cuda.mock_calls) != on_device


def test_a_batch_is_copied_while_the_one_before_is_computed_with(cuda, monkeypatch):
    """The copies' order, what waits for what, and the values, with the CPU in place of a GPU."""
    cuda.pinned.side_effect = lambda x, rows: x[rows]
    monkeypatch.setattr(dataloaders, "pinned_rows", cuda.pinned)
    split, made = split_of(10), []
    parts = torch.randperm(10).split(4)
    for batch in dataloaders.CudaCopies(CPU).of_rows(split, parts):
        cuda.made(len(made))
        made.append(batch)
    for (images, targets), part in zip(made, parts, strict=True):
        assert torch.equal(images, split.images[part])
        assert torch.equal(targets, part)

    call, copying, computing = mock.call, cuda.Stream.return_value, cuda.current_stream.return_value

    def send(part):
        copied = [call.pinned(x, part) for x in split]
        begin, end = call.stream().__enter__(), call.stream().__exit__(None, None, None)
        return [call.stream(copying), begin, *copied, call.Stream().record_event(), end]

    def give(index, size):
        wait = [call.current_stream(CPU), call.current_stream().wait_event(index)]
        return [*wait, *[call.used(size, computing)] * 2, call.made(index)]

    begin = [call.Stream(CPU), *send(parts[0]), *send(parts[1]), *give(0, 4)]
    assert cuda.mock_calls == [*begin, *send(parts[2]), *give(1, 4), *give(2, 2)]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_cuda),
                                    pytest.param("cuda:1", marks=needs_two)])  # fmt: skip
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "svhn", "stl10"])
def test_cuda_gives_what_the_cpu_gives(name, channels_last, on_device, device):
    """Over enough batches for memory to be used again; each is worked on while the next comes."""
    split = split_of(2000, 32)
    how = {"augment": True, "shuffle": True, "channels_last": channels_last}
    there = Batches(split, DATASETS[name], 64, torch.device(device), on_device=on_device, **how)
    here = Batches(split, DATASETS[name], 64, CPU, **how)
    busy = torch.rand(2048, 2048, device=device)
    made = []
    for images, targets in there.epoch(1):
        busy = (busy @ busy).clamp(0, 1)
        made.append((images + 0, targets + 0))
    for (images, targets), (wanted, classes) in zip(made, here.epoch(1), strict=True):
        assert images.device.type == targets.device.type == "cuda"
        assert images.device.index == (torch.device(device).index or 0)
        torch.testing.assert_close(images.cpu(), wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(targets.cpu(), classes)


@needs_cuda
@pytest.mark.parametrize("on_device", [False, True])
def test_no_batch_makes_the_host_wait(on_device):
    rows = dataloaders.pinned_rows(torch.arange(12).view(6, 2), torch.tensor([4, 1]))
    assert (rows.is_pinned(), rows.tolist()) == (True, [[8, 9], [2, 3]])
    cuda = torch.device("cuda")
    how = {"augment": True, "on_device": on_device}
    batches = Batches(split_of(300, 32), DATASETS["cifar10"], 64, cuda, **how)
    list(batches.epoch(0))
    epoch = batches.epoch(1)  # sends what is drawn for all of it, and may wait for that
    try:
        torch.cuda.set_sync_debug_mode("error")
        list(epoch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_seeds_differ_in_all_that_they_depend_on():
    seeds = {dataloaders.epoch_seed(*x) for x in itertools.product(range(3), repeat=4)}
    assert len(seeds) == 3**4
    assert all(0 <= seed < 2**63 for seed in seeds)


# ---------------------------------------------------------------------------------------------
# digits, and torchvision's data sets from small files in their own formats


def test_digits():
    data = load_dataset("digits", "unused", 32)
    assert data.train.images.shape == (1437, 3, 32, 32)
    assert data.test.images.shape == (360, 3, 32, 32)
    assert (data.train.images.dtype, data.train.images.max()) == (torch.uint8, 255)
    train, test = (split.targets.bincount() for split in (data.train, data.test))
    assert torch.all((train / (train + test) - 0.8).abs() < 0.01)
    seen, unseen = (
        {i.numpy().tobytes() for i in split.images} for split in (data.train, data.test)
    )
    assert not seen & unseen
    limited = load_dataset("digits", "unused", 32, limit_per_class=3)
    assert limited.train.targets.bincount().tolist() == [3] * 10
    assert len(limited.test.targets) == 360
    with pytest.raises(InputError, match="digits has images of 32x32"):
        load_dataset("digits", "unused", 48)


def test_a_limit_keeps_the_first_of_each_class_in_file_order():
    targets = torch.tensor([2, 0, 2, 1, 0, 2, 0])
    assert dataloaders.first_of_each_class(targets, 2).tolist() == [0, 1, 2, 3, 4]


def test_test_images_are_spread_over_the_classes():
    """As drawn one by one: of each class in turn the first that is left."""
    targets = torch.tensor([2, 0, 2, 1, 0, 2, 0, 2])
    left, order = {c: [i for i in range(8) if targets[i] == c] for c in range(3)}, []
    while any(left.values()):
        order += [left[c].pop(0) for c in range(3) if left[c]]
    for count in range(1, 10):
        chosen = dataloaders.spread_over_classes(targets, count).tolist()
        assert chosen == sorted(order[:count])
    assert dataloaders.spread_over_classes(targets, None).tolist() == list(range(8))
    every = load_dataset("digits", "unused", 32)
    few = load_dataset("digits", "unused", 32, limit_test=25)
    assert few.test.targets.bincount().tolist() == [3] * 5 + [2] * 5
    firsts = [(every.test.targets == c).nonzero()[0].item() for c in range(10)]
    assert torch.equal(few.test.images[few.test.targets == 7][0], every.test.images[firsts[7]])
    assert torch.equal(few.train.images, every.train.images)


def rows_of(split):
    return [
        (i.numpy().tobytes(), t) for i, t in zip(split.images, split.targets.tolist(), strict=True)
    ]


def test_a_validation_split_is_a_stratified_part_of_the_training_images():
    every = load_dataset("digits", "unused", 32, 40)
    parts = [load_dataset("digits", "unused", 32, 40, val_fraction=0.25, seed=s) for s in (0, 0, 1)]
    for data in parts:
        assert data.val.targets.bincount().tolist() == [10] * 10
        assert data.train.targets.bincount().tolist() == [30] * 10
        assert sorted(rows_of(data.train) + rows_of(data.val)) == sorted(rows_of(every.train))
        assert rows_of(data.test) == rows_of(every.test)
    held_out = [rows_of(data.val) for data in parts]
    assert held_out[0] == held_out[1] != held_out[2]
    assert load_dataset("digits", "unused", 32, val_fraction=0.25, test_only=True).val is None
    for limit, fraction in ((1, 0.5), (4, 0.1), (4, 0.9)):  # too few of a class for both
        with pytest.raises(InputError, match=f"val_fraction {fraction} of {limit * 10} training"):
            load_dataset("digits", "unused", 32, limit, val_fraction=fraction)


def test_a_fingerprint_tells_what_has_changed():
    data = load_dataset("digits", "unused", 32, 4, limit_test=20, val_fraction=0.25)
    before = dataloaders.fingerprint(data)
    assert before == dataloaders.fingerprint(data)
    assert {name: sum(part["images"]) for name, part in before.items()} == {
        "train": 30, "val": 10, "test": 20,
    }  # fmt: skip
    images = data.train.images.clone()
    images[3, 2, 1, 0] ^= 1
    swapped = Split(data.val.images, data.val.targets.flip(0))
    fewer = Split(data.test.images[2:], data.test.targets[2:])
    other = data._replace(train=data.train._replace(images=images), val=swapped, test=fewer)
    found = dataloaders.changes(before, dataloaders.fingerprint(other), data.classes)
    same = "as many of each class, but their pixels or their order differ (other files, or another "
    assert found["train"] == found["val"] == same + "version of Pillow)"
    gone = [f"{c} 2, now 1" for c in data.test.targets[:2].tolist()]
    assert found["test"] == f"20 before, now 18 ({'; '.join(sorted(gone))})"
    assert dataloaders.changes(before, before, data.classes) == {}
    assert dataloaders.changes({}, before, data.classes) == {}


CIFAR = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


def write_cifar(data_dir, monkeypatch, name):
    """Two images in each batch, whose hashes torchvision is told; what the files hold, by name."""
    dataset, classes = CIFAR[name], DATASETS[name].classes
    folder = data_dir / dataset.base_folder
    folder.mkdir(parents=True)
    key = "labels" if name == "cifar10" else "fine_labels"
    written = {dataset.meta["filename"]: {dataset.meta["key"]: [f"c{i}" for i in range(classes)]}}
    rng = np.random.default_rng(0)
    for i, (file, _) in enumerate(dataset.train_list + dataset.test_list):
        rows = rng.integers(0, 256, (2, 3072), dtype=np.uint8)
        written[file] = {"data": rows, key: [i % classes, (i + 1) % classes]}
    for file, contents in written.items():
        (folder / file).write_bytes(pickle.dumps(contents))
    for files in ("train_list", "test_list"):
        listed = [[file, md5(folder / file)] for file, _ in getattr(dataset, files)]
        monkeypatch.setattr(dataset, files, listed)
    monkeypatch.setitem(dataset.meta, "md5", md5(folder / dataset.meta["filename"]))
    return written


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", CIFAR)
def test_cifar(tmp_path, monkeypatch, name):
    dataset = CIFAR[name]
    written = write_cifar(tmp_path, monkeypatch, name)

    data = load_dataset(name, tmp_path, 32)

    train = [written[file] for file, _ in dataset.train_list]
    key = "labels" if name == "cifar10" else "fine_labels"
    expected = np.concatenate([part["data"] for part in train]).reshape(-1, 3, 32, 32)
    assert np.array_equal(data.train.images.numpy(), expected)
    assert data.train.targets.tolist() == [label for part in train for label in part[key]]
    assert len(data.test.targets) == 2
    assert data.classes == written[dataset.meta["filename"]][dataset.meta["key"]]


def test_svhn(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    for part in ("train", "test"):
        mat = {"X": images, "y": np.array([[10], [1], [2], [9]])}  # 10 stands for the digit 0
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", mat)
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *args: True)
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda *args: True)

    data = load_dataset("svhn", tmp_path, 32)

    assert np.array_equal(data.train.images.numpy(), images.transpose(3, 2, 0, 1))
    assert data.train.targets.tolist() == [0, 1, 2, 9]


def test_stl10(tmp_path, monkeypatch):
    folder = tmp_path / datasets.STL10.base_folder
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)
    for part in ("train", "test"):
        images.transpose(0, 1, 3, 2).tofile(folder / f"{part}_X.bin")  # stored by columns
        np.array([1, 10, 2], dtype=np.uint8).tofile(folder / f"{part}_y.bin")
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)

    data = load_dataset("stl10", tmp_path, 96)

    assert np.array_equal(data.train.images.numpy(), images)
    assert data.train.targets.tolist() == [0, 9, 1]
    assert (data.classes[1], data.classes[9]) == ("bird", "truck")  # where CIFAR has automobiles


@pytest.fixture
def no_network(monkeypatch):
    refuse = mock.Mock(side_effect=URLError("no route to host"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)


BY_HAND = {
    "cifar10": "cifar-10-batches-py/ (extracted from https://",
    "cifar100": "cifar-100-python/ (extracted from https://",
    "svhn": "train_32x32.mat and test_32x32.mat (from http://",
    "stl10": "stl10_binary/ (extracted from http://",
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_failed_download_is_one_line(tmp_path, no_network, name):
    with pytest.raises(InputError, match=r"could not be downloaded .*no route to host") as caught:
        load_dataset(name, tmp_path / "new\nline", DATASETS[name].image_size)
    assert str(caught.value).isprintable()
    assert f"or put {BY_HAND[name]}" in str(caught.value)
    assert str(caught.value).endswith("by hand and name that folder with --data_dir")


def test_one_of_several_downloads_and_the_others_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(tarfile.TarFile, "extraction_filter", None, raising=False)  # set by both
    data_dir, started, waits = tmp_path / "data", threading.Semaphore(0), threading.Semaphore(0)
    ready = tmp_path / "ready"
    write_cifar(ready, monkeypatch, "cifar10")
    downloads, found, said = [], [], []

    def download(url, root, **options):
        downloads.append(url)
        started.release()
        assert waits.acquire(timeout=20)
        shutil.copytree(ready, root, dirs_exist_ok=True)

    def load():
        found.append(load_dataset("cifar10", data_dir, 32))

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", download)
    monkeypatch.setattr("builtins.print", lambda *text, **_: waits.release() or said.append(text))
    first, second = (threading.Thread(target=load) for _ in range(2))
    first.start()
    assert started.acquire(timeout=20)
    second.start()  # says that it waits, which lets the first go on
    for thread in (first, second):
        thread.join(20)
    assert len(downloads) == 1 and [len(data.train.targets) for data in found] == [10, 10]
    waiting = f"waiting for another process, which has {data_dir}/.cifar10.lock"
    assert said.count((waiting,)) == 1
    monkeypatch.setattr(dataloaders, "_locked", None)  # what is there needs no lock
    load()
    assert len(found) == 3


# ---------------------------------------------------------------------------------------------
# archives, and the pickles in them


def member(name, kind=tarfile.REGTYPE, to="", contents=b"hostile"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    info.size = len(contents) if kind == tarfile.REGTYPE else 0
    return info, io.BytesIO(contents)


def write_archive(data_dir, monkeypatch, dataset, members):
    """The archive of a data set, whose hash torchvision is told."""
    data_dir.mkdir(exist_ok=True)
    with tarfile.open(data_dir / dataset.filename, "w:gz") as tar:
        for info, contents in members:
            tar.addfile(info, contents)
    monkeypatch.setattr(dataset, "tgz_md5", md5(data_dir / dataset.filename))


@pytest.fixture
def cifar_archive(tmp_path, monkeypatch, no_network):
    """data/, with an archive of CIFAR-10 that is not extracted yet."""
    data_dir, folder = tmp_path / "data", datasets.CIFAR10.base_folder
    written = write_cifar(data_dir, monkeypatch, "cifar10")
    shutil.rmtree(data_dir / folder)
    members = [member(f"{folder}/{f}", contents=pickle.dumps(x)) for f, x in written.items()]
    write_archive(data_dir, monkeypatch, datasets.CIFAR10, members)
    return data_dir


def test_an_archive_is_extracted_by_a_python_that_can_do_it_safely(cifar_archive, monkeypatch):
    before = vars(tarfile.TarFile)["extraction_filter"]
    with monkeypatch.context() as old:
        old.delattr(tarfile, "data_filter")
        old.setattr(tarfile.TarFile, "extractall", unsafe := mock.Mock())
        with pytest.raises(InputError, match=r"take Python 3\.11\.4 or later"):
            load_dataset("cifar10", cifar_archive, 32)
    assert not unsafe.called
    assert len(load_dataset("cifar10", cifar_archive, 32).train.targets) == 10
    assert vars(tarfile.TarFile)["extraction_filter"] is before
    monkeypatch.delattr(tarfile, "data_filter")  # any Python reads what is extracted
    assert len(load_dataset("cifar10", cifar_archive, 32).train.targets) == 10


HOSTILE = {
    "parent": lambda out: [member("../outside")],
    "absolute": lambda out: [member(f"{out}/outside")],
    "link": lambda out: [member("a", tarfile.SYMTYPE, str(out)), member("a/outside")],
    "hard link": lambda out: [member("a", tarfile.LNKTYPE, "../secret"), member("a")],
    "links in it": lambda out: [
        member("a", tarfile.SYMTYPE, "."), member("b", tarfile.SYMTYPE, "a/.."), member("b/outside")
    ],
    "pipe": lambda out: [member("a", tarfile.FIFOTYPE)],
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_an_archive_stays_in_the_data_dir(tmp_path, monkeypatch, no_network, name, kind):
    dataset = getattr(datasets, name.upper())
    write_archive(tmp_path / "data", monkeypatch, dataset, HOSTILE[kind](tmp_path))
    secret = tmp_path / "secret"
    secret.write_text("secret")

    with pytest.raises(InputError, match="could not be downloaded and read") as caught:
        load_dataset(name, tmp_path / "data", DATASETS[name].image_size)

    assert str(caught.value).isprintable()
    assert {path.name for path in tmp_path.iterdir()} == {"data", "secret"}
    assert (secret.read_text(), secret.stat().st_nlink) == ("secret", 1)
    assert not any(p.is_symlink() or p.is_fifo() for p in tmp_path.rglob("*"))


def test_an_archive_of_another_hash_is_not_extracted(cifar_archive, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(InputError, match="no route to host"):
        load_dataset("cifar10", cifar_archive, 32)
    assert not (cifar_archive / datasets.CIFAR10.base_folder).exists()


@pytest.mark.parametrize(
    ("name", "file"),
    [(name, file) for name, dataset in CIFAR.items()
     for file, _ in [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], None)]],
)  # fmt: skip
def test_a_pickle_of_another_hash_is_not_loaded(tmp_path, monkeypatch, no_network, name, file):
    write_cifar(tmp_path / "data", monkeypatch, name)
    path = tmp_path / "data" / CIFAR[name].base_folder / file
    path.write_text(f"cos\nmkdir\n(V{tmp_path / 'has run'}\ntR.")  # a call of os.mkdir, pickled
    with pytest.raises(InputError, match="could not be downloaded and read"):
        load_dataset(name, tmp_path / "data", 32)
    assert not (tmp_path / "has run").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "has run").exists()  # it would have


# ---------------------------------------------------------------------------------------------
# folder


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, images in (("train", 3), ("test", 2)):
        for name in ("cat", "ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(images):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_folder(folder):
    data = load_dataset("folder", folder, 32)
    assert data.classes == ["ant", "bee", "cat"]
    assert dataloaders.count_classes(folder) == 3
    assert data.train.targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.test.targets.tolist() == [0, 0, 1, 1, 2, 2]
    with Image.open(folder / "train" / "bee" / "1.png") as image:
        assert np.array_equal(data.train.images[4].permute(1, 2, 0).numpy(), np.array(image))
    limited = load_dataset("folder", folder, 32, limit_per_class=1)
    assert torch.equal(limited.train.images, data.train.images[[0, 3, 6]])
    assert torch.equal(limited.test.images, data.test.images)
    test_only = load_dataset("folder", folder, 32, limit_per_class=1, test_only=True)
    assert (len(test_only.train.targets), test_only.classes) == (0, data.classes)
    assert torch.equal(test_only.test.images, data.test.images)


def test_folder_follows_links_and_leaves_out_what_is_no_image_of_a_class(folder):
    plain = load_dataset("folder", folder, 32)
    ant = folder / "train" / "ant"
    ant.rename(folder / "elsewhere")
    ant.symlink_to(folder / "elsewhere")
    (ant / "2.png").rename(folder / "image")
    (ant / "2.png").symlink_to("../image")
    for loop in ("1", "2"):  # together, there are 2**40 ways through them
        (ant / loop).symlink_to(ant)
    for name in ("ant/notes.txt", "ant/._0.png", "ant/more.png/0.png", ".hidden/0.png", "readme"):
        path = folder / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("not an image")
    data = load_dataset("folder", folder, 32)
    assert torch.equal(data.train.images, plain.train.images)
    assert data.classes == plain.classes


UPRIGHT = np.full((32, 32, 3), 255, dtype=np.uint8)
UPRIGHT[:16, :16], UPRIGHT[:16, 16:], UPRIGHT[16:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
STORED = {  # as EXIF defines the orientations: what is stored for an upright image
    1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2), 6: np.rot90(UPRIGHT), 7: np.rot90(UPRIGHT, 2).transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}  # fmt: skip


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_folder_turns_images_as_their_exif_says(folder, suffix, orientation):
    """An upright image is in quarters: red and green above, blue and white below."""
    (folder / "train" / "ant" / "0.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}
    path = folder / "train" / "ant" / f"0.{suffix}"
    stored = np.ascontiguousarray(STORED[orientation])
    Image.fromarray(stored).save(path, exif=exif, **options.get(suffix, {}))
    image = load_dataset("folder", folder, 32).train.images[0]
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - UPRIGHT).max() <= 3


def test_folder_turns_16_bits_too_and_nothing_for_exif_that_is_damaged(folder):
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    exif = Image.Exif()
    exif[0x0112] = 6
    ant = folder / "train" / "ant"
    Image.fromarray(np.rot90(ramp).copy()).save(ant / "0.png", exif=exif)
    Image.fromarray(UPRIGHT).save(ant / "1.png", exif=b"Exif\0\0MM\0nothing of the kind")
    images = load_dataset("folder", folder, 32).train.images
    assert np.array_equal(images[0, 0].numpy(), np.floor(ramp / 257).astype(np.uint8))
    assert np.array_equal(images[1].permute(1, 2, 0).numpy(), UPRIGHT)


def test_folder_counts_what_it_leaves_out(folder):
    assert load_dataset("folder", folder, 32).notes == []
    for name in ("ant/a.HEIC", "ant/b.heic", "cat/._0.png", ".x/0.png", "cat/more/0.png", "readme",
                 "bee/notes"):  # fmt: skip
        path = folder / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("not an image")
    (folder / "test" / "ant" / "new\nline.gif").write_text("not an image")
    assert load_dataset("folder", folder, 32).notes == [
        f"left out of {folder}/train: 7 (2 hidden, 2 *.heic, 1 outside the folders of classes, "
        "1 without a suffix, 1 folders in that of a class)",
        f"left out of {folder}/test: 1 (1 *.gif)",
    ]


def test_folder_knows_a_class_in_either_normal_form_of_unicode(folder):
    """Indices are those of form C: the decomposed name alone would be sorted between d and f."""
    for part, form in (("train", "NFC"), ("test", "NFD")):
        (folder / part / "bee").rename(folder / part / unicodedata.normalize(form, "été"))
    data = load_dataset("folder", folder, 32)
    assert data.classes == ["ant", "cat", "\u00e9t\u00e9"]
    assert data.test.targets.tolist() == [0, 0, 1, 1, 2, 2]
    with Image.open(folder / "test" / "e\u0301te\u0301" / "1.png") as image:
        assert np.array_equal(data.test.images[5].permute(1, 2, 0).numpy(), np.array(image))
    shutil.copytree(folder / "test" / "e\u0301te\u0301", folder / "test" / "\u00e9t\u00e9")
    check_refused(folder, "two folders in .*test have the same name, été, in two normal forms")


@pytest.mark.parametrize("limits", [{}, {"limit_test": 4}, {"limit_test": 4, "test_only": True}])
def test_folder_reads_what_is_kept_and_shows_how_far_it_is(folder, limits):
    every, shown = load_dataset("folder", folder, 32), []

    def watch(things, title, total):
        shown.append((title, total, len(list(things))))
        return ()

    data = load_dataset("folder", folder, 32, limit_per_class=2, watch=watch, **limits)
    train, test = 0 if "test_only" in limits else 6, limits.get("limit_test", 6)
    assert sorted(shown) == [("reading test images", test, test),
                             ("reading training images", train, train)]  # fmt: skip
    kept = [0, 1, 2, 4] if limits else range(6)
    assert torch.equal(data.test.images, every.test.images[list(kept)])
    assert data.test.targets.tolist() == every.test.targets[list(kept)].tolist()


@pytest.mark.parametrize(
    ("suffix", "order"), [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2"), ("pgm", "<u2")]
)
def test_folder_scales_16_bits_to_8(folder, suffix, order):
    ramp = np.linspace(0, 65535, 32 * 32).astype(order).reshape(32, 32)
    (folder / "train" / "ant" / "0.png").unlink()
    Image.fromarray(ramp).save(folder / "train" / "ant" / f"0.{suffix}")
    image = load_dataset("folder", folder, 32).train.images[0]
    assert np.array_equal(image[0].numpy(), np.floor(ramp / 257).astype(np.uint8))


def test_folder_resizes_smoothly(folder):
    pixels = np.zeros((96, 96), dtype=np.uint8)
    pixels[:, 1::3] = 255
    Image.fromarray(pixels).save(folder / "train" / "ant" / "0.png")
    image = load_dataset("folder", folder, 32).train.images[0]
    assert torch.all(image[:, :, 1:-1] == 85)  # a third of the light


def test_images_are_decoded_by_the_cpus_that_the_process_may_use(folder, monkeypatch):
    pool = mock.Mock(wraps=dataloaders.ThreadPool)
    monkeypatch.setattr(dataloaders, "ThreadPool", pool)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 8}, raising=False)
    load_dataset("folder", folder, 32)
    assert pool.call_args_list == [mock.call(3)] * 2


def check_refused(folder, message):
    with pytest.raises(InputError, match=message) as caught:
        load_dataset("folder", folder, 32)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("limit", [1000, 100])  # Pillow itself only warns of the first
def test_folder_refuses_a_huge_image(folder, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    check_refused(folder, r"0\.png is not .*1024 pixels\) exceeds limit")


@pytest.mark.parametrize("name", ["new\nline", "\udcff", "\x1b[2J", "\u202e"])
def test_folder_says_odd_names_on_one_line(folder, name):
    """Of classes without an image or in one part only, and of images."""
    (folder / "train" / name).mkdir()
    check_refused(folder, "there is no image of")
    (folder / "train" / name / f"{name}.png").write_bytes(b"")
    check_refused(folder, "only one of them has")
    (folder / "test" / name).mkdir()
    (folder / "test" / name / f"{name}.png").write_bytes(b"")
    check_refused(folder, "not an image")


NOT_LISTED = r"cannot read the images in .*; data_dir must hold train/<class>/\*"
NO_FILE = r"x\.png is not an image .*not a file"
FAULTS = {
    "no train": ("train", shutil.rmtree, NOT_LISTED),
    "no test": ("test", shutil.rmtree, NOT_LISTED),
    "no class": ("train", lambda p: [x.rename(p / f".{x.name}") for x in p.glob("*")], NOT_LISTED),
    "no image": ("train/wasp", os.mkdir, "there is no image of wasp;"),
    "other class": ("test/bee", lambda p: p.rename(p.with_name("fly")), "of them has bee, fly"),
    "text": ("test/bee/0.png", lambda p: p.write_text("no picture"), r"0\.png is not an image"),
    "32 bits": ("train/ant/0.tif", Image.new("F", (8, 8)).save, r"0\.tif .*pixels have 32 bits"),
    "program": ("test/ant/0.png", lambda p: Image.new("L", (8, 8)).save(p, "EPS"), "PostScript"),
    "link to nothing": ("train/ant/x.png", lambda p: p.symlink_to("nowhere"), NO_FILE),
    "link to itself": ("train/x", lambda p: p.symlink_to("x"), "Too many levels .*links"),
    "pipe": ("test/ant/x.png", os.mkfifo, NO_FILE),
    "device": ("test/ant/x.png", lambda p: p.symlink_to("/dev/zero"), NO_FILE),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_folder_says_in_one_line_what_is_wrong(folder, monkeypatch, fault):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)  # must not be started
    path, make, message = FAULTS[fault]
    make(folder / path)
    check_refused(folder, message)
