"""Runs of train.py from the command line to the files they leave."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import TINY, TINY_NET, end_of, few_test_images, interrupt_after, metrics_of, summary_of
from golden import fill
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import models
import train
from engine.checkpoint import load_momentum, momentum_by_name, read_checkpoint
from engine.console import MIB
from engine.errors import exit_status
from engine.folder_lock import LOCK
from engine.options import read_options
from engine.run_folder import RunFolder
from engine.run_name import run_name
from engine.step import learning_rate, make_optimizers
from models.official import official_names

METHOD = [
    *TINY, "--context_mode", "R1E", "--droprate", "0.1", "--h_reconstruct",
    "--loss_scale", "2", "1", "0", "0",
]  # fmt: skip
INTO_RUN = [*METHOD, "--output_dir", "run"]
PUBLISHED = [
    "--dataset", "cifar10", "--model", "resnet", "--layers", "32", "--local_module_num", "16",
    "--local_loss_mode", "cross_entropy", "--context_mode", "E",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def earlier_runs(tmp_path_factory):
    """`finished`, and `stopped`, which Ctrl-C stopped in epoch 2 of 3."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        few_test_images(patch)
        for name, status in (("finished", 0), ("stopped", 130)):
            patch.setattr(sys, "argv", ["train.py", *METHOD, "--output_dir", name])
            with interrupt_after(1 if status else 9):
                assert exit_status(train.main) == status
    return folder


@pytest.fixture
def finished(earlier_runs, here):
    """A finished run of METHOD, in the folder `run`."""
    shutil.copytree(earlier_runs / "finished", "run")


@pytest.fixture
def stopped(earlier_runs, here):
    """One that was stopped by Ctrl-C, likewise."""
    shutil.copytree(earlier_runs / "stopped", "run")


def snapshot(folder):
    files = (p for p in Path(folder).rglob("*") if p.is_file() and p.name != LOCK)
    return {p: p.read_bytes() for p in files}


def epochs_of(folder):
    return [m["epoch"] for m in metrics_of(folder)]


def events_of(folder):
    everything = {"images": 0, "tensors": 0, "scalars": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def options_of(*arguments):
    return read_options(list(arguments))[0]


# What a run leaves


@pytest.mark.parametrize("loss", ["cross_entropy", "contrast"])
def test_a_run_leaves_everything(train_py, loss):
    status, out, err = train_py(*INTO_RUN, "--local_loss_mode", loss)
    assert (status, err) == (0, [])
    files = {path.name for path in Path("run").iterdir() if "tfevents" not in path.name}
    assert files - {LOCK} == {
        "config.json", "environment.jsonl", "metrics.jsonl", "summary.json", "checkpoint.pt",
        "model_best.pt",
    }  # fmt: skip

    metrics, summary = metrics_of("run"), summary_of("run")
    assert [m["epoch"] for m in metrics] == [1, 2, 3]
    rates = [0.01, 0.05 * (1 + math.cos(2 * math.pi / 3)), 0]
    assert [m["lr"] for m in metrics] == pytest.approx(rates)
    for m in metrics:
        assert len(m["local_losses"]) == 2
        assert m["train_loss"] == m["local_losses"][-1]
        assert m["test_error"] == m["test_errors"][-1]
        first = m["test_errors"][0], m["train_errors"][0]
        assert all((error is None) == (loss == "contrast") for error in first)
    errors = [m["test_error"] for m in metrics]
    assert (summary["error_last"], summary["error_best"]) == (errors[-1], min(errors))
    speeds = [m["samples_per_second"] for m in metrics]
    assert summary["samples_per_second"] == pytest.approx(3 / sum(1 / speed for speed in speeds))
    assert summary["peak_memory_bytes"] == metrics[-1]["peak_memory_bytes"] > MIB
    assert "live tensor storage" in summary["peak_memory_how"]
    assert summary["parameters"].keys() == {"backbone", "context", "auxiliary"}
    assert (summary["epochs"], summary["device"]) == (3, "cpu")
    assert summary["config"] == json.loads(Path("run/config.json").read_text())
    assert read_checkpoint("run/model_best.pt").epoch == errors.index(min(errors)) + 1
    assert any(f"{summary['error_last']:.2f} %" in line for line in out)

    events = events_of("run")
    assert [e.value for e in events.Scalars("epoch/test_error")] == pytest.approx(errors)
    assert [e.step for e in events.Scalars("local_losses/module_00")] == [1, 2, 3]
    assert ("test_errors/module_00" in events.Tags()["scalars"]) == (loss == "cross_entropy")
    for tag, expected in (
        ("final/error_last", errors[-1]), ("final/error_best", min(errors)),
        ("final/peak_memory_MiB", summary["peak_memory_bytes"] / MIB),
    ):  # fmt: skip
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(3, pytest.approx(expected))]
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    chosen = HParamsPluginData.FromString(content).session_start_info.hparams
    assert chosen["context_mode"].string_value == "R1E"
    assert chosen["local_module_num"].number_value == 2


