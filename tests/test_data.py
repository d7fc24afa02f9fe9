"""Reading data sets, and augmentation against plain loops."""

import hashlib
import http.client
import io
import os
import pickle
import shutil
import struct
import tarfile
import weakref
import zlib
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import datasets

import dataloaders
from configs import DATASETS, InputError
from dataloaders import Batches, Split, load_dataset

CPU = torch.device("cpu")


def random_images(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


# ---------------------------------------------------------------------------------------------
# Batches


def split_of(count, size=8):
    return Split(random_images(count, size), torch.arange(count))


def epoch_of(split, name="cifar10", epoch=1, **options):
    batches = Batches(split, DATASETS[name], device=CPU, **({"batch_size": 4} | options))
    return [torch.cat(x) for x in zip(*batches.epoch(epoch), strict=True)]


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


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("name", DATASETS)
def test_an_epoch_is_that_of_the_plain_loop(name, augment, channels_last):
    """To the last bit; the split is left as it was."""
    data = DATASETS[name]
    split = split_of(30, data.image_size)
    before = split.images.clone()
    how = {"augment": augment, "shuffle": augment, "seed": 3}
    expected = images_by_hand(split, data, epoch=2, **how)
    batches = Batches(split, data, 8, CPU, channels_last=channels_last, **how)
    made = list(batches.epoch(2))
    assert [len(targets) for _, targets in made] == [8, 8, 8, 6]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for images, targets in made:
        assert images.is_contiguous(memory_format=layout)
        assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)
    for part, wanted in zip(zip(*made, strict=True), expected, strict=True):
        assert torch.equal(torch.cat(part), wanted)
    assert torch.equal(split.images, before)


def test_no_batch_shares_memory_with_another_or_the_split():
    split = split_of(12)
    for augment in (False, True):
        batches = Batches(split, DATASETS["cifar10"], 4, CPU, augment=augment)
        made = [images for images, _ in batches.epoch(1)]
        kept = [images.clone() for images in made]
        made[0].zero_()
        assert torch.equal(torch.cat(made[1:]), torch.cat(kept[1:]))
    assert split.images.any()


def test_a_batch_that_is_let_go_is_freed():
    """Not held until the next one: memory is what this is all about."""
    epoch = Batches(split_of(12), DATASETS["cifar10"], 4, CPU, augment=True).epoch(1)
    for images, targets in epoch:
        alive = weakref.ref(images), weakref.ref(targets)
        del images, targets
        assert [x() for x in alive] == [None, None]


class CudaStream:
    """Stands in for torch.cuda's streams, for there may be no GPU, and notes what it is told."""

    def __init__(self, notes, name):
        self.notes, self.name, self.events = notes, name, 0

    def __enter__(self):
        self.notes.append(("enter", self.name))

    def __exit__(self, *exception):
        self.notes.append(("leave", self.name))

    def record_event(self):
        self.events += 1
        self.notes.append(("sent", self.events - 1))
        return self.events - 1

    def wait_event(self, event):
        self.notes.append(("wait", event))


@pytest.fixture
def notes(monkeypatch):
    """What happens to CUDA streams and to memory that two of them use, in order."""
    notes = []
    computing = CudaStream(notes, "computing")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: CudaStream(notes, f"to {device}"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda t, s: notes.append(("used", s.name, len(t)))
    )
    return notes


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", DATASETS)
def test_a_batch_is_made_on_the_device(name, channels_last, on_device, notes):
    """On fake CUDA tensors, which raise where an operation mixes devices; no GPU is needed."""
    with FakeTensorMode():
        split = Split(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.zeros(6, dtype=torch.long))
        how = {"channels_last": channels_last, "on_device": on_device}
        cuda = torch.device("cuda")
        batches = Batches(split, DATASETS[name], 4, cuda, augment=True, shuffle=True, **how)
        sizes = []
        for images, targets in batches.epoch(1):
            assert images.device.type == targets.device.type == "cuda"
            assert images.shape == (len(targets), 3, 8, 8)
            sizes.append(len(targets))
        assert sizes == [4, 2]
    assert batches.device_bytes == (6 * 3 * 8 * 8 + 6 * 8 if on_device else 0)
    assert bool(notes) != on_device


