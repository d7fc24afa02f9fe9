"""Measures this code on a CUDA device, in at most 9 minutes: ./command.sh gpu.

Each piece runs in processes of its own, with a time limit. One that fails is written down, and the
rest goes on. The figures go to docs/gpu/<device>.json, and from that to a Markdown page beside it.
No network is used: the images are made here.
"""

from engine.errors import start_script
from engine.options import HelpFormatter, Parser


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog="gpu", allow_abbrev=False, formatter_class=HelpFormatter,
                    description="Measure this code on a CUDA device, in at most 9 minutes. The "
                    "figures go to docs/gpu/<device>.json and .md.")  # fmt: skip
    parser.add_argument("--piece", help="print the figures of this piece only")
    parser.add_argument("--device", default="cuda", help="the device of --piece")
    return parser


if __name__ == "__main__":  # before the imports that take seconds
    start_script(lambda argv: build_parser().parse_args(argv))

import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from configs import METHODS, one_line
from engine.checkpoint import read_checkpoint
from engine.console import MIB
from engine.device import configure_backends, move_to_device, wait_for
from engine.files import write_json, write_text
from engine.memory import PeakMemory
from engine.options import read_options
from engine.provenance import git_state, versions
from engine.signals import SIGNALS
from engine.step import Totals, make_optimizers, tensors_alive, train_step
from models import build_network
from models.torch_internals import COMPILES_CHECKPOINTS
from planning.dry_run import choose_network
from planning.plan import planned_peak

ROOT = Path(__file__).parent.parent
SECONDS = 9 * 60
MODES = ("R0", "R1", "E", "R1E")
PRECISIONS = {"float32": "off", "bf16": "bf16", "fp16": "fp16"}
RESNET = "--dataset cifar10 --local_loss_mode cross_entropy --local_module_num 16 --layers"
END_TO_END = "--local_module_num 1 --context_mode R0"
TINY = "--layers 14 --local_module_num 4 --batch_size 64 --epochs 1 --local_loss_mode cross_entropy"

METHOD_WORDS = {
    name: f"--method {name} --context_mode E"
    + (" --loss_scale 1 1 1 1" if METHODS[name].get("h_reconstruct") else "")
    for name in METHODS
}

Figures = list[dict[str, Any]]
"""What was measured: each `what`, `value` and `unit`."""


STOP = threading.Event()
"""Set by Ctrl-C and SIGTERM: processes are killed, and nothing is written."""


class Failed(Exception):
    """A piece has failed: why, in a line."""


class LeftOut(Exception):
    """A piece cannot run here: why, in a line."""


class Piece(NamedTuple):
    """A part of the measurement: at most so many seconds, and `work(until)` -> figures."""

    name: str
    seconds: int
    work: Callable[[float], Figures]


def figure(what: str, value: float, unit: str) -> dict[str, Any]:
    """Return an entry of Figures."""
    return {"what": what, "value": value, "unit": unit}


# ---------------------------------------------------------------------------------------------
# Pieces that start processes. `until` is when they must have ended, by time.monotonic


def run(until: float, *command: str, kill_at: Path | None = None) -> str:
    """Return the output of this Python with a command; raise Failed with its last line of error.

    Args:
        kill_at: kill it as soon as this file is there.
    """
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        try:
            while True:
                try:
                    out, err = process.communicate(timeout=0.02)
                    break
                except subprocess.TimeoutExpired:
                    if STOP.is_set() or time.monotonic() > until:
                        raise Failed("it did not end in time") from None
                    if kill_at is not None and kill_at.exists():
                        process.kill()
        finally:  # also processes that it has left behind, or if this one is interrupted
            if process.poll() is None:  # torchrun ends its workers, whose sessions are others
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != (0 if kill_at is None else -signal.SIGKILL):
        lines = [line for line in (err or out).splitlines() if line.strip()]
        lines = [line for line in lines if "error" in line.lower()] or lines  # torchrun says more
        raise Failed(lines[-1] if lines else f"exit status {process.returncode}")
    return out


