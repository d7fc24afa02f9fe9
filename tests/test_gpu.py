"""planning/gpu.py's pieces on the CPU, and what holds on CUDA but can be settled without."""

import json
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from cli import TINY
from torch.autograd import DeviceType

from configs import METHODS
from engine.memory import LiveBytes
from engine.step import make_optimizers, state_of
from models import build_network
from planning import gpu
from planning.plan import accuracy_of_plan, make_plan, planned_peak

CPU = torch.device("cpu")
TINY_NET = "--dataset cifar10 --local_loss_mode cross_entropy --layers 8 --local_module_num 2"
TINY_NET += " --batch_size 8"


def test_names_of_files():
    assert gpu.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert gpu.file_name("../Tesla (T4)/") == "tesla-t4"


def test_without_cuda_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = subprocess.run(
        [sys.executable, "-m", "planning.gpu"], cwd=gpu.ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu: error: PyTorch sees no CUDA device here\n"


def test_a_process_is_killed_in_time_with_its_children(tmp_path):
    child = f"import time, pathlib; time.sleep(2); pathlib.Path('{tmp_path}/alive').touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    with pytest.raises(gpu.Failed, match="did not end in time"):
        gpu.run(start + 0.3, "-c", code)
    time.sleep(max(start + 2.7 - time.monotonic(), 0))
    assert not (tmp_path / "alive").exists()


def test_a_piece_that_fails_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def fails(until):
        gpu.run(until, "-c", "import sys; print('a\\nValueError: b\\n\\n', file=sys.stderr); 1/0")

    def left_out(until):
        raise gpu.LeftOut("it needs two")

    def breaks(until):
        raise KeyError("x")

    pieces = [gpu.Piece(f.__name__, 60, f) for f in (fails, left_out, breaks)]
    good = gpu.Piece("good", 60, lambda until: [gpu.figure("steps", 3, "steps")])
    entries = gpu.measure(pieces, [good])
    assert [(e["status"], e["why"]) for e in entries] == [
        ("failed", "ZeroDivisionError: division by zero"), ("left out", "it needs two"),
        ("failed", "'x'"), ("passed", ""),
    ]  # fmt: skip
    monkeypatch.setattr(gpu, "facts", lambda: MADE_UP | {"pieces": []})
    assert gpu.write_result(entries, tmp_path / "gpu") == 1
    assert gpu.write_result(entries[3:], tmp_path / "gpu") == 0
    monkeypatch.setattr(gpu, "SECONDS", 0)
    (late,) = gpu.measure([], [good])
    assert (late["status"], late["why"]) == ("failed", "no time was left for it")


MADE_UP = {
    "device": "NVIDIA X|1", "devices": 2, "driver": "550.1", "git": {"commit": "c0ffee"},
    "versions": {"torch": "2.14"}, "cublas_workspace_config": "not set",
}  # fmt: skip


def test_the_page_is_made_from_the_json(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "facts", lambda: MADE_UP)
    pieces = [
        {"name": "memory", "status": "passed", "why": "", "seconds": 1.5,
         "figures": [gpu.figure("E: planned", 467.25, "MiB"), gpu.figure("loader", 123456, "a/s")]},
        {"name": "tests", "status": "failed", "why": "a | b", "seconds": 2, "figures": []},
    ]  # fmt: skip
    assert gpu.write_result(pieces, tmp_path) == 1
    stored = json.loads((tmp_path / "nvidia-x-1.json").read_text())
    assert stored == MADE_UP | {"pieces": pieces}
    page = (tmp_path / "nvidia-x-1.md").read_text()
    assert page == gpu.page(stored)
    for row in ("| memory | E: planned | 467.2 | MiB |", "| memory | loader | 123,456 | a/s |",
                "| tests | failed | 2 | a \\| b |", "| memory | passed | 1.5 |  |"):  # fmt: skip
        assert row in page.splitlines()


def test_kernels_that_overlap_count_once():
    def event(name, kind, start, end):
        return SimpleNamespace(
            name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end)
        )

    events = [
        event("aten::conv2d", DeviceType.CPU, 0, 100),
        event("Optimizer.step", DeviceType.CPU, 0, 50),
        event("Optimizer.step", DeviceType.CUDA, 0, 90),  # a range, no kernel
        event("gemm", DeviceType.CUDA, 10, 20),
        event("relu", DeviceType.CUDA, 40, 45),
        event("copy", DeviceType.CUDA, 15, 30),  # in another stream
        event("inside", DeviceType.CUDA, 16, 18),
    ]
    assert gpu.busy_microseconds(events) == 20 + 5
    assert gpu.busy_microseconds(events[:2]) == 0