def test_a_batch_is_copied_while_the_one_before_is_computed_with(notes, monkeypatch):
    """The copies' order, what waits for what, and the values, with the CPU in place of a GPU."""
    monkeypatch.setattr(
        dataloaders, "pinned_rows", lambda x, rows: notes.append(("pinned", len(rows))) or x[rows]
    )
    copies = dataloaders.CudaCopies(CPU)
    split = split_of(10)
    parts = torch.randperm(10).split(4)
    made = []
    for batch in copies.of_rows(split, parts):
        notes.append(("yield", len(made)))
        made.append(batch)
    for (images, targets), part in zip(made, parts, strict=True):
        assert torch.equal(images, split.images[part])
        assert torch.equal(targets, part)

    def send(index, size):
        copied = [("pinned", size)] * 2  # images and targets
        return [("enter", "to cpu"), *copied, ("sent", index), ("leave", "to cpu")]

    def give(index, size):
        return [("wait", index), *[("used", "computing", size)] * 2, ("yield", index)]

    begin = [*send(0, 4), *send(1, 4), *give(0, 4)]
    assert notes == [*begin, *send(2, 2), *give(1, 4), *give(2, 2)]


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
def test_rows_to_be_copied_are_pinned():
    rows = dataloaders.pinned_rows(torch.arange(12).view(6, 2), torch.tensor([4, 1]))
    assert rows.is_pinned()
    assert rows.tolist() == [[8, 9], [2, 3]]


@needs_cuda
@pytest.mark.parametrize("on_device", [False, True])
def test_no_batch_makes_the_host_wait(on_device):
    split = split_of(300, 32)
    cuda = torch.device("cuda")
    batches = Batches(split, DATASETS["cifar10"], 64, cuda, augment=True, on_device=on_device)
    for _ in batches.epoch(0):
        pass
    epoch = batches.epoch(1)  # sends what is drawn for all of it, and may wait for that
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in epoch:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_random_depends_on_seed_and_epoch_alone():
    split = split_of(50)

    def draw(**options):
        return epoch_of(split, augment=True, shuffle=True, **options)

    first = draw(seed=3, epoch=2)
    for how in ({}, {"batch_size": 17}, {"on_device": True}):
        same = draw(seed=3, epoch=2, **how)
        assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    for other in (draw(seed=3, epoch=3), draw(seed=2, epoch=3), draw(seed=2, epoch=2)):
        assert not torch.equal(first[1], other[1])


# ---------------------------------------------------------------------------------------------
# digits


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


# ---------------------------------------------------------------------------------------------
# torchvision's data sets, from small files in their own formats


def rows(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


CIFAR = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


def write_cifar(data_dir, monkeypatch, name):
    """Two images in each batch, whose hashes torchvision is told; what the files hold, by name."""
    dataset, classes = CIFAR[name], DATASETS[name].classes
    folder = data_dir / dataset.base_folder
    folder.mkdir(parents=True)
    key = "labels" if name == "cifar10" else "fine_labels"
    written = {dataset.meta["filename"]: {dataset.meta["key"]: [f"c{i}" for i in range(classes)]}}
    for i, (file, _) in enumerate(dataset.train_list + dataset.test_list):
        written[file] = {"data": rows(2, i), key: [i % classes, (i + 1) % classes]}
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
    monkeypatch.setattr(datasets.SVHN, "download", lambda self: None)

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
    monkeypatch.setattr(datasets.STL10, "download", lambda self: None)
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    with pytest.raises(InputError, match=r"class_names\.txt does not name 10 classes"):
        load_dataset("stl10", tmp_path, 96)
    (folder / "class_names.txt").write_text("\n".join(f"c{i}" for i in range(10)))

    data = load_dataset("stl10", tmp_path, 96)

    assert np.array_equal(data.train.images.numpy(), images)
    assert data.train.targets.tolist() == [0, 9, 1]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "stl10"])