def run_tests(until: float) -> Figures:
    """Run the tests that are skipped without CUDA."""
    if not importlib.util.find_spec("pytest"):
        raise LeftOut("pytest is not installed: pip install pytest")
    files = [str(f) for f in ROOT.glob("tests/test_*.py") if "needs a CUDA" in f.read_text()]
    out = run(until, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", *sorted(files))
    counts = re.findall(r"(\d+) (passed|skipped)", out.splitlines()[-1])
    return [figure(f"tests {how}", int(count), "tests") for count, how in counts]


def train(
    until: float,
    device: str,
    folder: Path,
    options: str,
    name: str = "run",
    start: Sequence[str] = (),
    kill_at: Path | None = None,
) -> Figures:
    """Train for some steps on `folder`/images, into `folder`/name, with options of train.py."""
    command = f"train.py --dataset folder --device {device} {TINY} {options}".split()
    where = ["--data_dir", str(folder / "images"), "--output_dir", str(folder / name)]
    out = run(until, *start, *command, *where, kill_at=kill_at)
    if kill_at is not None:
        return []
    summary = json.loads((folder / name / "summary.json").read_text())
    figures = [
        figure("test error", summary["error_last"], "%"),
        figure("peak of a step", summary["peak_memory_bytes"] / MIB, "MiB"),
    ]
    if accuracy := re.search(r"accuracy ([\d.]+) \(planned", out):
        figures.append(figure("accuracy of the plan", float(accuracy[1]), "planned / measured"))
    return figures


def train_in_parallel(until: float, device: str, folder: Path) -> Figures:
    """Train with --parallel modules on all GPUs, each of which has a module or more."""
    if (count := torch.cuda.device_count()) < 2:
        raise LeftOut(f"it needs two CUDA devices, and there are {count}")
    start = "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"
    options = "--context_mode R1E --parallel modules --layers 98 --local_module_num"
    options = f"{options} {max(count, 4)}"
    figures = train(until, device, folder, options, "parallel", start)
    return [figure("processes", count, "processes"), *figures]


def compare_bits(until: float, device: str, folder: Path) -> Figures:
    """Train with --deterministic twice, and once with a kill; raise Failed if bits differ."""
    options = "--context_mode R1E --deterministic --checkpoint_every 2 --epochs 3 --resume auto"
    in_each = partial(train, until, device, folder, options)
    in_each("first")
    in_each("second")
    in_each("killed", kill_at=folder / "killed" / "checkpoint.pt")
    in_each("killed")
    for name in ("second", "killed"):
        if bits(folder / name) != bits(folder / "first"):
            raise Failed(f"the {name} run has other bits than the first")
    return [figure("runs with the same bits, one of them killed and resumed", 3, "runs")]


def bits(folder: Path) -> dict[str, bytes]:
    """Return weights and momentum of the last checkpoint in a run folder, as bytes."""
    checkpoint = read_checkpoint(folder / "checkpoint.pt")
    states = {"weights": checkpoint.state_dict, "momentum": checkpoint.momentum}
    return {
        f"{part} {name}": tensor.numpy().tobytes()
        for part, state in states.items()
        for name, tensor in state.items()
    }


def time_steps(until: float, device: str, mode: str) -> Figures:
    """Time steps with planning/bench.py: plain, default, bf16, and end to end with recomputing."""
    rows = {"--amp bf16": "bf16", "--amp bf16 --data_on_device": "bf16, images on the device",
            f"{END_TO_END} --recompute": "end to end, activations recomputed"}  # fmt: skip
    out = run(until, "-m", "planning.bench", *f"{RESNET} 32 --context_mode {mode}".split(),
              "--device", device, "--json", *(f"--versus={row}" for row in rows))  # fmt: skip
    return [
        figure(f"{rows.get(row['options'], row['options'])}: {what}", row[key], unit)
        for row in json.loads(out)
        for what, key, unit in (
            ("a step", "step_ms", "ms"),
            ("speed", "speedup", "times plain"),
            ("loader", "loader_samples_per_second", "samples/s"),
        )
    ]


# ---------------------------------------------------------------------------------------------
# Pieces that step a network in a process of their own: python -m planning.gpu --piece NAME


def make_step(device: torch.device, argv: str) -> tuple[Callable[[], None], Callable, int]:
    """Return a training step on noise, what gives the tensors before it, and its planned peak."""
    options, _ = read_options(argv.split())
    arguments, _ = choose_network(options)
    configure_backends(device, options)
    planned = planned_peak(arguments, options.batch_size)
    network = move_to_device(build_network(**arguments), device, channels_last=True, compiled=False)
    network.train()
    optimizers, totals = make_optimizers(network), Totals(network, device)
    size = options.batch_size, 3, options.image_size, options.image_size
    images = torch.randn(size, device=device).to(memory_format=torch.channels_last)
    targets = torch.randint(arguments["num_classes"], size[:1], device=device)
    step = partial(train_step, network, optimizers, images, targets, totals)
    return step, partial(tensors_alive, network, optimizers, images, targets), planned


def compare_memory(device: torch.device, net: str = f"{RESNET} 32") -> Figures:
    """Compare planned and measured peaks of the rows of docs/memory.md for a network."""
    figures, rows = [], {"end to end": END_TO_END} | {m: f"--context_mode {m}" for m in MODES}
    for name, options in rows.items():
        step, alive, planned = make_step(device, f"{net} {options}")
        peak = PeakMemory(device)
        for _ in range(3):
            with peak.step(1, alive):
                step()
        del step, alive
        gc.collect()  # before the next network comes
        figures += [
            figure(f"{name}: planned", planned / MIB, "MiB"),
            figure(f"{name}: measured", peak.bytes / MIB, "MiB"),
            figure(f"{name}: accuracy", planned / peak.bytes, "planned / measured"),
        ]
    return figures


def profile_steps(device: torch.device, net: str = f"{RESNET} 32", steps: int = 5) -> Figures:
    """Say for each mode how much of a step the device computes.

    The rest of the step it waits for Python to launch kernels. Kernels are timed under the
    profiler, and the step without it, because the profiler slows Python down.
    """
    figures = []
    for mode in ("R0", "E", "R1E"):
        step, *_ = make_step(device, f"{net} --context_mode {mode}")
        for _ in range(3):
            step()
        wait_for(device)
        seconds = []
        for _ in range(2 * steps):
            start = time.perf_counter()
            step()
            wait_for(device)
            seconds.append(time.perf_counter() - start)
        kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
        with profile(activities=kinds) as profiler:
            for _ in range(steps):
                step()
            wait_for(device)
        busy = busy_microseconds(profiler.events()) / steps / 1e3
        a_step = 1e3 * median(seconds)
        figures += [
            figure(f"{mode}: a step", a_step, "ms"),
            figure(f"{mode}: kernels", busy, "ms a step"),
            figure(f"{mode}: share of kernels", 100 * busy / a_step, "%"),
            figure(f"{mode}: share of waiting for Python", max(100 - 100 * busy / a_step, 0), "%"),
        ]
    return figures


def find_waits(device: torch.device, net: str = f"{RESNET} 32") -> Figures:
    """Count the calls that wait for the device in a step; raise Failed with the places of some."""
    options = ["R0", "R1 --amp bf16", "E --amp fp16", "R1E --local_loss_mode contrast",
               "R1E --h_reconstruct --loss_scale 1 1 1 1 --recompute"]  # fmt: skip
    options += [f"R0 {words}" for words in METHOD_WORDS.values()]  # the last mode counts
    places = set()
    for given in options:
        step, *_ = make_step(device, f"{net} --context_mode {given}")
        for _ in range(3):
            step()
        places |= set(synchronising_calls(step))
    if places:
        raise Failed(f"a step waits for the device at {', '.join(sorted(places))}")
    return [figure("synchronising calls in a step", 0, "calls")]


def synchronising_calls(step: Callable[[], object]) -> list[str]:
    """Return the file and line of each call of a step that waits for the CUDA device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
    return sorted({
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in caught
        if "called a synchronizing" in str(warning.message)
    })  # fmt: skip


def busy_microseconds(events: Iterable[Any]) -> float:
    """Return for how long the device computed or copied, where streams overlap once.

    Args:
        events: of a torch.profiler.profile.
    """
    events = list(events)
    # A range that the CPU has named (Optimizer.step) comes again on the device, waits included.
    named = {event.name for event in events if event.device_type == DeviceType.CPU}
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and event.name not in named
    )
    busy, end = 0.0, float("-inf")
    for start, stop in spans:
        busy += max(stop - max(start, end), 0)
        end = max(end, stop)
    return busy


IN_PROCESS: dict[str, Callable[[torch.device], Figures]] = {
    "memory, ResNet-32": compare_memory,
    "memory, ResNet-110": partial(compare_memory, net=f"{RESNET} 110"),
    "profile": profile_steps,
    "waits in a step": find_waits,
}


def in_process(until: float, device: str, name: str) -> Figures:
    """Run an entry of IN_PROCESS in a process of its own."""
    out = run(until, "-m", "planning.gpu", "--piece", name, "--device", device)
    return json.loads(out.splitlines()[-1])


# ---------------------------------------------------------------------------------------------
# All of it


def make_pieces(device: str, folder: Path) -> tuple[list[Piece], list[Piece]]:
    """Return the pieces that may run side by side, and those that are timed, one by one."""
    trained = {f"{mode}, {name}": f"--context_mode {mode} --amp {precision}"
               for mode in MODES for name, precision in PRECISIONS.items()}  # fmt: skip
    compiled = "--compile" if COMPILES_CHECKPOINTS else "--compile --context_group 0"
    trained |= {f"{mode}, compiled": f"--context_mode {mode} {compiled}" for mode in MODES}
    trained["contrast"] = "--context_mode R1E --local_loss_mode contrast"
    trained["decoders"] = "--context_mode R1E --h_reconstruct --loss_scale 1 1 1 1"
    trained |= {f"--method {name}": words for name, words in METHOD_WORDS.items()}
    together = [Piece("CUDA tests", 200, run_tests)]
    together += [
        Piece(f"train {name}", 150 if "compiled" in name else 60,
              partial(train, device=device, folder=folder, options=options, name=name))
        for name, options in trained.items()
    ]  # fmt: skip
    for name, work in (("--parallel modules", train_in_parallel), ("same bits", compare_bits)):
        together.append(Piece(name, 120, partial(work, device=device, folder=folder)))
    alone = [Piece(n, 70, partial(in_process, device=device, name=n)) for n in IN_PROCESS]
    alone += [
        Piece(f"step times, {mode}", 100, partial(time_steps, device=device, mode=mode))
        for mode in ("R0", "E", "R1E")
    ]
    return together, alone


def make_images(folder: Path) -> None:
    """Make a data set of 480 training and 40 test images: 10 classes by brightness, with noise."""
    for part, count in (("train", 48), ("test", 4)):
        for label in range(10):
            (of_class := folder / part / str(label)).mkdir(parents=True)
            noise = torch.randint(25, (count, 32, 32, 3), dtype=torch.uint8) + 23 * label
            for index, pixels in enumerate(noise):
                Image.fromarray(pixels.numpy()).save(of_class / f"{index}.png")


def record(piece: Piece, end: float) -> dict[str, Any]:
    """Run a piece, until `end` at the latest; return its entry in the JSON. Say how it went."""
    start = time.monotonic()
    entry: dict[str, Any] = {"name": piece.name, "status": "passed", "why": "", "figures": []}
    try:
        if STOP.is_set() or start >= end:
            raise Failed("no time was left for it")
        entry["figures"] = piece.work(min(end, start + piece.seconds))
    except LeftOut as error:
        entry |= {"status": "left out", "why": one_line(error)}
    except Exception as error:  # whatever it is, it must not cost the other pieces
        entry |= {"status": "failed", "why": one_line(error) or type(error).__name__}
    entry["seconds"] = round(time.monotonic() - start, 1)
    print(
        f"{entry['status']:8}  {entry['seconds']:6.1f} s  {piece.name}  {entry['why']}", flush=True
    )
    return entry


def measure(together: list[Piece], alone: list[Piece]) -> list[dict[str, Any]]:
    """Run all pieces, the first ones four at a time; return their entries in the JSON."""
    end = time.monotonic() + SECONDS - 20  # for the start and the page
    with ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(partial(record, end=end), together))
    return entries + [record(piece, end) for piece in alone]


def facts() -> dict[str, Any]:
    """Return the device, its driver and the libraries' versions."""
    driver = None
    with suppress(OSError, subprocess.SubprocessError):
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout.split("\n")[0]  # fmt: skip
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "devices": torch.cuda.device_count(),
        "driver": driver,
        "versions": versions() | {"cuda": torch.version.cuda,
                                  "cudnn": torch.backends.cudnn.version()},
        "cublas_workspace_config": os.environ.get("CUBLAS_WORKSPACE_CONFIG", "not set"),
        "git": git_state(),
    }  # fmt: skip