@pytest.mark.parametrize(
    ("options", "rates", "augment"),
    [
        (["--lr", "0.5", "--epochs", "2"], [0.01, 0.0], True),
        (["--no-cos_lr", "--no-augment", "--lr", "0.3"], [0.3, 0.03, 0.003], False),
    ],
)
def test_training_is_the_plain_loop(train_py, options, rates, augment):
    """Against one SGD over the whole network on each module's loss, bit for bit; K = 4."""
    method = [*TINY, "--local_module_num", "4", "--context_mode", "R1E", "--no-channels_last"]
    assert train_py(*method, *options, "--output_dir", "run")[0] == 0
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
    for epoch, (m, lr) in enumerate(zip(metrics_of("run"), rates, strict=True), start=1):
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


# Resume


def test_a_run_that_goes_on_ends_as_an_uninterrupted_one(train_py, stopped, earlier_runs):
    status, out, _ = train_py("--resume", "run/checkpoint.pt", "--device", "cpu")
    assert status == 0
    assert not any(line.startswith("epoch   1") for line in out)
    assert end_of("run") == end_of(earlier_runs / "finished")
    events = events_of("run")
    for drawn in (events.Scalars("epoch/test_error"), events.Images("reconstructions")):
        assert [event.step for event in drawn] == [1, 2, 3]
    rows = events.Tensors("reconstructions/rows/text_summary")[0].tensor_proto.string_val[0]
    assert rows == b"image; cut [1, 0]"


@pytest.mark.parametrize("where", [".", "sub", "..", "absolute"])
def test_what_is_said_to_continue_with_does(train_py, here, where):
    where = str(here / where) if where == "absolute" else where
    method = [*TINY, "--output_dir", "runs/mine", "--checkpoint", where]
    with interrupt_after(1):
        status, _, err = train_py(*method)
    assert status == 130
    how = err[-1].split("stopped by SIGINT; continue with ")[1]
    assert f"continue it with {how}, or" in train_py(*method)[2][0]  # the same run begun again
    assert train_py(*how.split())[0] == 0
    assert epochs_of("runs/mine") == [1, 2, 3]
    assert [path.name for path in Path("runs").iterdir() if path.is_dir()] == ["mine"]


def test_what_another_process_did_until_the_lock_is_seen(
    train_py, stopped, earlier_runs, monkeypatch
):
    """It finished the run that this one had read the first epoch of."""
    lock = RunFolder.locked

    def locked_late(folder):
        shutil.copy(earlier_runs / "finished/checkpoint.pt", folder.checkpoint)
        return lock(folder)

    monkeypatch.setattr(RunFolder, "locked", locked_late)
    status, out, _ = train_py("--resume", "run/checkpoint.pt")
    assert status == 0
    assert not any("  lr " in line for line in out)
    assert metrics_of("run") == metrics_of(earlier_runs / "finished")


def test_a_finished_run_says_so_and_goes_on_in_another_folder(train_py, refused, finished):
    before = snapshot("run")
    status, out, _ = train_py("--resume", "run/checkpoint.pt")
    assert status == 0
    assert "run is finished: 3 of 3 epochs" in out[-1]
    more = ["--resume", "run/checkpoint.pt", "--output_dir", "more"]
    assert "3 of 3 epochs are done" in refused(*more)
    assert not Path("more").exists()
    assert train_py(*more, "--epochs", "4")[0] == 0
    assert epochs_of("more") == [4]
    assert snapshot("run") == before


