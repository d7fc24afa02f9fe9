"""command.sh: the paper's experiments as train.py calls, and how they are run."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import configs
import train
from engine.options import read_options
from engine.run_name import run_name
from report.results import read_setup
from report.tables import TABLES, fill

ROOT = Path(train.__file__).parent
EXPERIMENTS = {"table1": 4, "table2": 16, "table3": 24, "figure4": 7, "figure5": 44, "table4": 13}

PYTHON = f"""#!/bin/sh
if [ "$1" = -c ]; then # checks the options or the environment, or names the methods
    case "$2" in *METHODS*) exec env PYTHONPATH={ROOT} {sys.executable} "$@" ;; esac
    [ -z "$CHECKS" ] || [ $# = 2 ] || exec env PYTHONPATH={ROOT} {sys.executable} "$@"
    exit
fi
echo "$*" >> calls
if [ -n "$WAITS" ]; then # for a signal, and then takes some time to stop
    trap 'sleep 0.3; echo saved >> calls; exit 143' TERM
    trap 'sleep 0.3; echo saved >> calls; exit 130' INT
    echo running
    touch begun
    while :; do sleep 0.05; done
fi
case "$*" in
    *equal_flops*) echo 62 ;;
    *"-m report"*) exit ${{REPORT:-0}} ;;
    *"$FAILS"*) exit ${{STATUS:-2}} ;;
esac
"""
"""An interpreter that writes its calls to a file, and fails where FAILS says so.