def file_name(device: str) -> str:
    """Return a device's name as a file name: `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "device"


def page(result: dict[str, Any]) -> str:
    """Return the Markdown page of a result."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"# {result['device']}", "",
        f"By `./command.sh gpu`, at commit {result['git']['commit']}. "
        f"CUDA devices: {result['devices']}. Driver: {result['driver']}. Versions: {versions}. "
        f"CUBLAS_WORKSPACE_CONFIG: {result['cublas_workspace_config']}.", "",
        "| piece | how it went | seconds | why |", "|---|---|---|---|",
    ]  # fmt: skip
    for p in result["pieces"]:
        why = p["why"].replace("|", "\\|")
        lines.append(f"| {p['name']} | {p['status']} | {p['seconds']} | {why} |")
    lines += ["", "| piece | figure | value | unit |", "|---|---|---|---|"]
    lines += [
        f"| {p['name']} | {f['what']} | {f['value']:,.4g} | {f['unit']} |"
        if abs(f["value"]) < 1000
        else f"| {p['name']} | {f['what']} | {f['value']:,.0f} | {f['unit']} |"
        for p in result["pieces"]
        for f in p["figures"]
    ]
    return "\n".join(lines) + "\n"


def write_result(pieces: list[dict[str, Any]], folder: Path) -> int:
    """Write the JSON and its page; return the exit status, 1 if a piece has failed."""
    result = facts() | {"pieces": pieces}
    target = folder / file_name(result["device"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(target.with_suffix(".json"), result)
        write_text(target.with_suffix(".md"), page(result))
    except OSError as error:  # the figures took minutes
        print(json.dumps(result), f"gpu: error: cannot write: {one_line(error)}", sep="\n")
        return 1
    print(f"written: {target}.json, {target}.md")
    return int(any(piece["status"] == "failed" for piece in pieces))


def main() -> int:
    """Return the exit status: 0, 1 if a piece failed, 2 without a CUDA device."""
    own = build_parser().parse_args()
    if own.piece not in (None, *IN_PROCESS):
        build_parser().error(f"--piece {own.piece!r} is none of {', '.join(IN_PROCESS)}")
    if own.piece is not None:
        print(json.dumps(IN_PROCESS[own.piece](torch.device(own.device))))
        return 0
    stopped: list[int] = []
    if not torch.cuda.is_available():
        print("gpu: error: PyTorch sees no CUDA device here", file=sys.stderr)
        return 2
    for number in SIGNALS:  # processes in sessions of their own would stay
        signal.signal(number, lambda number, _: (STOP.set(), stopped.append(number)))
    with tempfile.TemporaryDirectory() as name:
        make_images(Path(name) / "images")
        pieces = measure(*make_pieces("cuda", Path(name)))
    if STOP.is_set():
        print("gpu: stopped, so nothing is written", file=sys.stderr)
        return 130 if stopped[0] == signal.SIGINT else 143
    return write_result(pieces, ROOT / "docs" / "gpu")


if __name__ == "__main__":
    sys.exit(main())
