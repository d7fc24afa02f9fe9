"""Runs of train.py from the command line to the files they leave."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import main
from golden import fill
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import models
import train
from engine import step as engine
from engine import training
from engine.checkpoint import load_momentum, momentum_by_name, read_checkpoint
from engine.options import build_parser, read_options
from engine.run_folder import LOCK, RunFolder, run_name
from engine.signals import INTERRUPTS
from engine.tensorboard import Board
from models.official import official_names
from report import figures

TINY_NET = [
    "--dataset", "digits", "--limit_per_class", "2", "--layers", "8",
    "--local_loss_mode", "cross_entropy", "--context_mode", "R0",
    "--batch_size", "16", "--epochs", "3", "--seed", "5", "--device", "cpu",
]  # fmt: skip
TINY = [*TINY_NET, "--local_module_num", "2"]
ROOT = Path(train.__file__).parent


pytestmark = pytest.mark.usefixtures("here")


def metrics_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


# What a run leaves


@pytest.mark.parametrize("loss", ["cross_entropy", "contrast"])
def test_a_run_leaves_everything(monkeypatch, capsys, loss):
    method = ["--context_mode", "R1E", "--local_loss_mode", loss]
    status, out, err = main(monkeypatch, capsys, *TINY, *method, "--output_dir", "run")
    assert (status, err) == (0, [])

    metrics = metrics_of("run")
    assert [m["epoch"] for m in metrics] == [1, 2, 3]
    assert [m["lr"] for m in metrics] == pytest.approx(
        [0.01, 0.05 * (1 + math.cos(2 * math.pi / 3)), 0]
    )
    for m in metrics:
        assert len(m["local_losses"]) == 2
        assert m["train_loss"] == m["local_losses"][-1]
        assert m["test_error"] == m["test_errors"][-1]
        assert m["samples_per_second"] > 0
        assert all(
            (e is None) == (loss == "contrast") for e in (m["test_errors"][0], m["train_errors"][0])
        )

    summary = json.loads(Path("run/summary.json").read_text())
    errors = [m["test_error"] for m in metrics]
    assert (summary["error_last"], summary["error_best"]) == (errors[-1], min(errors))
    assert summary["peak_memory_bytes"] == metrics[-1]["peak_memory_bytes"] > 2**20
    assert "live tensor storage" in summary["peak_memory_how"]
    assert summary["parameters"].keys() == {"backbone", "context", "auxiliary"}
    assert (summary["epochs"], summary["seed"]) == (3, 5)
    assert summary["config"] == json.loads(Path("run/config.json").read_text())
    assert summary["config"]["context_mode"] == "R1E"
    assert summary["versions"]["torch"] == torch.__version__

    events = EventAccumulator("run").Reload()
    assert [e.value for e in events.Scalars("epoch/test_error")] == pytest.approx(errors)
    assert len(events.Scalars("local_losses/module_00")) == 3
    assert "epoch/epoch" not in events.Tags()["scalars"]
    best = read_checkpoint("run/model_best.pt")
    assert best.epoch == errors.index(min(errors)) + 1
    assert any(f"{summary['error_last']:.2f} %" in line for line in out)


def test_a_run_can_be_repeated_to_the_bit(monkeypatch, capsys):
    for folder in ("one", "two"):
        dropout = ["--droprate", "0.2", "--context_mode", "E"]
        assert main(monkeypatch, capsys, *TINY, *dropout, "--output_dir", folder)[0] == 0
    assert_same_state("one/checkpoint.pt", "two/checkpoint.pt")


def assert_same_state(a, b):
    a, b = read_checkpoint(a), read_checkpoint(b)
    assert a.epoch == b.epoch
    for x, y in ((a.state_dict, b.state_dict), (a.momentum, b.momentum)):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize(
    ("options", "rates", "augment"),
    [
        (["--lr", "0.5", "--epochs", "2"], [0.01, 0.0], True),
        (["--no-cos_lr", "--no-augment", "--lr", "0.3"], [0.3, 0.03, 0.003], False),
        (["--warmup_epochs", "2", "--no-cos_lr"], [0.01, (0.01 + 0.01) / 2, 0.001], True),
    ],
)
def test_training_is_the_plain_loop(monkeypatch, capsys, options, rates, augment):
    """Against one SGD over the whole network on each module's loss, bit for bit; K = 4."""
    method = ["--layers", "8", "--local_module_num", "4", "--context_mode", "R1E"]
    method.append("--no-channels_last")
    main(monkeypatch, capsys, *TINY, *method, *options, "--output_dir", "run")
    torch.manual_seed(5)
    network = models.build_network(
        layers=8, local_module_num=4, context_mode="R1E", dataset="digits"
    )
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True
    )
    data = train.load_dataset("digits", "unused", 32, 2)
    cpu, digits = torch.device("cpu"), train.DATASETS["digits"]
    batches = train.Batches(data.train, digits, 16, cpu, seed=5, augment=augment, shuffle=True)
    metrics = metrics_of("run")
    for epoch, (m, lr) in enumerate(zip(metrics, rates, strict=True), start=1):
        optimizer.param_groups[0]["lr"] = lr
        total, wrong = torch.zeros(4), 0
        network.train()
        for images, targets in batches.epoch(epoch):  # of 16 and 4 samples
            optimizer.zero_grad()
            logits, local_losses = network.local_step(images, targets)
            optimizer.step()
            total += torch.stack(local_losses) * len(targets)
            wrong += int((logits.argmax(1) != targets).sum())
        assert m["lr"] == pytest.approx(lr, abs=1e-12)
        assert m["local_losses"] == pytest.approx((total / 20).tolist(), rel=1e-5)
        assert m["train_error"] == pytest.approx(100 * wrong / 20)

        images, targets = data.test.images / 127.5 - 1, data.test.targets
        with torch.no_grad():
            outputs = [m.head(h) for m, h in network.eval().features(images)]
        errors = [100 * float((o.argmax(1) != targets).double().mean()) for o in outputs]
        assert m["test_errors"] == pytest.approx(errors)
        loss = float(torch.nn.functional.cross_entropy(outputs[-1], targets))
        assert m["test_loss"] == pytest.approx(loss, rel=1e-4)
    state = read_checkpoint("run/checkpoint.pt").state_dict
    for name, value in network.state_dict().items():
        assert torch.equal(state[name], value), name


# Resume and evaluate


class StopHere(Exception):
    """Stands for a power cut."""