With CHECKS it does check the options that command.sh has it check."""


CHANGING = ("SEEDS", "EPOCHS", "DATASET", "KS", "METHODS", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON",
            "REQUIREMENTS")  # fmt: skip
PLAIN = {name: value for name, value in os.environ.items() if name not in CHANGING}


def command(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        ["./command.sh", *arguments],
        cwd=cwd, env=PLAIN | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def listed(*arguments, **environment):
    """Return the options of each train.py call that is listed."""
    done = command(*arguments, "--list", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    calls = [shlex.split(line) for line in done.stdout.splitlines()]
    python = f"{environment.get('VIRTUAL_ENV', '.venv')}/bin/python"
    assert all(call[:2] == [python, "train.py"] for call in calls)
    return [read_options(call[2:])[0] for call in calls]


@pytest.fixture
def clone(tmp_path):
    """Make a folder with command.sh and an interpreter that only writes down its calls."""
    for name in ("command.sh", "requirements.txt", "requirements-lock.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv")
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def calls_in(folder):
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_is_the_grid_that_its_table_shows(name):
    (table,) = (table for table in TABLES if table.name == name)
    runs = pd.DataFrame([read_setup(vars(options)) for options in listed(name)])
    assert len(runs) == len(runs.drop_duplicates()) == EXPERIMENTS[name]
    cells = fill(table, runs.assign(method="", peak_memory_bytes=1))
    assert cells.peak_memory_bytes.count() == len(runs)
    # Figure 4 has no balanced cuts for three of its cells; Table 4 has no R16 for K = 8.
    assert len(cells) - len(runs) == {"figure4": 3, "table4": 1}.get(name, 0)


def test_the_published_options_are_the_usual_ones():
    for options in listed("all"):
        assert (options.epochs, options.cos_lr, options.droprate) == (160, True, 0.0)
        head = (options.aux_net_config, options.aux_net_widen, options.aux_net_feature_dim)
        assert head == ("1c2f", 1, 128)
        expected = (128, 0.1) if options.dataset == "stl10" else (1024, 0.8)
        assert (options.batch_size, options.lr) == expected
        assert options.resume == "auto"


def test_shared_runs_are_trained_once():
    names = [run_name(options) for options in listed("all")]
    separately = [run_name(o) for name in EXPERIMENTS for o in listed(name)]
    assert len(separately) == sum(EXPERIMENTS.values()) == 108
    # Tables 1 and 2 are in Figure 5, 6 runs of Table 4 too, and Figure 4's K=16 is Table 2's.
    assert len(set(names)) == len(set(separately)) == 108 - 4 - 16 - 6 - 1
    assert len(names) == len(set(names)) + 1  # --balanced_memory says otherwise; auto skips it


def test_seeds_epochs_data_and_options_of_your_own():
    runs = listed("table1", "--amp", "bf16", "--name", "a.b", SEEDS="0 3", EPOCHS="7",
                  DATASET="svhn")  # fmt: skip
    assert [o.seed for o in runs] == [0] * 4 + [3] * 4
    assert {(o.epochs, o.dataset, o.amp, o.name) for o in runs} == {(7, "svhn", "bf16", "a.b")}
    assert {o.dataset for o in listed("table3", DATASET="svhn")} == {"svhn"}
    assert [o.seed for o in listed("table1", SEEDS="0\n1")] == [0] * 4 + [1] * 4
    (spaced, *_) = listed("table1", "--data_dir", "some where")
    assert spaced.data_dir == "some where"


def test_evidence():
    runs = listed("evidence", "some where")
    assert [(o.local_module_num, o.context_mode, o.seed) for o in runs] == [
        (K, mode, seed)
        for seed in (0, 1, 2)
        for K, mode in ((1, "R0"), (16, "R0"), (16, "R1"), (16, "E"), (16, "R1E"))
    ]
    schedule = {
        (o.dataset, o.data_dir, o.layers, o.limit_per_class, o.epochs, o.batch_size, o.lr, o.amp,
         o.compile)
        for o in runs
    }  # fmt: skip
    assert schedule == {("folder", "some where", 32, 1000, 8, 128, 0.1, "bf16", True)}
    for arguments in ([], ["--list"], ["nowhere"]):
        missing = command("evidence", *arguments)
        assert (missing.returncode, len(missing.stderr.splitlines())) == (2, 1)


def test_methods_are_the_grid_of_methods_and_modes(clone):
    runs = listed("methods", cwd=clone, KS="8 16")
    control = [run for run in runs if run.layers == 62]  # as the clone's interpreter says
    grid = [run for run in runs if run.layers == 32]
    assert len(runs) == len(control) + len(grid)
    assert [(o.context_mode, o.local_module_num) for o in control] == [("R0", 8), ("R0", 16)]
    assert calls_in(clone) == [
        f"-m planning.equal_flops --layers 32 --local_module_num {K} --context_mode E"
        for K in (8, 16)
    ]
    typed = {"local_loss_mode": "cross_entropy", "layers": 32}
    expected = [
        configs.METHODS[name] | typed | {"local_module_num": K, "context_mode": mode}
        for name in configs.METHODS for K in (8, 16) for mode in ("R0", "E")
    ]  # fmt: skip
    usual = {"aux_net_config": "1c2f", "h_reconstruct": False, "loss_scale": None, "overlap": 0,
             "momentum_aux": None, "consistency": None}  # fmt: skip
    for options, method in zip(grid, expected, strict=True):
        assert vars(options).items() >= (usual | method).items()
        assert (options.epochs, options.batch_size, options.lr) == (160, 1024, 0.8)
        assert (options.dataset, options.seed) == ("cifar10", 0)


def test_some_methods_and_the_short_schedule():
    chosen = {"METHODS": "infopro sid", "KS": "2 4 8 16 3"}
    runs = listed("methods", "some where", "--name", "x", **chosen, SEEDS="1", EPOCHS="2")
    assert [(o.h_reconstruct, o.local_module_num, o.context_mode) for o in runs] == [
        (decoders, K, mode)
        for decoders in (True, False) for K in (2, 4, 8, 16, 3) for mode in ("R0", "E")
    ]  # fmt: skip
    schedule = {
        (o.dataset, o.data_dir, o.layers, o.limit_per_class, o.epochs, o.batch_size, o.lr, o.amp,
         o.compile, o.seed, o.name)
        for o in runs
    }  # fmt: skip
    assert schedule == {("folder", "some where", 32, 1000, 2, 128, 0.1, "bf16", True, 1, "x")}
    for options in runs:  # CIFAR-10's, where the paper has them
        scale = options.h_reconstruct and configs.LOSS_SCALES[32, "cifar10"].get(
            options.local_module_num
        )
        assert options.loss_scale == (list(scale) if scale else None)
    assert {o.seed for o in listed("methods", "some where", METHODS="dgl")} == {0, 1, 2}
    assert {o.dataset for o in listed("methods", METHODS="dgl", DATASET="svhn")} == {"svhn"}


def test_help_runs_nothing(clone):
    for arguments in (["--help"], ["table1", "--help"], ["all", "-h"]):
        done = command(*arguments, cwd=clone)
        assert (done.returncode, done.stderr) == (0, "")
        assert "./command.sh table1 | table2" in done.stdout
        assert "PYTHON=..." in done.stdout
    assert not (clone / "calls").exists()


def test_tests_are_the_fast_ones_or_all(clone):
    for arguments in (["-k", "name"], ["--slow", "-k", "name"]):
        assert command("test", *arguments, cwd=clone, FAILS="nothing").returncode == 0
    fast, slow = calls_in(clone)
    assert fast == "-m pytest -m not slow -n 2 --dist loadfile -k name"
    assert slow == "-m pytest -k name"


def test_through_a_link(clone):
    (clone / "elsewhere").mkdir()
    (clone / "elsewhere" / "command.sh").symlink_to(clone / "command.sh")
    done = command("test", "--slow", cwd=clone / "elsewhere", FAILS="nothing")
    assert done.returncode == 0
    assert calls_in(clone) == ["-m pytest"]


def test_listing_runs_nothing(clone):
    assert command("table1", "--list", cwd=clone).returncode == 0
    done = command("list", cwd=clone)
    assert done.returncode == 0
    counts = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert counts == EXPERIMENTS | {"all": 82}
    assert not (clone / "calls").exists()


@pytest.mark.parametrize("status", ["1", "2", "137", "139"])  # the last: killed, crashed
def test_one_failed_run_does_not_stop_the_rest(clone, status):
    fails = {"FAILS": "--context_mode E ", "STATUS": status}
    done = command("table1", "--batch_size", "64", cwd=clone, **fails)
    assert done.returncode == 1
    *runs, last = calls_in(clone)
    assert [run.split("--context_mode ")[1].split()[0] for run in runs] == ["R0", "E", "R1", "R1E"]
    assert all("--batch_size 64" in run and run.endswith("--resume auto") for run in runs)
    assert last == "-m report runs"
    named = done.stderr.splitlines()
    assert named[0] == "command.sh: 1 of 4 runs failed:"
    assert len(named) == 2
    assert "--context_mode E " in named[1]
    assert named[1].startswith(f"  status {status}: ")
    assert command("table1", cwd=clone, FAILS="nothing").returncode == 0
    done = command("table1", cwd=clone, FAILS="nothing", REPORT="2")
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("status", [130, 143])
def test_ctrl_c_and_sigterm_stop_the_rest(clone, status):
    done = command("table1", cwd=clone, FAILS="--context_mode E ", STATUS=str(status))
    assert done.returncode == status
    assert len(calls_in(clone)) == 2


@pytest.mark.parametrize(
    ("target", "to_all", "name", "status"),
    [
        ("table1", False, "SIGINT", 130), ("table1", True, "SIGTERM", 143),
        ("demo", True, "SIGINT", 130), ("demo", False, "SIGTERM", 143),
    ],
)  # fmt: skip
def test_a_signal_is_passed_on_to_the_run(clone, target, to_all, name, status):
    """command.sh waits for the run, which has a checkpoint to write, and starts no other one."""
    process = subprocess.Popen(
        ["./command.sh", target], cwd=clone, env=PLAIN | {"WAITS": "yes"},
        stdout=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not (clone / "begun").exists():
        assert process.poll() is None
        time.sleep(0.01)
    (os.killpg if to_all else os.kill)(process.pid, getattr(signal, name))
    assert process.wait(timeout=60) == status
    calls = (clone / "calls").read_text().splitlines()
    assert len(calls) == 2
    assert calls[1] == "saved"


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["table1", "--lsit"], {}, "unrecognized arguments: --lsit"),
        (["all"], {"EPOCHS": "many"}, "--epochs: 'many'"),
        (["table1", "--deterministic", "--cudnn_benchmark"], {}, "--deterministic and --cudnn_ben"),
    ],
)
def test_options_that_are_wrong_are_said_once(clone, arguments, environment, says):
    done = command(*arguments, cwd=clone, CHECKS="1", **environment)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert says in done.stderr
    assert not (clone / "calls").exists()


def test_options_that_are_right_are_run_with(clone):
    assert command("table1", cwd=clone, CHECKS="1", FAILS="nothing").returncode == 0
    assert len(calls_in(clone)) == 5


def test_a_dry_run_plans_each_once(clone):
    assert command("table1", "--dry_run", cwd=clone, FAILS="-", SEEDS=" 4 5").returncode == 1
    *runs, last = calls_in(clone)
    assert [run.split(" --seed ")[1] for run in runs] == ["4 --dry_run --save_plan"] * 4
    assert last == "-m report runs"


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["table9"], {}, "unknown target 'table9'"),
        (["table1", "--seed", "3"], {}, "leave --seed out"),
        (["all", "--output_dir=x"], {}, "leave --output_dir out"),
        (["all", "--resume", "x"], {}, "leave --resume out"),
        (["all", "--evaluate=x"], {}, "leave --evaluate out"),
        (["table1", "--layers", "8"], {}, "--layers is part of what makes table1: leave it out"),
        (["all", "--epochs=3"], {}, "--epochs is part of"),
        (["figure5", "--h_reconstruct"], {}, "--h_reconstruct is part of"),
        (["table1", "--cuts", "1,0"], {}, "--cuts is part of"),
        (["test", "--matrix", "oldst"], {}, "--matrix oldst is none of oldest, between, newest"),
        (["table1", "--method", "sid"], {}, "--method is part of"),
        (["methods", "--aux_net_config=0c1f"], {"METHODS": "sid"}, "--aux_net_config is part of"),
        (["methods", "--consistency=1"], {"METHODS": "dgl"}, "--consistency is part of"),
        (["methods"], {"METHODS": "dgl lda"}, "METHODS has 'lda', which is none of contsup greedy"),
        (["methods"], {"METHODS": " "}, "METHODS=' ' names no method"),
        (["methods"], {"KS": "4,8"}, "KS='4,8' are not whole numbers"),
        (["methods", "nowhere"], {}, "there is no folder nowhere/train"),
        (["table1"], {"SEEDS": "0,1"}, "SEEDS='0,1'"),
        (["table1"], {"SEEDS": " "}, "SEEDS=' '"),
    ],
)
def test_bad_input(clone, arguments, environment, says):
    done = command(*arguments, cwd=clone, **environment)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[0]
    assert not (clone / "calls").exists()


def test_the_gpu_target_passes_the_status_on(clone):
    done = command("gpu", "--more", cwd=clone, FAILS="planning.gpu", STATUS="2")
    assert (done.returncode, done.stderr) == (2, "")
    assert calls_in(clone) == ["-m planning.gpu --more"]


HALF_MADE = f"""#!/bin/sh
case "$1 $2" in
    "-c "*) exec {sys.executable} "$@" ;;
    "-m venv") {sys.executable} -m venv --without-pip "$3"; [ -e installed ] || exit 1 ;;
