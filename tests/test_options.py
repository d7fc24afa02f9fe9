"""The command line: the authors' commands, and the options that they write differently."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from engine.options import complete_options, parse_options, read_options
from engine.run_name import run_name

ROOT = Path(__file__).parent.parent

RELEASE = (
    "--model resnet --layers 32 --droprate 0.0 --no 1 --cos_lr --aux_net_widen 1 "
    "--aux_net_feature_dim 128 --aux_net_config 1c2f --print-freq 10 --checkpoint checkpoint"
)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--dataset cifar10 --local_module_num 16 --local_loss_mode contrast --context_mode E "
            '--h_reconstruct --balanced_memory --resume "" --name x --no-augment',
            ("cifar10", 16, "contrast", "E", True, "x", True, None),
        ),
        (
            "--dataset stl10 --local_module_num 4 --local_loss_mode cross_entropy "
            "--context_mode R1E --ixx_1 20 --ixy_1 0.2 --ixx_2 5 --ixy_2 1 --h_reconstruct",
            ("stl10", 4, "cross_entropy", "R1E", True, None, False, [20, 0.2, 5, 1]),
        ),
        (
            "--dataset svhn --local_module_num 8 --resume=",
            ("svhn", 8, "contrast", "E", False, None, False, None),
        ),
        (
            "--local_module_num 2 --context_mode R1 -p 100",
            ("cifar10", 2, "contrast", "R1", False, None, False, None),
        ),
        ("", ("cifar10", 1, "contrast", "E", False, None, False, None)),
    ],
)
def test_commands_of_the_release(line, expected):
    options = read_options(shlex.split(f"{RELEASE} {line}"))[0]
    assert expected == (
        options.dataset, options.local_module_num, options.local_loss_mode, options.context_mode,
        options.h_reconstruct, options.name, options.no_augment, options.loss_scale,
    )  # fmt: skip
    assert (options.resume, options.checkpoint, options.cos_lr) == (None, "checkpoint", True)


SINGLE = ["--ixx_1", "5", "--ixy_1", "0.5", "--ixx_2", "0", "--ixy_2", "1"]


def test_a_loss_scale_of_four_options_is_that_of_one():
    one = read_options(["--loss_scale", "5", "0.5", "0", "1"])[0]
    four = read_options(SINGLE)[0]
    assert vars(one) == vars(four)
    assert run_name(one) == run_name(four)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (SINGLE[:6], "are one loss scale: give all four or none"),
        ([*SINGLE, "--loss_scale", "5", "0.5", "0", "1"], "another spelling of --loss_scale"),
    ],
)
def test_a_loss_scale_is_given_once_and_in_full(capsys, arguments, says):
    with pytest.raises(SystemExit) as ended:
        read_options(arguments)
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1)
    assert says in error


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = parse_options(["--output_dir=~/x", "--resume=~/y", "--data_dir=~", "--checkpoint=a~"])
    assert (options.output_dir, options.resume) == ("/home/me/x", "/home/me/y")
    assert (options.data_dir, options.checkpoint) == ("/home/me", "a~")


@pytest.mark.parametrize("option", ["--layers=--", "--seed=--", "--name=--"])
def test_dashes_are_no_value(capsys, option):
    with pytest.raises(SystemExit) as ended:
        parse_options([option])
    assert ended.value.code == 2
    assert "expected one argument" in capsys.readouterr().err


def test_typed_options_go_before_those_of_a_checkpoint():
    kept = {"layers": 14, "local_module_num": 3, "lr": 0.3, "loss_scale": [1.0, 2.0, 3.0, 4.0]}
    options = complete_options(["--resume", "x.pt", "--lr", "0.2", *SINGLE], kept)
    assert (options.layers, options.local_module_num, options.lr) == (14, 3, 0.2)
    assert (options.loss_scale, options.batch_size) == ([5, 0.5, 0, 1], 1024)


def test_options_and_help_need_no_torch():
    code = "import sys, engine.options as o; o.parse_options([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