def cut_off_after(monkeypatch, epoch):
    """Stop a run where epoch `epoch` + 1 is in the metrics but not in a checkpoint."""
    save = training.save_checkpoint

    def save_or_stop(path, state):
        if state.epoch > epoch:
            raise StopHere
        save(path, state)

    monkeypatch.setattr(training, "save_checkpoint", save_or_stop)
    return lambda: monkeypatch.setattr(training, "save_checkpoint", save)


def interrupt_after(monkeypatch, epoch):
    """Ctrl-C right after the checkpoint of an epoch: one more step is taken."""
    save = training.save_checkpoint

    def save_and_stop(path, state):
        save(path, state)
        if path.name == "checkpoint.pt" and (state.epoch, state.step) == (epoch, 0):
            INTERRUPTS.handle(signal.SIGINT)

    monkeypatch.setattr(training, "save_checkpoint", save_and_stop)
    return lambda: monkeypatch.setattr(training, "save_checkpoint", save)


def test_resume_gives_what_an_uninterrupted_run_gives(monkeypatch, capsys):
    arguments = [*TINY, "--context_mode", "R1E", "--droprate", "0.1"]
    main(monkeypatch, capsys, *arguments, "--output_dir", "whole")
    undo = cut_off_after(monkeypatch, 2)
    with pytest.raises(StopHere):
        main(monkeypatch, capsys, *arguments, "--output_dir", "parts")
    undo()
    assert len(metrics_of("parts")) == 3
    status, _, _ = main(monkeypatch, capsys, "--resume", "parts/checkpoint.pt", "--device", "cpu")
    assert status == 0
    assert_same_state("whole/checkpoint.pt", "parts/checkpoint.pt")

    def lasting(metrics):
        return [{k: v for k, v in m.items() if k != "samples_per_second"} for m in metrics]

    # The meter ran in the first two steps of each part, so its figures agree as well.
    assert lasting(metrics_of("whole")) == lasting(metrics_of("parts"))
    assert Path("parts/summary.json").exists()


def test_evaluate_prints_the_error_of_the_run(monkeypatch, capsys):
    main(monkeypatch, capsys, *TINY, "--context_mode", "E", "--output_dir", "run")
    files = sorted(Path("run").iterdir())
    status, out, _ = main(monkeypatch, capsys, "--evaluate", "run/checkpoint.pt")
    assert status == 0
    assert f"test error {metrics_of('run')[-1]['test_error']:.2f} %" in out[-1]
    assert sorted(Path("run").iterdir()) == files
    assert not Path("runs").exists()


def official_checkpoint(path, **changes):
    """A file as the authors' release saves it: K=2 ResNet-8 in E, with parts that it never used."""
    torch.manual_seed(1)
    network = models.build_network(layers=8, local_module_num=2, context_mode="E", dataset="digits")
    names = official_names(network)
    state = {names[n]: v.clone() for n, v in network.state_dict().items()}
    shapes = {"decoder_1_0.decoder.0.weight": (12, 16, 3, 3), "decoder_1_0.decoder.0.bias": (12,)}
    state = {k: torch.tensor(fill.weight(k, s)).float() for k, s in shapes.items()} | state
    parameters = [n for n in state if not n.endswith(("_mean", "_var", "_tracked"))]
    momentum = {
        i: {"momentum_buffer": torch.full_like(state[n], i)}
        for i, n in enumerate(parameters) if not n.startswith("decoder")
    }  # fmt: skip
    contents = {
        "epoch": 2,
        "state_dict": {f"module.{n}": v for n, v in state.items()},
        "best_acc": torch.tensor(93.0),
        "optimizer": {
            "state": momentum,
            "param_groups": [{"params": list(range(len(parameters)))}],
        },
        "val_acc": [90.0, 93.0],
    }
    torch.save(contents | changes, path)
    return network, names, parameters


def test_official_checkpoint_is_evaluated(monkeypatch, capsys):
    network, _, _ = official_checkpoint("official.pt")
    data = train.load_dataset("digits", "unused", 32, None).test
    images = train.Batches(data, train.DATASETS["digits"], 40, torch.device("cpu"))
    (images, targets), = images.epoch(0)  # fmt: skip
    error = 100 * float((network.eval()(images).argmax(1) != targets).double().mean())
    status, out, _ = main(
        monkeypatch, capsys, *TINY, "--context_mode", "E", "--evaluate", "official.pt"
    )
    assert status == 0
    assert f"test error {error:.2f} %" in out[-1]


def test_official_checkpoint_is_resumed_with_its_momentum(monkeypatch, capsys):
    network, names, parameters = official_checkpoint("official.pt")
    checkpoint = read_checkpoint("official.pt")
    assert (checkpoint.epoch, checkpoint.official) == (2, True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in network.local_modules]
    load_momentum(optimizers, network, checkpoint)
    for name, momentum in momentum_by_name(optimizers, network).items():
        assert torch.all(momentum == parameters.index(names[name]))

    status, _, _ = main(
        monkeypatch, capsys, *TINY, "--context_mode", "E", "--resume", "official.pt",
        "--output_dir", "run",
    )  # fmt: skip
    assert status == 0
    assert [m["epoch"] for m in metrics_of("run")] == [3]
    best = json.loads(Path("run/summary.json").read_text())["error_best"]
    assert best == metrics_of("run")[0]["test_error"]
    assert Path("run/model_best.pt").exists()


def test_momentum_of_another_architecture_is_refused(monkeypatch, capsys):
    official_checkpoint("official.pt")
    contents = torch.load("official.pt")
    contents["optimizer"]["state"][2]["momentum_buffer"] = torch.zeros(3)
    torch.save(contents, "official.pt")
    status, _, err = main(
        monkeypatch, capsys, *TINY, "--context_mode", "E", "--resume", "official.pt"
    )
    assert (status, len(err)) == (2, 1)
    assert "momentum of" in err[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context_mode", "R1"], "another architecture: local_modules.1.context.recent_0"),
        (["--layers", "14"], "another architecture"),
        (["--aux_net_config", "2c2f"], "another architecture"),
        (["--aux_net_feature_dim", "64"], "is float32 [128, 32] and should be float32 [64, 32]"),
    ],
)
@pytest.mark.parametrize("file", ["official.pt", "run/checkpoint.pt"])
def test_checkpoint_of_another_architecture_is_refused(monkeypatch, capsys, file, options, message):
    official_checkpoint("official.pt")
    main(monkeypatch, capsys, *TINY, "--context_mode", "E", "--epochs", "1", "--output_dir", "run")
    status, _, err = main(
        monkeypatch, capsys, *TINY, "--context_mode", "E", *options, "--evaluate", file
    )
    assert (status, len(err)) == (2, 1)
    assert message in err[0]