def test_the_peak_is_that_of_the_last_options_for_memory(train_py):
    method = [*TINY, "--context_mode", "E"]
    assert train_py(*method, "--output_dir", "grouped")[0] == 0
    mixed = [*method, "--output_dir", "mixed", "--resume", "auto", "--context_group"]
    with interrupt_after(1):
        assert train_py(*mixed, "0")[0] == 130
    assert train_py(*mixed, "16")[0] == 0
    peaks = [summary_of(folder)["peak_memory_bytes"] for folder in ("mixed", "grouped")]
    assert peaks[0] == peaks[1] < metrics_of("mixed")[0]["peak_memory_bytes"]
    assert summary_of("mixed")["config"]["context_group"] == 16


def test_a_run_that_goes_on_in_another_precision_measures_its_own_peak(train_py):
    assert train_py(*TINY, "--amp", "bf16", "--epochs", "2", "--output_dir", "narrow")[0] == 0
    more = ["--resume", "narrow/checkpoint.pt", "--amp", "off", "--epochs", "3"]
    assert train_py(*more, "--output_dir", "continued")[0] == 0
    narrow, continued = (summary_of(x)["peak_memory_bytes"] for x in ("narrow", "continued"))
    assert continued > narrow


# Nothing is overwritten


def test_modules_are_trained_one_after_another(train_py, refused):
    """Frozen ones keep their bits, statistics too; trained ones get those of a run of all."""
    method = [*TINY_NET, "--local_module_num", "3", "--context_mode", "R1E", "--batch_size", "4",
              "--no-channels_last", "--no-cos_lr"]  # fmt: skip
    first = ["--epochs", "1", "--train_modules", "0-1", "--output_dir", "first"]
    assert train_py(*method, "--epochs", "1", "--output_dir", "all")[0] == 0
    status, out, err = train_py(*method, *first)
    assert (status, err) == (0, []) and out[0].endswith("training modules 0 1 alone")
    second = ["--epochs", "2", "--train_modules", "2", "--output_dir", "second"]
    assert train_py("--resume", "first/checkpoint.pt", "--device", "cpu", *second)[0] == 0
    assert "second is finished" in train_py(*method, *second, "--resume", "auto")[1][0]
    together, alone, after = (
        read_checkpoint(f"{name}/checkpoint.pt") for name in ("all", "first", "second")
    )
    torch.manual_seed(5)
    start = models.build_network(layers=8, local_module_num=3, context_mode="R1E").state_dict()
    for name, value in alone.state_dict.items():
        if name.startswith("local_modules.2."):
            assert torch.equal(value, start[name])
            is_weight = name in together.momentum
            assert not is_weight or not torch.equal(value, after.state_dict[name])
        else:
            assert torch.equal(value, together.state_dict[name])
            assert torch.equal(value, after.state_dict[name])
    assert {name.split(".")[1] for name in alone.momentum} == {"0", "1"}
    assert {name.split(".")[1] for name in after.momentum} == {"2"}
    assert summary_of("second")["config"]["train_modules"] == [2]
    assert len(metrics_of("second")[0]["test_errors"]) == 3
    _, (plan,), _ = train_py(*method, *first, "--dry_run", "--json")
    assert json.loads(plan)["peak_bytes"] == summary_of("first")["peak_memory_bytes"]
    _, (all_train,), _ = train_py(*method, "--dry_run", "--json")
    peaks = [[m["peak_bytes"] for m in json.loads(p)["modules"]] for p in (plan, all_train)]
    assert peaks[0][2] < peaks[1][2]
    assert "train_modules must be among" in refused(*method, "--train_modules", "2-3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "holds a finished run"),
        (["--resume", "run/checkpoint.pt", "--epochs", "4"], "of other options (epochs 3, now 4"),
        (["--resume", "run/model_best.pt", "--epochs", "9"], "of other options (epochs 3, now 9"),
        (["--resume", "auto", "--lr", "0.2"], "of other options (lr 0.1, now 0.2"),
        (["--resume", "auto", "--amp", "bf16"], "of other options (amp off, now bf16"),
        (["--resume", "auto", "--tf32"], "of other options (tf32 False, now True"),
    ],
)
def test_a_finished_run_is_not_overwritten(refused, finished, options, message):
    before = snapshot("run")
    assert message in refused(*INTO_RUN, *options)
    assert snapshot("run") == before