def test_a_failed_download_is_one_line(tmp_path, monkeypatch, no_network, name):
    with pytest.raises(InputError, match=r"could not be downloaded .*no route to host") as caught:
        load_dataset(name, tmp_path / "new\nline", DATASETS[name].image_size)
    assert str(caught.value).isprintable()

    def break_off(*args, **kwargs):
        raise http.client.IncompleteRead(b"")  # not an OSError

    monkeypatch.setattr("urllib.request.urlopen", break_off)
    with pytest.raises(InputError, match="IncompleteRead"):
        load_dataset(name, tmp_path, DATASETS[name].image_size)


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
    archive = data_dir / dataset.filename
    with tarfile.open(archive, "w:gz") as tar:
        for info, contents in members:
            tar.addfile(info, contents)
    monkeypatch.setattr(dataset, "tgz_md5", md5(archive))
    return archive


def cifar_members(written):
    for file, contents in written.items():
        yield member(f"{datasets.CIFAR10.base_folder}/{file}", contents=pickle.dumps(contents))


@pytest.fixture
def cifar_archive(tmp_path, monkeypatch, no_network):
    """data/, with an archive of CIFAR-10 that is not extracted yet."""
    data_dir = tmp_path / "data"
    written = write_cifar(data_dir, monkeypatch, "cifar10")
    shutil.rmtree(data_dir / datasets.CIFAR10.base_folder)
    write_archive(data_dir, monkeypatch, datasets.CIFAR10, cifar_members(written))
    return data_dir


def test_an_archive_is_extracted(cifar_archive):
    before = vars(tarfile.TarFile)["extraction_filter"]
    assert len(load_dataset("cifar10", cifar_archive, 32).train.targets) == 10
    assert vars(tarfile.TarFile)["extraction_filter"] is before