esac
"""
"""An interpreter as Debian's: without a package its venv makes a .venv that has no pip."""


def test_a_half_made_environment_is_completed(clone):
    shutil.rmtree(clone / ".venv")
    other = clone / "debian"
    other.write_text(HALF_MADE)
    other.chmod(0o755)
    first = command("demo", cwd=clone, PYTHON=str(other))
    assert (first.returncode, first.stderr.splitlines()[-1][:38]) == (
        2, "command.sh: error: could not make .ven",
    )  # fmt: skip
    assert (clone / ".venv" / "bin" / "python").exists()
    other.write_text(HALF_MADE.replace("--without-pip", ""))
    (clone / "installed").touch()
    (clone / "requirements.txt").write_text("")
    (clone / "train.py").write_text("print('trained')")
    second = command("demo", cwd=clone, PYTHON=str(other))
    assert (second.returncode, second.stderr) == (0, "")
    assert second.stdout.splitlines() == ["installing requirements.txt into .venv", "trained"]


def test_an_active_environment_with_torch_is_used_as_it_is(clone):
    shutil.rmtree(clone / ".venv")
    python = clone / "mine" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        active = {name: str(clone / "mine"), "FAILS": "nothing"}
        assert command("test", "--slow", cwd=clone, **active).returncode == 0
    assert calls_in(clone) == ["-m pytest"] * 2
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("python", ["nowhere", "false"])
def test_another_interpreter_must_be_a_python(clone, python):
    shutil.rmtree(clone / ".venv")
    done = command("demo", cwd=clone, PYTHON=python)
    assert done.returncode == 2
    assert done.stderr == f"command.sh: error: PYTHON={python} is no Python 3.10 or later\n"