def test_own_checkpoint_with_encoders_that_the_network_lacks_is_refused(monkeypatch, capsys):
    main(monkeypatch, capsys, *TINY, "--context_mode", "E", "--epochs", "1", "--output_dir", "run")
    status, _, err = main(
        monkeypatch, capsys, "--context_mode", "R0", "--evaluate", "run/checkpoint.pt"
    )
    assert (status, len(err)) == (2, 1)
    assert "is not in the network" in err[0]


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def write_no_checkpoint(path, kind):
    """A file that is like a checkpoint in all but one way."""
    official_checkpoint(path)
    own = read_checkpoint(path)._asdict() | {"format": "contsup-1"}
    own.pop("official")
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind in ("text", ""):
        path.write_text(kind)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "pickle":
        torch.save(Malicious(), path)
    elif kind == "other names":
        official_checkpoint(path, state_dict={"encoder.weight": torch.zeros(2)})
    elif kind == "numbers for tensors":
        official_checkpoint(path, state_dict={"conv1.weight": 3})
    else:
        torch.save(own | {kind: None}, path)


@pytest.mark.parametrize(
    "kind",
    ["cut", "text", "", "list", "pickle", "other names", "numbers for tensors",
     "epoch", "state_dict", "momentum", "options", "classes"],
)  # fmt: skip
def test_what_is_no_checkpoint_is_refused(monkeypatch, capsys, kind):
    write_no_checkpoint(Path("file.pt"), kind)
    for option in ("--evaluate", "--resume"):
        status, _, err = main(monkeypatch, capsys, *TINY, option, "file.pt")
        assert (status, len(err)) == (2, 1)
    assert not Path("executed").exists()


def test_a_folder_is_no_checkpoint(monkeypatch, capsys):
    status, _, err = main(monkeypatch, capsys, *TINY, "--evaluate", ".")
    assert (status, len(err)) == (2, 1)


def make_images(folder, seed=0):
    rng = np.random.default_rng(seed)
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            Path(folder, part, name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(Path(folder, part, name, f"{i}.png"))


def test_folder_run_is_evaluated_without_its_training_images(monkeypatch, capsys):
    make_images("images")
    arguments = [*TINY, "--dataset", "folder", "--data_dir", "images", "--output_dir", "run"]
    assert main(monkeypatch, capsys, *arguments)[0] == 0
    assert json.loads(Path("run/summary.json").read_text())["device"] == "cpu"
    Path("images/train").rename("images/unused")
    status, out, _ = main(monkeypatch, capsys, "--evaluate", "run/checkpoint.pt")
    assert status == 0
    assert f"test error {metrics_of('run')[-1]['test_error']:.2f} %, " in out[-1]
    assert read_checkpoint("run/checkpoint.pt").state_dict["local_modules.1.head.2.bias"].shape == (
        2,
    )
    Path("images/test/bee").rename("images/test/wasp")
    status, _, err = main(monkeypatch, capsys, "--evaluate", "run/checkpoint.pt")
    assert (status, len(err)) == (2, 1)
    assert "other classes (ant, bee) than the data have (ant, wasp)" in err[0]


# Nothing is overwritten


def snapshot(folder):
    files = (p for p in Path(folder).rglob("*") if p.is_file() and p.name != LOCK)
    return {p: p.read_bytes() for p in files}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "holds a finished run"),
        (["--lr", "0.2"], "holds a finished run"),
        (["--resume", "run/checkpoint.pt", "--epochs", "4"], "of other options (epochs 3, now 4"),
        (["--resume", "run/model_best.pt", "--epochs", "9"], "of other options (epochs 3, now 9"),
    ],
)
def test_a_finished_run_is_not_overwritten(monkeypatch, capsys, options, message):
    main(monkeypatch, capsys, *TINY, "--output_dir", "run")
    before = snapshot("run")
    status, _, err = main(monkeypatch, capsys, *TINY, *options, "--output_dir", "run")
    assert (status, len(err)) == (2, 1)
    assert message in err[0]
    assert snapshot("run") == before


def test_an_unfinished_run_is_not_overwritten(monkeypatch, capsys):
    undo = cut_off_after(monkeypatch, 1)
    with pytest.raises(StopHere):
        main(monkeypatch, capsys, *TINY, "--output_dir", "run")
    undo()
    before = snapshot("run")
    status, _, err = main(monkeypatch, capsys, *TINY, "--output_dir", "run")
    assert (status, len(err)) == (2, 1)
    assert "continue it with --resume run/checkpoint.pt" in err[0]
    assert snapshot("run") == before


def test_a_run_that_lacks_but_its_summary_gets_it(monkeypatch, capsys):
    main(monkeypatch, capsys, *TINY, "--output_dir", "run")
    before = json.loads(Path("run/summary.json").read_text())
    Path("run/summary.json").unlink()
    assert main(monkeypatch, capsys, "--resume", "run/checkpoint.pt")[0] == 0
    assert json.loads(Path("run/summary.json").read_text()) == before


def test_nothing_left_to_train_is_said(monkeypatch, capsys):
    main(monkeypatch, capsys, *TINY, "--output_dir", "run")
    status, _, err = main(
        monkeypatch, capsys, "--resume", "run/checkpoint.pt", "--output_dir", "more"
    )
    assert (status, len(err)) == (2, 1)
    assert "3 of 3 epochs are done" in err[0]
    assert not Path("more").exists()


def test_a_decoder_run_with_its_own_scales_goes_on(monkeypatch, capsys):
    undo = cut_off_after(monkeypatch, 2)
    scales = ["--h_reconstruct", "--loss_scale", "2", "1", "0", "0"]
    with pytest.raises(StopHere):
        main(monkeypatch, capsys, *TINY, *scales, "--output_dir", "run")
    undo()
    assert main(monkeypatch, capsys, "--resume", "run/checkpoint.pt")[0] == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["config"]["loss_scale"] == [2, 1, 0, 0]


def test_resuming_a_finished_run_says_so(monkeypatch, capsys):
    main(monkeypatch, capsys, *TINY, "--output_dir", "run")
    before = snapshot("run")
    status, out, _ = main(monkeypatch, capsys, "--resume", "run/checkpoint.pt")
    assert status == 0
    assert "run is finished: 3 of 3 epochs" in out[-1]
    assert snapshot("run") == before