HOSTILE = {
    "parent": lambda out: [member("../outside")],
    "parent of a folder in it": lambda out: [
        member("a", tarfile.DIRTYPE), member("a/../../outside")
    ],
    "absolute": lambda out: [member(f"{out}/outside")],
    "link": lambda out: [member("a", tarfile.SYMTYPE, ".."), member("a/outside")],
    "absolute link": lambda out: [member("a", tarfile.SYMTYPE, str(out)), member("a/outside")],
    "hard link": lambda out: [member("a", tarfile.LNKTYPE, "../secret"), member("a")],
    "links in it": lambda out: [
        member("a", tarfile.SYMTYPE, "."), member("b", tarfile.SYMTYPE, "a/.."), member("b/outside")
    ],
    "pipe": lambda out: [member("a", tarfile.FIFOTYPE)],
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_an_archive_stays_in_the_data_dir(tmp_path, monkeypatch, no_network, name, kind):
    dataset = {"cifar10": datasets.CIFAR10, "stl10": datasets.STL10}[name]
    write_archive(tmp_path / "data", monkeypatch, dataset, HOSTILE[kind](tmp_path))
    secret = tmp_path / "secret"
    secret.write_text("secret")
    before = vars(tarfile.TarFile)["extraction_filter"]

    with pytest.raises(InputError, match="could not be downloaded and read") as caught:
        load_dataset(name, tmp_path / "data", DATASETS[name].image_size)

    assert str(caught.value).isprintable()
    assert {path.name for path in tmp_path.iterdir()} == {"data", "secret"}
    assert (secret.read_text(), secret.stat().st_nlink) == ("secret", 1)
    assert not any(p.is_symlink() or p.is_fifo() for p in tmp_path.rglob("*"))
    assert vars(tarfile.TarFile)["extraction_filter"] is before


def test_an_archive_of_another_hash_is_not_extracted(cifar_archive, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(InputError, match="no route to host"):
        load_dataset("cifar10", cifar_archive, 32)
    assert not (cifar_archive / datasets.CIFAR10.base_folder).exists()


def test_a_python_that_cannot_extract_safely_does_not(cifar_archive, monkeypatch):
    with monkeypatch.context() as old:
        old.delattr(tarfile, "data_filter")
        with pytest.raises(InputError, match=r"Python before 3\.11\.4 cannot extract it safely"):
            load_dataset("cifar10", cifar_archive, 32)
    assert not (cifar_archive / datasets.CIFAR10.base_folder).exists()
    load_dataset("cifar10", cifar_archive, 32)
    monkeypatch.delattr(tarfile, "data_filter")
    assert len(load_dataset("cifar10", cifar_archive, 32).train.targets) == 10


class RunsCode:
    """Pickled, it makes a folder where it is loaded."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize(
    ("name", "file"),
    [(name, file) for name, dataset in CIFAR.items()
     for file, _ in [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], None)]],
)  # fmt: skip
def test_a_pickle_of_another_hash_is_not_loaded(tmp_path, monkeypatch, no_network, name, file):
    write_cifar(tmp_path / "data", monkeypatch, name)
    path = tmp_path / "data" / CIFAR[name].base_folder / file
    path.write_bytes(pickle.dumps(RunsCode(tmp_path / "has run")))
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
    for part, count in (("train", 3), ("test", 2)):
        for name in ("cat", "ant", "bee"):
            where = tmp_path / part / name
            where.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(where / f"{i}.png")
    return tmp_path


def test_folder(folder):
    (folder / "train" / "ant" / "notes.txt").write_text("not an image")
    (folder / "train" / "readme.md").write_text("not a class")
    (folder / "train" / ".checkpoints").mkdir()
    (folder / "train" / "ant" / "._0.png").write_text("not an image either")
    data = load_dataset("folder", folder, 32)
    assert data.classes == ["ant", "bee", "cat"]
    assert data.train.targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.test.targets.tolist() == [0, 0, 1, 1, 2, 2]
    with Image.open(folder / "train" / "bee" / "1.png") as image:
        assert np.array_equal(data.train.images[4].permute(1, 2, 0).numpy(), np.array(image))
    assert dataloaders.count_classes(folder) == 3
    limited = load_dataset("folder", folder, 32, limit_per_class=1)
    assert torch.equal(limited.train.images, data.train.images[[0, 3, 6]])
    assert torch.equal(limited.test.images, data.test.images)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_folder_scales_16_bits_to_8(folder, suffix):
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    (folder / "train" / "ant" / "0.png").unlink()
    Image.fromarray(ramp).save(folder / "train" / "ant" / f"0.{suffix}")
    image = load_dataset("folder", folder, 32).train.images[0]
    assert np.array_equal(image[0].numpy(), np.floor(ramp / 257).astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(10000, 9000), (20000, 20000), (2**31 - 1, 1)])
def test_folder_refuses_a_huge_image_by_its_header(folder, width, height):
    """Pillow warns of the first one only; there is nothing to decode in them."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [struct.pack(">I", 13), header, struct.pack(">I", zlib.crc32(header))]
    path = folder / "train" / "ant" / "0.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + b"\0\0\0\0IDAT\x35\xaf\x06\x1e")
    size = rf"({width}x{height}|{width * height}) pixels"
    with pytest.raises(InputError, match=rf"0\.png is not .*{size}.*; make it smaller"):
        load_dataset("folder", folder, 32)


def test_folder_warns_of_nothing_that_it_can_read(folder, recwarn):
    image = Image.new("P", (32, 32), 1)
    image.info["transparency"] = b"\x00\x80"
    image.save(folder / "train" / "ant" / "0.png")
    load_dataset("folder", folder, 32)
    assert not recwarn.list


def test_folder_reads_the_files_of_a_class_and_no_folders_in_it(folder):
    (folder / "train" / "ant" / "loop").symlink_to(folder / "train" / "ant")
    (folder / "train" / "ant" / "more.png").mkdir()
    assert len(load_dataset("folder", folder, 32).train.targets) == 9


def test_folder_follows_links(folder):
    plain = load_dataset("folder", folder, 32)
    (folder / "train" / "ant").rename(folder / "elsewhere")
    (folder / "train" / "ant").symlink_to(folder / "elsewhere")
    (folder / "elsewhere" / "2.png").rename(folder / "image")
    (folder / "elsewhere" / "2.png").symlink_to("../image")
    linked = load_dataset("folder", folder, 32)
    assert torch.equal(linked.train.images, plain.train.images)
    assert linked.classes == plain.classes


@pytest.mark.parametrize("name", ["new\nline", "\udcff", "\x1b[2J", "\u202e"])
def test_folder_says_odd_names_on_one_line(folder, name):
    """Of classes in one part only, without an image, and of images."""
    (folder / "train" / name).mkdir()
    for what in ("classes without an image", "only in one of them", "not an image"):
        with pytest.raises(InputError, match=what) as caught:
            load_dataset("folder", folder, 32)
        assert str(caught.value).isprintable()
        if what == "classes without an image":
            shutil.copy(folder / "train" / "ant" / "0.png", folder / "train" / name / "0.png")
        else:
            (folder / "test" / name).mkdir(exist_ok=True)
            (folder / "test" / name / f"{name}.png").write_bytes(b"")


def test_folder_resizes_smoothly(folder):
    pixels = np.zeros((64, 64), dtype=np.uint8)
    pixels[:, 1::2] = 255
    Image.fromarray(pixels).save(folder / "train" / "ant" / "0.png")
    image = load_dataset("folder", folder, 32).train.images[0]
    assert 100 < float(image[:, :, 8:24].float().mean()) < 155
    assert image[:, :, 8:24].min() > 60


def test_images_are_decoded_by_the_cpus_that_the_process_may_use(folder, monkeypatch):
    pools = []
    pool = dataloaders.ThreadPool
    monkeypatch.setattr(dataloaders, "ThreadPool", lambda n: pools.append(n) or pool(n))
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 8}, raising=False)
    load_dataset("folder", folder, 32)
    assert pools == [3, 3]