@pytest.mark.parametrize("left", [None, b"", b'{"error_last": 1.5, "confi'])
def test_a_lost_or_damaged_summary_is_written_again(train_py, finished, left):
    before = Path("run/summary.json").read_bytes()
    Path("run/summary.json").unlink()
    if left is not None:
        Path("run/summary.json").write_bytes(left)
    resumed = "auto" if left is not None else "run/checkpoint.pt"
    assert train_py(*INTO_RUN, "--resume", resumed)[0] == 0
    assert Path("run/summary.json").read_bytes() == before


# --resume auto


def test_auto_starts_continues_and_ends(train_py, earlier_runs):
    method = [*METHOD, "--resume", "auto"]
    with interrupt_after(2):
        assert train_py(*method)[0] == 130
    status, _, err = train_py(*method)
    assert (status, err) == (0, [])
    (folder,) = Path("runs").iterdir()
    assert end_of(folder) == end_of(earlier_runs / "finished")
    assert len(train_py(*method, "--dry_run")[1]) > 1  # a plan all the same
    for file in ("checkpoint.pt", "model_best.pt"):  # a finished run may have lost them
        (folder / file).unlink()
        assert train_py(*method) == (0, [f"{folder} is finished after 3 epochs"], [])


def test_auto_starts_afresh_before_the_first_checkpoint(train_py, refused, stopped):
    before = snapshot("run")
    assert "continue it with --resume run/checkpoint.pt" in refused(*INTO_RUN)
    assert snapshot("run") == before
    for file in ("checkpoint.pt", "model_best.pt"):
        Path("run", file).unlink()
    assert "without a checkpoint to continue from" in refused(*INTO_RUN)
    before = snapshot("run")
    for other in (["--lr", "0.2"], ["--checkpoint", "elsewhere"]):
        assert other[0].strip("-") in refused(*INTO_RUN, "--resume", "auto", *other)
        assert snapshot("run") == before
    assert train_py(*INTO_RUN, "--resume", "auto")[0] == 0
    assert epochs_of("run") == [1, 2, 3]


@pytest.mark.parametrize(
    "cuts",
    [
        ["--local_module_num", "2", "--cuts", "1,0"],
        ["--memory_budget", "0.01"],
        ["--local_module_num", "2", "--partition", "auto"],
    ],
)
def test_auto_knows_a_finished_run_by_its_cuts(train_py, refused, cuts):
    method = [*TINY_NET, "--epochs", "1", "--resume", "auto", "--output_dir", "run"]
    assert train_py(*method, *cuts)[0] == 0
    for file in ("checkpoint.pt", "model_best.pt"):
        Path("run", file).unlink()
    assert train_py(*method, *cuts) == (0, ["run is finished after 1 epoch"], [])
    before = snapshot("run")
    message = refused(*method, "--cuts", "2,0")
    assert "holds a finished run without a checkpoint" in message
    assert snapshot("run") == before


# Images of one's own