def test_pieces_within_a_process_run_on_the_cpu():
    figures = gpu.compare_memory(CPU, TINY_NET)
    accuracy = [f["value"] for f in figures if f["unit"] == "planned / measured"]
    assert accuracy == pytest.approx([1] * 5, rel=0.01)
    figures = gpu.profile_steps(CPU, TINY_NET, steps=1)
    shares = [f["value"] for f in figures if f["unit"] == "%"]
    assert shares == [0, 100] * 3  # no CUDA kernels
    assert gpu.find_waits(CPU, TINY_NET) == [
        gpu.figure("synchronising calls in a step", 0, "calls")
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_calls_that_wait_are_named(monkeypatch):
    def step():
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    line = step.__code__.co_firstlineno + 1
    assert gpu.synchronising_calls(step) == [f"test_gpu.py:{line}"]
    monkeypatch.setattr(gpu, "make_step", lambda *_: (step, None, 0))
    with pytest.raises(gpu.Failed, match=f"waits for the device at test_gpu.py:{line}"):
        gpu.find_waits(CPU)


@pytest.mark.slow
def test_runs_of_train_py_on_the_cpu(tmp_path):
    gpu.make_images(tmp_path / "images")
    until = time.monotonic() + 300
    figures = gpu.train(until, "cpu", tmp_path, "--context_mode R1E --amp bf16")
    assert [f["what"] for f in figures] == ["test error", "peak of a step"]
    (same,) = gpu.compare_bits(until, "cpu", tmp_path)
    assert same["value"] == 3
    with pytest.raises(gpu.Failed, match=r"train\.py: error: a ResNet has 6n"):
        gpu.train(until, "cpu", tmp_path, "--layers 9", name="wrong")


def test_each_piece_has_options_that_train_py_takes(tmp_path, monkeypatch):
    together, alone = gpu.make_pieces("cpu", tmp_path)
    (tmp_path / "images" / "train" / "a").mkdir(parents=True)
    trained = [p.work.keywords["options"] for p in together if p.name.startswith("train ")]
    assert len(trained) == 4 * 4 + 2 + len(METHODS)
    for options in trained:
        gpu.read_options(["--dataset", "folder", *gpu.TINY.split(), *options.split()])
    assert [p.name for p in alone[:4]] == list(gpu.IN_PROCESS)
    calls = []
    monkeypatch.setattr(gpu, "run", lambda until, *command: calls.append(command) or "[]")
    for piece in alone:
        assert piece.work(0) == []
    assert len(calls) == len(alone)


# What holds on CUDA and needs no GPU


@pytest.mark.parametrize("scale", [False, True], ids=["float32", "fp16"])
def test_sgd_allocates_nothing_that_a_plan_would_leave_out(scale):
    network = build_network(layers=8, local_module_num=2, image_size=16, context_mode="R0",
                            amp="fp16" if scale else "off")  # fmt: skip
    optimizers = make_optimizers(network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if scale:
        for optimizer in optimizers:
            optimizer.scaler.scale(torch.zeros(()))  # which makes its scale
    alive = [*state_of(network.stage, optimizers), *(p.grad for p in network.parameters())]
    with LiveBytes(alive) as meter:
        before = meter.live
        for optimizer in optimizers:
            optimizer.step_and_free()
    assert meter.peak - before < 100  # the scaler's few numbers


def test_accuracy_of_a_plan_by_hand():
    line = accuracy_of_plan(3 * 2**20, 4 * 2**20)
    assert line == "planned peak 3 MiB, measured 4 MiB: accuracy 0.750 (planned / measured)"
    arguments = {"layers": 8, "local_module_num": 2, "image_size": 16, "context_mode": "E"}
    assert planned_peak(arguments, 8) == make_plan(arguments, 8).peak_bytes


# Without packages that only some parts need

OPTIONAL = ("tqdm", "filelock", "matplotlib", "tensorboard", "sklearn", "pandas")


def without(names, code):
    """Status and lines on stderr of code in a Python that lacks packages."""
    hide = f"import sys; sys.path.insert(0, '.'); sys.modules |= dict.fromkeys({names!r})"
    done = subprocess.run(
        [sys.executable, "-c", f"{hide}\n{code}"], cwd=gpu.ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stderr.splitlines()


def test_missing_packages_cost_no_import():
    code = "import planning.gpu, planning.bench, train"
    assert without(OPTIONAL, code) == (0, [])


def test_a_report_says_what_it_lacks():
    code = "import runpy; sys.argv[1:] = ['runs']; runpy.run_module('report', run_name='__main__')"
    for name in ("pandas", "matplotlib"):
        status, err = without([name], code)
        assert (status, err) == (2, [f"report: error: {name} is not installed: pip install {name}"])


@pytest.fixture
def lacking(monkeypatch):
    """Hides a package from this process."""
    return lambda name: monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("sklearn.datasets", "scikit-learn, which has digits and divides data, is not installed"),
        ("filelock", "filelock, which locks files, is not installed"),
    ],
)
def test_a_run_says_what_it_lacks(refused, lacking, package, line):
    lacking(name=package)
    assert line in refused(*TINY, "--output_dir", "run")


def test_a_run_goes_on_without_tensorboard(train_py, lacking):
    for name in ("tensorboard", "torch.utils.tensorboard"):
        lacking(name=name)
    status, _, err = train_py(*TINY, "--epochs", "2", "--output_dir", "run")
    assert status == 0
    assert len(err) == 1 and "tensorboard is not installed" in err[0]


@pytest.mark.parametrize("there", [True, False])
def test_a_terminal_without_tqdm_gets_lines(capsys, monkeypatch, lacking, there):
    from engine.console import Progress

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    if not there:
        lacking(name="tqdm")
    with Progress(1, 2, 3) as progress:
        progress.update()
        progress.show(1, [1.0, 2.0], has_last=True)
    out = capsys.readouterr().out
    line = "epoch   1/2  step    1/3  loss 2.0000, mean of the local losses 1.5000\n"
    assert ("1/3" in out and out != line) if there else out == line