def empty(path):
    for image in path.iterdir():
        image.unlink()


UNREADABLE = r"0\.png is not an image that can be read"
FAULTS = {
    "no train": (lambda f: shutil.rmtree(f / "train"), r"cannot read .*train.*train/<class>"),
    "no test": (lambda f: shutil.rmtree(f / "test"), r"cannot read the images in .*test"),
    "no image": (lambda f: empty(f / "train" / "bee"), "classes without an image: bee"),
    "other classes": (
        lambda f: (f / "test" / "bee").rename(f / "test" / "wasp"),
        "same classes, but bee, wasp are only in one",
    ),
    "empty": (lambda f: (f / "test/bee/0.png").write_bytes(b""), UNREADABLE),
    "text": (lambda f: (f / "test/bee/0.png").write_text("no picture"), UNREADABLE),
    "cut header": (lambda f: (f / "test/bee/0.png").write_bytes(b"\x89PNG\r\n\x1a\n"), UNREADABLE),
    "cut": (lambda f: os.truncate(f / "train/bee/0.png", 1000), UNREADABLE),
    "32 bits": (
        lambda f: Image.new("F", (32, 32), 0.5).save(f / "train/ant/0.tif"),
        r"0\.tif .*its pixels have 32 bits",
    ),
    "program": (
        lambda f: Image.new("RGB", (8, 8)).save(f / "train/ant/0.png", "EPS"),
        r"0\.png is not .*it is PostScript",
    ),
    "link to nothing": (
        lambda f: (f / "train/ant/x.png").symlink_to("nowhere"),
        r"x\.png is a link that cannot be followed",
    ),
    "link to itself": (
        lambda f: (f / "train/x").symlink_to("x"),
        "x is a link that cannot be followed",
    ),
    "pipe": (lambda f: os.mkfifo(f / "test/ant/x.png"), r"x\.png is not a file"),
    "device": (lambda f: (f / "test/ant/x.png").symlink_to("/dev/zero"), r"x\.png is not a file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_folder_says_in_one_line_what_is_wrong(folder, monkeypatch, fault):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)  # must not be started
    make, message = FAULTS[fault]
    make(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_dataset("folder", folder, 32)
    assert str(caught.value).isprintable()