def test_a_finished_run_goes_on_in_another_folder(monkeypatch, capsys):
    main(monkeypatch, capsys, *TINY, "--output_dir", "run")
    status, _, _ = main(
        monkeypatch,
        capsys,
        "--resume",
        "run/checkpoint.pt",
        "--epochs",
        "4",
        "--output_dir",
        "more",
    )
    assert status == 0
    assert [m["epoch"] for m in metrics_of("more")] == [4]


def test_interrupt_says_how_to_continue(monkeypatch, capsys):
    interrupt_after(monkeypatch, 1)
    status, _, err = main(monkeypatch, capsys, *TINY, "--output_dir", "run")
    assert status == 130
    assert "stopped by SIGINT; continue with --resume run/checkpoint.pt" in err[-1]
    assert len(metrics_of("run")) == 1


@pytest.mark.parametrize("where", [".", "sub", "..", "absolute"])
def test_what_is_said_to_continue_with_does(monkeypatch, capsys, tmp_path, where):
    where = str(tmp_path / where) if where == "absolute" else where
    undo = interrupt_after(monkeypatch, 1)
    method = [*TINY, "--output_dir", "runs/mine", "--checkpoint", where]
    status, _, err = main(monkeypatch, capsys, *method)
    assert status == 130
    undo()
    said = main(monkeypatch, capsys, *method)[2][0]  # the same run begun again
    for line in (err[-1], said):
        assert "--resume " in line
    how = err[-1].split("continue with ")[1]
    assert f"continue it with {how}, or" in said
    assert main(monkeypatch, capsys, *how.split())[0] == 0
    assert [m["epoch"] for m in metrics_of("runs/mine")] == [1, 2, 3]
    assert [path.name for path in Path("runs").iterdir() if path.is_dir()] == ["mine"]


def test_what_another_process_did_until_the_lock_is_seen(monkeypatch, capsys):
    """It finished the run that this one had read the first epoch of."""
    assert main(monkeypatch, capsys, *TINY, "--output_dir", "whole")[0] == 0
    undo = interrupt_after(monkeypatch, 1)
    assert main(monkeypatch, capsys, *TINY, "--output_dir", "run")[0] == 130
    undo()
    lock = RunFolder.locked

    def locked_late(folder):
        shutil.copy("whole/checkpoint.pt", folder.checkpoint)
        return lock(folder)

    monkeypatch.setattr(RunFolder, "locked", locked_late)
    status, out, _ = main(monkeypatch, capsys, "--resume", "run/checkpoint.pt")
    assert status == 0
    assert not any("  lr " in line for line in out)
    assert metrics_of("run") == metrics_of("whole")


def test_a_best_without_a_last_is_what_is_said_to_continue_with(monkeypatch, capsys):
    undo = interrupt_after(monkeypatch, 1)
    assert main(monkeypatch, capsys, *TINY, "--output_dir", "run")[0] == 130
    undo()
    shutil.copy("run/model_best.pt", "run/checkpoint.pt")  # the same state: either will do
    shutil.copytree("run", "other")
    Path("run/checkpoint.pt").unlink()
    status, _, err = main(monkeypatch, capsys, *TINY, "--output_dir", "run")
    assert (status, len(err)) == (2, 1)
    assert "continue it with --resume run/model_best.pt, or" in err[0]
    for folder in ("run", "other"):
        assert main(monkeypatch, capsys, "--resume", f"{folder}/model_best.pt")[0] == 0
        assert [m["epoch"] for m in metrics_of(folder)] == [1, 2, 3]
    assert_same_state("run/checkpoint.pt", "other/checkpoint.pt")


def test_checkpoint_option_names_the_folder_of_the_checkpoints(monkeypatch, capsys):
    undo = cut_off_after(monkeypatch, 2)
    with pytest.raises(StopHere):
        main(monkeypatch, capsys, *TINY, "--output_dir", "run", "--checkpoint", "kept")
    undo()
    assert not Path("run/checkpoint.pt").exists()
    status, _, _ = main(monkeypatch, capsys, "--resume", "run/kept/checkpoint.pt")
    assert status == 0
    assert [m["epoch"] for m in metrics_of("run")] == [1, 2, 3]
    assert not Path("runs").exists()


# Options


def options_of(*arguments):
    return read_options(list(arguments))[0]


PUBLISHED = [
    "--dataset", "cifar10", "--model", "resnet", "--layers", "32", "--local_module_num", "16",
    "--local_loss_mode", "cross_entropy", "--context_mode", "E",
]  # fmt: skip