def make_images(folder, seed=0):
    rng = np.random.default_rng(seed)
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            Path(folder, part, name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(Path(folder, part, name, f"{i}.png"))


def test_images_of_ones_own(train_py, refused):
    method = [*TINY, "--dataset", "folder", "--epochs", "1", "--resume", "auto"]
    for seed, folder in enumerate(("one", "two")):
        make_images(folder, seed)
        assert train_py(*method, "--data_dir", folder)[0] == 0
    one, two = sorted(Path("runs").iterdir())
    assert (one.name.split("_")[0], two.name.split("_")[0]) == ("folder-one", "folder-two")
    same_folder = [*method, "--output_dir", one]
    assert "dataset folder-one, now folder-two" in refused(*same_folder, "--data_dir", "two")
    Path("elsewhere").mkdir()
    Path("one").rename("elsewhere/one")
    assert "is finished" in train_py(*method, "--data_dir", "elsewhere/one/")[1][0]

    evaluation = ["--evaluate", two / "checkpoint.pt"]
    Path("two/train").rename("two/unused")  # which takes no training images
    before = snapshot(".")
    assert f"test error {metrics_of(two)[-1]['test_error']:.2f} %, " in train_py(*evaluation)[1][-1]
    assert snapshot(".") == before
    state = read_checkpoint(two / "checkpoint.pt").state_dict
    assert state["local_modules.1.head.2.bias"].shape == (2,)
    Path("two/test/bee").rename("two/test/wasp")
    message = refused(*evaluation)
    assert "other classes (ant, bee) than the data have (ant, wasp)" in message


# Checkpoints of the authors' release


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


OFFICIAL = [*TINY, "--context_mode", "E"]


def test_official_checkpoint_is_evaluated_and_resumed_with_its_momentum(train_py, refused):
    network, names, parameters = official_checkpoint("official.pt")
    data = train.load_dataset("digits", "unused", 32, None).test
    output = network.eval()(data.images / 127.5 - 1)
    error = 100 * float((output.argmax(1) != data.targets).double().mean())
    assert f"test error {error:.2f} %" in train_py(*OFFICIAL, "--evaluate", "official.pt")[1][-1]
    checkpoint = read_checkpoint("official.pt")
    assert (checkpoint.epoch, checkpoint.official) == (2, True)
    optimizers = make_optimizers(network)
    load_momentum(optimizers, network, checkpoint)
    for name, momentum in momentum_by_name(optimizers, network).items():
        assert torch.all(momentum == parameters.index(names[name]))
    resume = [*OFFICIAL, "--resume", "official.pt", "--output_dir", "run"]
    assert train_py(*resume)[0] == 0
    assert epochs_of("run") == [3]
    assert summary_of("run")["error_best"] == metrics_of("run")[0]["test_error"]
    assert Path("run/model_best.pt").exists()

    contents = torch.load("official.pt")
    contents["optimizer"]["state"][2]["momentum_buffer"] = torch.zeros(3)
    torch.save(contents, "official.pt")
    assert "momentum of" in refused(*resume[:-1], "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context_mode", "R1"], "another architecture: local_modules.1.context.recent_0"),
        (["--layers", "14"], "another architecture"),
        (["--aux_net_feature_dim", "64"], "is float32 [128, 32] and should be float32 [64, 32]"),
    ],
)
def test_checkpoint_of_another_architecture_is_refused(refused, finished, options, message):
    official_checkpoint("official.pt")
    for file in ("official.pt", "run/checkpoint.pt"):
        assert message in refused(*OFFICIAL, *options, "--evaluate", file)


def test_what_is_like_a_checkpoint_of_the_release_is_refused(refused):
    official_checkpoint("names.pt", state_dict={"encoder.weight": torch.zeros(2)})
    official_checkpoint("numbers.pt", state_dict={"conv1.weight": 3})
    torch.save([1, 2], "list.pt")
    for file in list(Path().iterdir()):
        refused(*OFFICIAL, "--resume", file)
    assert not Path("runs").exists()


# Options


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        ("--h_reconstruct False", "h_reconstruct", False),
        ("--cos_lr False", "cos_lr", False),
        ("--no-cos_lr", "cos_lr", False),
        ("--print-freq 5 -p 7", "print_freq", 7),
        ("--epochs 16", "warmup_epochs", 1),
        ("--epochs 17", "warmup_epochs", 2),
        ("--epochs 17 --no-cos_lr", "warmup_epochs", 0),
        ("--epochs 17 --warmup_epochs 3", "warmup_epochs", 3),
        ("--dataset digits", "batch_size", 128),
        ("--dataset digits", "lr", 0.1),
    ],
)
def test_options_mean_what_they_say(typed, name, value):
    assert getattr(options_of(*typed.split()), name) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--layer 32", "unrecognized arguments: --layer 32 (did you mean --layers?)"),
        ("--h_reconstruct maybe", "'maybe' is neither True nor False"),
        ("--dataset mnist", "invalid choice: 'mnist'"),
        ("--epochs \u0668", "not a whole number"),
        ("--aux_net_feature_dim 999999999999", "not a whole number of 1 to 65536"),
        ("--evaluate=", "the name is empty"),
        ("--lr nan", "not a number above 0"),
        ("--device gpu", "none of auto, cpu, cuda, cuda:N"),
        ("--name ../elsewhere", "no part of a folder's name"),
        ("--resume a.pt --evaluate b.pt", "--resume"),
        ("--resume nowhere.pt", "there is no checkpoint nowhere.pt"),
        ("--memory_budget 1 --resume auto", "needs an --output_dir"),
        ("--dataset folder --data_dir nowhere", "cannot read the images in nowhere"),
        ("--image_size 64", "image_size is for folder"),
        ("--output_dir file", "is a file"),
        ("--device cuda:99", "CUDA devices here"),
    ],
)
def test_bad_input_is_one_line_and_status_2(refused, arguments, message):
    Path("file").write_text("kept")
    assert message in refused("--dataset", "digits", *arguments.split())
    assert [p.name for p in Path().iterdir()] == ["file"]


