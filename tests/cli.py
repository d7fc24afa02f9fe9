"""train.py and the report as tests call them, within the process, and what a run leaves."""

import json
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import train
from engine import training
from engine.checkpoint import read_checkpoint
from engine.errors import exit_status
from engine.signals import INTERRUPTS
from models.torch_internals import COMPILES_CHECKPOINTS

TINY_NET = [
    "--dataset", "digits", "--limit_per_class", "2", "--layers", "8",
    "--local_loss_mode", "cross_entropy", "--context_mode", "R0",
    "--batch_size", "16", "--epochs", "3", "--seed", "5", "--device", "cpu",
]  # fmt: skip
TINY = [*TINY_NET, "--local_module_num", "2"]


def main(monkeypatch, capsys, *arguments, script=train):
    """Exit status, output lines and error lines of train.py, or of another script."""
    monkeypatch.setattr(sys, "argv", [Path(script.__file__).name, *map(str, arguments)])
    try:
        status = script.main() if script is not train else exit_status(train.main)
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


needs_compiled_checkpoints = pytest.mark.skipif(
    not COMPILES_CHECKPOINTS, reason="this version of PyTorch compiles no recomputed layers"
)


def needs_fake_cuda():
    """Skip a test, in FakeTensorMode, where fake CUDA tensors need a driver, as in torch 2.6."""
    try:
        torch.zeros(1).to("cuda")
    except RuntimeError:
        pytest.skip("fake CUDA tensors of this version of PyTorch need a CUDA driver")


def few_test_images(monkeypatch):
    """Have train.py see a test split of 40 images."""
    load = train.load_dataset

    def load_less(*args, **options):
        data = load(*args, **options)
        return data._replace(test=type(data.test)(data.test.images[:40], data.test.targets[:40]))

    monkeypatch.setattr(train, "load_dataset", load_less)


def metrics_of(folder):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def summary_of(folder):
    return json.loads(Path(folder, "summary.json").read_text())


def lasting(figures):
    """Metrics or a summary without the one figure that is of the clock."""
    return {name: value for name, value in figures.items() if name != "samples_per_second"}


def end_of(folder):
    """All that a run leaves, to be compared by ==, tensors by their bits."""
    states = {}
    for name in ("checkpoint.pt", "model_best.pt"):
        state = read_checkpoint(Path(folder, name))
        assert state.step == 0
        tensors = {f"{part} {n}": t.numpy().tobytes()
                   for part in ("state_dict", "momentum")
                   for n, t in getattr(state, part).items()}  # fmt: skip
        others = state.epoch, state.options, state.classes, state.scalers, state.peak
        states[name] = tensors, others, [*map(lasting, state.history)]
    return {
        "metrics": [*map(lasting, metrics_of(folder))],
        "summary": lasting(summary_of(folder)),
        "config": Path(folder, "config.json").read_text(),
        "states": states,
    }


@contextmanager
def interrupt_after(epoch):
    """Inside, Ctrl-C comes right after the checkpoint of an epoch; one more step is taken."""
    save = training.save_checkpoint

    def save_and_stop(path, state):
        save(path, state)
        if path.name == "checkpoint.pt" and (state.epoch, state.step) == (epoch, 0):
            INTERRUPTS.handle(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_checkpoint", save_and_stop)
        yield