def test_published_options():
    options = options_of(
        *PUBLISHED, "--droprate", "0.0", "--no-augment", "--checkpoint", "ck",
        "--name", "n", "--no", "2", "--print-freq", "5", "-p", "7", "--cos_lr", "--balanced_memory",
        "--aux_net_config", "1c2f", "--aux_net_widen", "1", "--aux_net_feature_dim", "128",
        "--h_reconstruct",
    )  # fmt: skip
    assert (options.batch_size, options.lr, options.epochs, options.warmup_epochs) == (
        1024,
        0.8,
        160,
        10,
    )
    assert options.no_augment and options.h_reconstruct
    assert not options.balanced_memory  # at K=16 these cuts are the equal ones
    assert options.print_freq == 7


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], False),
        (["--h_reconstruct"], True),
        (["--h_reconstruct", "True"], True),
        (["--h_reconstruct", "False"], False),
    ],
)
def test_booleans_mean_what_they_say(arguments, expected):
    assert options_of(*arguments).h_reconstruct is expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], True),
        (["--cos_lr"], True),
        (["--cos_lr", "False"], False),
        (["--no-cos_lr"], False),
    ],
)
def test_cosine_is_on_unless_switched_off(arguments, expected):
    assert options_of(*arguments).cos_lr is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "32"], "unrecognized arguments: --layer 32 (did you mean --layers?)"),
        (["--context-mode", "E"], "did you mean --context_mode?"),
        (["--h_reconstruct", "maybe"], "'maybe' is neither True nor False"),
        (["--dataset", "mnist"], "invalid choice: 'mnist'"),
        (["--epochs", "0"], "not a whole number of 1 to"),
        (["--batch_size", "1"], "not a whole number of 2 to"),
        (["--epochs", "\u0668"], "not a whole number"),
        (["--aux_net_feature_dim", "999999999999"], "not a whole number of 1 to 65536"),
        (["--aux_net_widen", "1e300"], "not a number above 0"),
        (["--evaluate", ""], "the name is empty"),
        (["--output_dir", ""], "the name is empty"),
        (["--lr", "nan"], "not a number above 0"),
        (["--lr", "fast"], "not a number above 0"),
        (["--device", "gpu"], "none of auto, cpu, cuda, cuda:N"),
        (["--name", "../elsewhere"], "no part of a folder's name"),
        (["--no", "a/b"], "no part of a folder's name"),
        (["--context_mode", "R1X"], "unknown context_mode 'R1X'"),
        (["--context_mode", "RE"], "unknown context_mode 'RE'"),
        (["--context_mode", "R4", "--local_module_num", "2"], "at most local_module_num"),
        (["--local_module_num", "17"], "has 16 units"),
        (["--layers", "33"], "6n+2 layers; 33 is not such a depth, 32 is"),
        (["--h_reconstruct", "--local_module_num", "3"], "needs loss scales"),
        (["--resume", "a.pt", "--evaluate", "b.pt"], "exclude each other"),
        (["--resume", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
        (["--dataset", "folder", "--data_dir", "nowhere"], "cannot read the images in nowhere"),
        (["--image_size", "64"], "image_size is for folder"),
        (["--output_dir", "file"], "is a file"),
        (["--output_dir", "file/run"], "cannot write the run folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(monkeypatch, capsys, arguments, message):
    Path("file").write_text("kept")
    status, _, err = main(monkeypatch, capsys, "--dataset", "digits", *arguments)
    assert (status, len(err)) == (2, 1), err
    assert err[0].startswith("train.py: error: ")
    assert message in err[0]
    assert [p.name for p in Path().iterdir()] == ["file"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(monkeypatch, capsys):
    status, _, err = main(monkeypatch, capsys, *TINY, "--device", "cuda")
    assert (status, len(err)) == (2, 1)
    assert "0 CUDA devices" in err[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_run_on_cuda(monkeypatch, capsys):
    arguments = [*TINY, "--context_mode", "R1E", "--device", "cuda", "--output_dir", "run"]
    assert main(monkeypatch, capsys, *arguments)[0] == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert "max_memory_allocated" in summary["peak_memory_how"]
    assert summary["peak_memory_bytes"] > 2**20


def test_published_command_without_a_network_is_one_line(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    status, out, err = main(monkeypatch, capsys, *PUBLISHED)
    assert (status, len(err)) == (2, 1)
    assert "network is unreachable" in err[0]
    assert out[0] == "ResNet-32 on cifar10: K=16, context E, cross_entropy"
    assert not Path("runs").exists()


def test_help_groups_the_options_and_says_defaults():
    text = build_parser().format_help()
    for group in ("method:", "data:", "optimisation:", "run:"):
        assert f"\n{group}\n" in text
    assert "None" not in text
    for action in build_parser()._actions:
        if action.option_strings[0] not in ("-h", "--no-cos_lr", "--resume", "--evaluate"):
            assert "default" in action.help or action.default is not None, action.option_strings


def test_script_ends_with_status_2_and_no_traceback():
    """Once as a process of its own, as a user runs it."""
    command = [sys.executable, str(ROOT / "train.py"), "--context_mode", "R1X"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_run_names_differ_with_the_options():
    usual = run_name(options_of(*PUBLISHED))
    assert usual == "cifar10_resnet32_K16_E_cross_entropy_no_1"
    assert run_name(options_of(*PUBLISHED, "--batch_size", "1024", "--lr", "0.8")) == usual
    others = [
        ["--seed", "1"], ["--lr", "0.1"], ["--no-cos_lr"], ["--epochs", "8"], ["--no", "2"],
        ["--epochs", "8", "--warmup_epochs", "2"], ["--h_reconstruct"], ["--name", "mine"],
        ["--h_reconstruct", "--loss_scale", "1", "2", "3", "4"], ["--context_mode", "R1"],
        ["--limit_per_class", "200"], ["--no-augment"], ["--dataset", "svhn"],
    ]  # fmt: skip
    names = {run_name(options_of(*PUBLISHED, *other)) for other in others}
    assert len(names | {usual}) == len(others) + 1


def test_step_lines_come_every_print_freq_steps(monkeypatch, capsys):
    arguments = [*TINY, "--epochs", "1", "--batch_size", "2"]  # 10 steps
    for freq, steps in (("4", [4, 8, 10]), ("5", [5, 10]), ("100", [10])):
        _, out, _ = main(monkeypatch, capsys, *arguments, "-p", freq, "--no", freq)
        shown = [int(line.split(" step ")[1].split("/")[0]) for line in out if " step " in line]
        assert shown == steps


@pytest.mark.parametrize(
    ("dataset", "batch_size", "lr", "classes", "image_size"),
    [
        ("cifar10", 1024, 0.8, 10, 32),
        ("cifar100", 1024, 0.8, 100, 32),
        ("svhn", 1024, 0.8, 10, 32),
        ("stl10", 128, 0.1, 10, 96),
        ("digits", 128, 0.1, 10, 32),
        ("folder", 1024, 0.8, None, 32),
    ],
)
def test_defaults_of_the_data_sets(dataset, batch_size, lr, classes, image_size):
    options = options_of("--dataset", dataset)
    assert (options.batch_size, options.lr, options.image_size) == (batch_size, lr, image_size)
    assert train.DATASETS[dataset].classes == classes


# Learning rate


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (1, 0.01),
        (2, 0.9 * 0.01 + 0.1 * 0.4 * (1 + math.cos(math.pi / 80))),
        (10, 0.1 * 0.01 + 0.9 * 0.4 * (1 + math.cos(math.pi / 16))),
        (11, 0.4 * (1 + math.cos(math.pi * 11 / 160))),
        (80, 0.4),
        (160, 0.0),
    ],
)
def test_published_cosine_by_hand(epoch, expected):
    assert engine.learning_rate(epoch, 160, 0.8, 10, cosine=True) == pytest.approx(
        expected, abs=1e-12
    )


def test_warm_up_never_starts_above_the_rate():
    assert engine.learning_rate(1, 160, 0.001, 10, cosine=True) == 0.001


def test_published_steps_by_hand():
    rates = {
        e: engine.learning_rate(e, 160, 0.8, 0, cosine=False) for e in (1, 79, 80, 119, 120, 160)
    }
    assert rates == pytest.approx({1: 0.8, 79: 0.8, 80: 0.08, 119: 0.08, 120: 0.008, 160: 0.008})


@pytest.mark.parametrize(("epochs", "warmup"), [(160, 10), (1, 1), (16, 1), (17, 2), (300, 19)])
def test_warm_up_scales_with_the_epochs(epochs, warmup):
    assert options_of("--epochs", str(epochs)).warmup_epochs == warmup
    assert options_of("--epochs", str(epochs), "--no-cos_lr").warmup_epochs == 0
    assert options_of("--epochs", str(epochs), "--warmup_epochs", "3").warmup_epochs == 3


def test_bad_options_in_a_checkpoint_are_refused(monkeypatch, capsys):
    official_checkpoint("official.pt")
    contents = read_checkpoint("official.pt")._asdict() | {"format": "contsup-1"}
    torch.save(contents | {"options": {"layers": "many"}}, "own.pt")
    status, _, err = main(monkeypatch, capsys, "--evaluate", "own.pt")
    assert (status, len(err)) == (2, 1)
    assert "'many' is not a whole number" in err[0]


# What TensorBoard shows


def events_of(folder):
    everything = {"images": 0, "tensors": 0, "scalars": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def test_error_by_depth_is_drawn_every_epoch(monkeypatch, capsys):
    drawn = []
    draw = figures.error_by_depth
    monkeypatch.setattr(figures, "error_by_depth", lambda *a: drawn.append(a) or draw(*a))
    assert main(monkeypatch, capsys, *TINY, "--context_mode", "E", "--output_dir", "run")[0] == 0
    assert [event.step for event in events_of("run").Images("error_by_depth")] == [1, 2, 3]
    for metrics, (lines, title) in zip(metrics_of("run"), drawn, strict=True):
        assert title == f"epoch {metrics['epoch']}"
        test, train_ = lines[""]
        assert (list(test.x), test.y) == ([0, 1], metrics["test_errors"])
        assert (train_.dashed, train_.y) == (True, metrics["train_errors"])


@pytest.mark.parametrize("method", [["--local_loss_mode", "contrast"], ["--local_module_num", "1"]])
def test_without_softmax_heads_there_is_no_error_by_depth(monkeypatch, capsys, method):
    assert main(monkeypatch, capsys, *TINY, *method, "--output_dir", "run")[0] == 0
    assert events_of("run").Tags()["images"] == []


def test_reconstructions_of_eight_images_at_each_cut(monkeypatch, capsys):
    shown = []
    add = Board.add_reconstructions
    monkeypatch.setattr(Board, "add_reconstructions", lambda *a: shown.append(a[1]) or add(*a))
    method = ["--context_mode", "R1E", "--layers", "8", "--local_module_num", "4"]
    decoders = ["--h_reconstruct", "--loss_scale", "5", "0.1", "1", "1"]
    assert main(monkeypatch, capsys, *TINY, *method, *decoders, "--output_dir", "run")[0] == 0
    assert [event.step for event in events_of("run").Images("reconstructions")] == [1, 2, 3]
    labels = ["image", "cut [0, 0]", "cut [1, 0]", "cut [2, 0]"]
    assert [list(rows) for rows in shown] == [labels] * 3
    test = train.load_dataset("digits", "data", 32).test.images
    eight = test[[int(39 * i / 7) for i in range(8)]]  # of 40
    for rows in shown:
        assert torch.allclose(rows["image"], eight / 255, atol=1e-6)

    # What a checkpoint's decoders make of them, written out for this mode.
    state = read_checkpoint("run/checkpoint.pt").state_dict
    network = models.build_network(
        layers=8, local_module_num=4, context_mode="R1E", dataset="digits", h_reconstruct=True,
        loss_scale=(5, 0.1, 1, 1),
    ).eval()  # fmt: skip
    network.load_state_dict(state)
    with torch.no_grad():
        for (module, h_out), label in zip(
            network.features(eight.float() / 127.5 - 1), labels[1:], strict=False
        ):
            resized = torch.nn.functional.interpolate(
                h_out, (32, 32), mode="bilinear", align_corners=True
            )
            for layer in module.decoder:
                resized = layer(resized)
            expected = 1 / (1 + torch.exp(-resized))
            assert torch.allclose(shown[-1][label], expected, atol=1e-5)
    statistics = {name: value.clone() for name, value in network.named_buffers()}
    again = engine.reconstructions(network.train(), eight.float() / 127.5 - 1)
    assert all(torch.allclose(again[label], shown[-1][label], atol=1e-5) for label in labels)
    assert all(torch.equal(value, statistics[name]) for name, value in network.named_buffers())


def test_rows_of_images_are_labelled_from_top_to_bottom():
    rows = {name: torch.full((8, 3, 4, 4), grey) for name, grey in (("image", 1.0), ("cut", 0.5))}
    (axes,) = figures.image_rows(rows, "").axes
    picture = axes.images[0].get_array()
    for tick, label, grey in zip(
        axes.get_yticks(), axes.get_yticklabels(), (1.0, 0.5), strict=True
    ):
        assert label.get_text() == {1.0: "image", 0.5: "cut"}[grey]
        assert picture[round(tick)].max() == grey
    assert picture.shape[1] > 2 * picture.shape[0]  # eight across


def test_many_rows_of_large_images_stay_of_a_size_to_look_at():
    rows = {str(cut): torch.zeros(8, 3, 96, 96) for cut in range(16)}
    width, height = figures.image_rows(rows, "").get_size_inches()
    assert 5 < width < 12
    assert 10 < height < 12


def test_hyper_parameters_stand_beside_how_it_ended(monkeypatch, capsys):
    assert main(monkeypatch, capsys, *TINY, "--context_mode", "E", "--output_dir", "run")[0] == 0
    summary = json.loads(Path("run/summary.json").read_text())
    events = events_of("run")
    for name in ("error_last", "error_best"):
        (scalar,) = events.Scalars(f"final/{name}")
        assert scalar.value == pytest.approx(summary[name])
    (memory,) = events.Scalars("final/peak_memory_MiB")
    assert memory.value == pytest.approx(summary["peak_memory_bytes"] / 2**20)
    data = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    chosen = HParamsPluginData.FromString(data).session_start_info.hparams
    assert chosen["context_mode"].string_value == "E"
    assert chosen["local_module_num"].number_value == 2
    assert chosen["h_reconstruct"].bool_value is False
    assert "data_dir" not in chosen
    data = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    experiment = HParamsPluginData.FromString(data).experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == [
        "final/error_last", "final/error_best", "final/peak_memory_MiB",
    ]  # fmt: skip
    assert "_hparams_/session_end_info" in events.summary_metadata
    columns = experiment.hparam_infos
    first = sorted(columns, key=lambda column: (not column.differs, column.name))[:5]
    assert [column.name for column in first] == [
        "context_mode", "layers", "local_loss_mode", "local_module_num", "seed",
    ]  # fmt: skip


def test_last_and_best_error_are_not_mixed_up():
    folder = RunFolder(Path("run"), options_of(*PUBLISHED))
    folder.open(None, None, "cpu")
    ended = {"error_last": 7.0, "error_best": 5.0, "peak_memory_bytes": 3 * 2**20, "epochs": 4}
    folder.board.add_hparams({"seed": 1}, ended)
    scalars = {tag: [(e.step, e.value) for e in events_of("run").Scalars(tag)]
               for tag in events_of("run").Tags()["scalars"]}  # fmt: skip
    assert scalars == {
        "final/error_last": [(4, 7.0)],
        "final/error_best": [(4, 5.0)],
        "final/peak_memory_MiB": [(4, 3.0)],
    }


def test_the_summary_is_of_its_epochs_and_options(monkeypatch, capsys):
    assert main(monkeypatch, capsys, *TINY, "--output_dir", "run")[0] == 0
    summary, metrics = json.loads(Path("run/summary.json").read_text()), metrics_of("run")
    rates = [m["samples_per_second"] for m in metrics]
    assert summary["samples_per_second"] == pytest.approx(3 / sum(1 / rate for rate in rates))
    fresh = summary["peak_memory_bytes"]
    assert fresh == max(m["peak_memory_bytes"] for m in metrics) > 0

    # Continued with other options for memory, its peak is theirs.
    first = [*TINY, "--context_mode", "E", "--output_dir", "mixed", "--resume", "auto"]
    undo = interrupt_after(monkeypatch, 1)
    assert main(monkeypatch, capsys, *first, "--context_group", "0")[0] == 130
    undo()
    assert main(monkeypatch, capsys, *first, "--context_group", "16")[0] == 0
    grouped = [*TINY, "--context_mode", "E", "--output_dir", "grouped"]
    assert main(monkeypatch, capsys, *grouped)[0] == 0
    mixed, plain = (json.loads(Path(f, "summary.json").read_text()) for f in ("mixed", "grouped"))
    assert metrics_of("mixed")[0]["peak_memory_bytes"] > plain["peak_memory_bytes"]
    assert mixed["peak_memory_bytes"] == plain["peak_memory_bytes"]
    assert mixed["config"]["context_group"] == 16


def test_an_epoch_begun_again_is_drawn_once():
    folder = RunFolder(Path("run"), options_of(*PUBLISHED))
    errors = {"test_errors": [2.0, 1.0], "train_errors": [2.0, 1.0]}
    for value in (7.0, 5.0):  # the first was cut off before its checkpoint
        folder.open(None, None, "cpu")
        folder.add_epoch({"epoch": 1, "test_error": value} | errors, {})
        folder.board.events.close()
        time.sleep(1.1)  # files of events are sorted by the second that they begin in
    assert [e.value for e in events_of("run").Scalars("epoch/test_error")] == [5.0]


# --resume auto


def test_auto_starts_continues_and_ends(monkeypatch, capsys):
    method = [*TINY, "--context_mode", "E", "--resume", "auto"]
    assert main(monkeypatch, capsys, *method, "--output_dir", "whole")[0] == 0

    undo = interrupt_after(monkeypatch, 2)
    assert main(monkeypatch, capsys, *method)[0] == 130
    undo()
    status, out, err = main(monkeypatch, capsys, *method)
    assert (status, err) == (0, [])
    assert not any(line.startswith("epoch   2") for line in out)
    (folder,) = Path("runs").iterdir()
    assert [m["epoch"] for m in metrics_of(folder)] == [1, 2, 3]
    assert_same_state(folder / "checkpoint.pt", "whole/checkpoint.pt")
    assert [e.step for e in events_of(folder).Scalars("epoch/test_error")] == [1, 2, 3]
    assert len(main(monkeypatch, capsys, *method, "--dry_run")[1]) > 1  # a plan all the same

    for file in ("checkpoint.pt", "model_best.pt"):  # a finished run may have lost them
        (folder / file).unlink()
        status, out, err = main(monkeypatch, capsys, *method)
        assert (status, out, err) == (0, [f"{folder} is finished: all 3 epochs are done"], [])


@pytest.mark.parametrize("left", [b"", b'{"error_last": 1.5, "confi'])
def test_auto_mends_a_damaged_summary(monkeypatch, capsys, left):
    method = [*TINY, "--output_dir", "run", "--resume", "auto"]
    assert main(monkeypatch, capsys, *method)[0] == 0
    summary = Path("run/summary.json").read_bytes()
    Path("run/summary.json").write_bytes(left)
    assert main(monkeypatch, capsys, *method)[0] == 0
    assert Path("run/summary.json").read_bytes() == summary


def test_auto_starts_afresh_before_the_first_checkpoint(monkeypatch, capsys):
    method = [*TINY, "--output_dir", "run"]
    undo = cut_off_after(monkeypatch, 0)
    with pytest.raises(StopHere):
        main(monkeypatch, capsys, *method)
    undo()
    assert len(metrics_of("run")) == 1
    assert main(monkeypatch, capsys, *method)[0] == 2
    for other in (["--lr", "0.2"], ["--checkpoint", "elsewhere"]):
        before = snapshot("run")
        status, _, err = main(monkeypatch, capsys, *method, "--resume", "auto", *other)
        assert (status, len(err)) == (2, 1)
        assert other[0].strip("-") in err[0]
        assert snapshot("run") == before
    assert main(monkeypatch, capsys, *method, "--resume", "auto")[0] == 0
    assert [m["epoch"] for m in metrics_of("run")] == [1, 2, 3]


def test_auto_does_not_begin_again_what_is_finished(monkeypatch, capsys):
    method = [*TINY, "--output_dir", "run", "--resume", "auto"]
    assert main(monkeypatch, capsys, *method)[0] == 0
    for file in ("checkpoint.pt", "model_best.pt"):
        Path("run", file).unlink()
    before = snapshot("run")
    status, _, err = main(monkeypatch, capsys, *method, "--lr", "0.2")
    assert (status, len(err)) == (2, 1)
    assert "holds a finished run without a checkpoint" in err[0]
    assert snapshot("run") == before


def test_auto_overwrites_no_other_run(monkeypatch, capsys):
    method = [*TINY, "--output_dir", "run", "--resume", "auto"]
    assert main(monkeypatch, capsys, *method)[0] == 0
    before = Path("run/checkpoint.pt").read_bytes()
    status, _, err = main(monkeypatch, capsys, *method, "--lr", "0.2")
    assert (status, len(err)) == (2, 1)
    assert "other options" in err[0]
    assert Path("run/checkpoint.pt").read_bytes() == before
    budget = ["--memory_budget", "1", "--resume", "auto"]
    status, _, err = main(monkeypatch, capsys, *budget)
    assert (status, len(err)) == (2, 1)
    assert "needs an --output_dir" in err[0]


def test_auto_tells_images_of_ones_own_apart(monkeypatch, capsys):
    for seed, folder in enumerate(("one", "two")):
        make_images(folder, seed)
    Path("elsewhere").mkdir()
    method = [*TINY, "--dataset", "folder", "--resume", "auto"]
    for folder in ("one", "two"):
        assert main(monkeypatch, capsys, *method, "--data_dir", folder)[0] == 0
    names = sorted(path.name.split("_")[0] for path in Path("runs").iterdir())
    assert names == ["folder-one", "folder-two"]
    Path("one").rename("elsewhere/one")  # the same images in another place
    status, out, _ = main(monkeypatch, capsys, *method, "--data_dir", "elsewhere/one/")
    assert (status, len(out)) == (0, 1)
    assert "is finished" in out[0]
    same = [*method, "--output_dir", str(next(Path("runs").glob("folder-one*")))]
    status, _, err = main(monkeypatch, capsys, *same, "--data_dir", "two")
    assert (status, len(err)) == (2, 1)
    assert "dataset folder-one, now folder-two" in err[0]


def test_auto_finds_a_run_whose_cuts_were_chosen(monkeypatch, capsys):
    method = [*TINY, "--partition", "auto", "--resume", "auto"]
    for expected in ("run folder", "is finished: all 3 epochs are done"):
        status, out, _ = main(monkeypatch, capsys, *method)
        assert status == 0
        assert expected in out[-1]
    assert len(list(Path("runs").iterdir())) == 1


@pytest.mark.parametrize(
    "how",
    [
        ["--local_module_num", "2", "--cuts", "1,0"],
        ["--local_module_num", "2", "--partition", "auto"],
        ["--memory_budget", "0.01"],
    ],
)
def test_auto_knows_a_finished_run_by_its_cuts(monkeypatch, capsys, how):
    method = [*TINY_NET, "--resume", "auto", "--output_dir", "run"]
    assert main(monkeypatch, capsys, *method, *how)[0] == 0
    for file in ("checkpoint.pt", "model_best.pt"):
        Path("run", file).unlink()
    status, out, _ = main(monkeypatch, capsys, *method, *how)
    assert (status, out) == (0, ["run is finished: all 3 epochs are done"])
    status, _, err = main(monkeypatch, capsys, *method, "--cuts", "2,0")
    assert (status, len(err)) == (2, 1)


# Plans that are kept


def test_a_plan_is_kept_but_once(monkeypatch, capsys):
    method = ["--layers", "8", "--local_module_num", "2", "--context_mode", "E"]
    plan = [*method, "--dry_run", "--save_plan"]
    status, out, _ = main(monkeypatch, capsys, *plan, "--json")
    assert status == 0
    (folder,) = Path("runs").iterdir()
    kept = json.loads((folder / "plan.json").read_text())
    assert kept.pop("config")["context_mode"] == "E"
    assert kept == json.loads("".join(out))
    before = (folder / "plan.json").stat().st_mtime_ns
    status, out, _ = main(monkeypatch, capsys, *plan)
    assert (status, out) == (0, [f"{folder}/plan.json is there already"])
    assert (folder / "plan.json").stat().st_mtime_ns == before
    again = json.loads("".join(main(monkeypatch, capsys, *plan, "--json")[1]))
    assert again == kept
    before = (folder / "plan.json").stat().st_mtime_ns
    here = ["--output_dir", str(folder)]
    for option, value in (("batch_size", "8"), ("context_group", "0"), ("data_on_device", "True")):
        other = [f"--{option}", value, *here]  # of learning and memory, which a plan is of
        status, _, err = main(monkeypatch, capsys, *plan, *other)
        assert (status, len(err)) == (2, 1)
        assert f"is of other options ({option} " in err[0]
    assert main(monkeypatch, capsys, *plan, "--data_dir", "elsewhere", *here)[0] == 0
    assert (folder / "plan.json").stat().st_mtime_ns == before
    cuts = [*plan, "--partition", "auto", "--output_dir", "chosen"]
    assert len(main(monkeypatch, capsys, *cuts)[1]) > 1
    assert main(monkeypatch, capsys, *cuts)[1] == ["chosen/plan.json is there already"]
    budget = [*method[:2], "--memory_budget", "1", "--dry_run", "--save_plan", "--output_dir", "b"]
    assert len(main(monkeypatch, capsys, *budget)[1]) > 1
    assert main(monkeypatch, capsys, *budget)[1] == ["b/plan.json is there already"]
    status, _, err = main(monkeypatch, capsys, *method, "--save_plan")
    assert (status, len(err)) == (2, 1)
    assert "is for --dry_run: give that" in err[0]


def test_a_folder_with_a_plan_can_be_trained_into(monkeypatch, capsys):
    for how in (["--dry_run", "--save_plan"], []):
        assert main(monkeypatch, capsys, *TINY, *how, "--output_dir", "run")[0] == 0
    assert {"plan.json", "summary.json"} <= {path.name for path in Path("run").iterdir()}


# Balanced cuts that are the equal ones


def test_balanced_cuts_that_are_equal_make_the_same_run():
    equal = options_of(*PUBLISHED)
    for how in (["--balanced_memory"], ["--partition", "balanced"]):
        balanced = options_of(*PUBLISHED, *how)
        assert vars(balanced) == vars(equal)
    other = [*PUBLISHED, "--local_module_num", "8"]
    assert run_name(options_of(*other, "--balanced_memory")) != run_name(options_of(*other))