def test_script_ends_with_status_2_and_no_traceback():
    """Once as a process of its own, as a user runs it."""
    command = [sys.executable, train.__file__, "--context_mode", "R1X"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("train.py: error: ")


def test_run_names_differ_with_the_options():
    usual = run_name(options_of(*PUBLISHED))
    assert usual == "cifar10_resnet32_K16_E_cross_entropy_no_1"
    assert run_name(options_of(*PUBLISHED, "--batch_size", "1024", "--lr", "0.8")) == usual
    others = [
        "--seed 1", "--lr 0.1", "--no-cos_lr", "--epochs 8", "--no 2", "--limit_per_class 200",
        "--epochs 8 --warmup_epochs 2", "--h_reconstruct", "--name mine", "--context_mode R1",
        "--h_reconstruct --loss_scale 1 2 3 4", "--no-augment", "--dataset svhn",
    ]  # fmt: skip
    names = {run_name(options_of(*PUBLISHED, *other.split())) for other in others}
    assert len(names | {usual}) == len(others) + 1
    ordinary = "--limit_per_class 1000 --epochs 8 --batch_size 128 --lr 0.1 --amp bf16 --compile"
    name = run_name(options_of(*PUBLISHED, "--seed", "2", *ordinary.split()))
    assert name == "cifar10_resnet32_K16_E_cross_entropy_amp-bf16_compile_n-1000_ep-8_bs-128_" \
        "lr-0.1_seed-2_no_1"  # fmt: skip
    for equal in (["--balanced_memory"], ["--partition", "balanced"]):  # at K=16 they are
        assert run_name(options_of(*PUBLISHED, *equal)) == usual


@pytest.mark.parametrize(
    ("epoch", "how", "expected"),
    [
        (1, (160, 0.001, 10, True), 0.001),  # a warm-up never starts above the rate
        (2, (160, 0.8, 10, True), 0.9 * 0.01 + 0.1 * 0.4 * (1 + math.cos(math.pi / 80))),
        (10, (160, 0.8, 10, True), 0.1 * 0.01 + 0.9 * 0.4 * (1 + math.cos(math.pi / 16))),
        (80, (160, 0.8, 0, False), 0.08),
        (120, (160, 0.8, 0, False), 0.008),
    ],
)
def test_learning_rates_by_hand(epoch, how, expected):
    assert learning_rate(epoch, *how) == pytest.approx(expected, abs=1e-12)


# Plans that are kept


def test_a_plan_is_kept_but_once(train_py, refused):
    plan = [*INTO_RUN, "--dry_run", "--save_plan"]
    status, out, _ = train_py(*plan, "--json")
    kept, written = json.loads(Path("run/plan.json").read_text()), snapshot("run")
    assert (status, kept.pop("config")["context_mode"]) == (0, "R1E")
    assert kept == json.loads("".join(out))
    for option, value in (("batch_size", "8"), ("context_group", "0"), ("data_on_device", "True")):
        message = refused(*plan, f"--{option}", value)  # of learning and memory, as a plan is
        assert f"is of other options ({option} " in message
    for other in ([], ["--data_dir", "elsewhere"]):
        assert train_py(*plan, *other) == (0, ["run/plan.json is there already"], [])
    assert snapshot("run") == written
    assert train_py(*INTO_RUN, "--epochs", "1")[0] == 0  # a run goes into the folder of its plan
    chosen = [*TINY_NET, "--memory_budget", "1", "--dry_run", "--save_plan", "--output_dir", "b"]
    assert len(train_py(*chosen)[1]) > 1
    assert train_py(*chosen) == (0, ["b/plan.json is there already"], [])
    assert "--dry_run" in refused(*TINY, "--save_plan")
