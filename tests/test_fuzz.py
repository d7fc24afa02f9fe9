"""Whatever is typed or handed in: what is asked for, or one line and status 2."""

import contextlib
import io
import sys
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from configs import DATASETS, InputError, one_line
from engine.checkpoint import Checkpoint, load_weights, read_checkpoint, save_checkpoint
from engine.options import NETWORK_OPTIONS, as_arguments, build_parser, read_options
from models import build_network

PROPERTY = settings(
    deadline=None, derandomize=True, max_examples=500, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


# Options

NAMES = sorted(build_parser()._option_string_actions)
VALUES = [
    "", "-1", "0", "1", "2", "32", "16", "1e9", "nan", "inf", "-inf", "1e-320", "True", "false",
    "E", "R1", "R2E", "R99", "contrast", "cross_entropy", "0,0", "1,4", "1,4,5", "digits",
    "folder", "svhn", "auto", "balanced", "1c2f", "9c9f", "bf16", "cpu", "cuda:99", "a b", "../..",
    "a\nb", "\0", "é", "\udcff", "--", "-", "-h", "=", "\u0661", "1_000", " 1", "0x10", "💥",
]  # fmt: skip
WORDS = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(VALUES),
    st.builds("{}={}".format, st.sampled_from(NAMES), st.sampled_from(VALUES)),
    st.builds(str, st.integers(-(10**20), 10**20) | st.floats()),
    st.text(max_size=20),
)


def outcome(argv):
    """Options, or None for what was refused in one line with status 2, as train.py does."""
    out, err = io.StringIO(), io.StringIO()
    prog = mock.patch.object(sys, "argv", ["train.py"])
    with prog, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return read_options(argv)[0]
        except InputError as error:
            train.fail(2, error)
        except SystemExit as error:
            if error.code == 0:  # --help
                assert "usage:" in out.getvalue()
                return None
            assert error.code == 2
    lines = err.getvalue().encode("utf-8", "backslashreplace").decode().split("\n")
    assert len(lines) == 2 and not lines[1], lines
    assert lines[0].startswith("train.py: error: ")
    return None


def check_valid(options):
    """Each option has a value of its type, and the same options come of it when typed again."""
    assert options.dataset in DATASETS
    assert options.batch_size >= 2 and 0 < options.lr <= 1000
    assert options.epochs >= 1 and options.local_module_num >= 1
    kept = {k: v for k, v in vars(options).items() if k in NETWORK_OPTIONS}
    again = build_parser().parse_args(as_arguments(kept))
    given = {k: getattr(again, k) for k in kept}
    assert {k: v for k, v in given.items() if v == v} == {k: v for k, v in kept.items() if v == v}


@PROPERTY
@given(st.lists(WORDS, max_size=8))
def test_any_list_of_strings(argv):
    options = outcome(argv)
    if options is not None:
        check_valid(options)


@PROPERTY
@given(st.dictionaries(st.sampled_from(sorted(NAMES)), st.sampled_from(VALUES), max_size=4))
def test_any_option_with_any_value(pairs):
    options = outcome([f"{name}={value}" for name, value in pairs.items()])
    if options is not None:
        check_valid(options)


@settings(PROPERTY, max_examples=150)
@given(st.dictionaries(st.sampled_from([f"--{name}" for name in NETWORK_OPTIONS]),
                       st.sampled_from(VALUES), max_size=3))  # fmt: skip
def test_a_valid_config_makes_a_network_or_is_refused_in_words(pairs):
    """Where options are each fine, but not together: before anything is computed."""
    options = outcome([f"{name}={value}" for name, value in pairs.items()])
    if options is None or options.layers > 32 or options.dataset == "folder":
        return
    with FakeTensorMode():
        try:
            network = build_network(**train.network_arguments(options)[0])
        except InputError as error:
            assert one_line(error) == str(error)
        else:
            assert len(network.local_modules) == options.local_module_num


@PROPERTY
@given(
    st.dictionaries(
        st.sampled_from(sorted(vars(build_parser().parse_args([])))) | st.text(max_size=10),
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10),
            st.sampled_from(VALUES), st.binary(max_size=4),
            st.lists(st.one_of(st.integers(), st.text(max_size=10), st.lists(st.integers()))),
        ),
        max_size=4,
    )
)  # fmt: skip
def test_any_options_in_a_checkpoint(tmp_path_factory, options):
    path = tmp_path_factory.getbasetemp() / "options.pt"
    save_checkpoint(path, Checkpoint(1, {}, {}, options, []))
    found = outcome(["--evaluate", str(path)])
    if found is not None:
        check_valid(found)
        assert (found.output_dir, found.resume) == (None, None)


# Checkpoints


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_network(layers=8, local_module_num=2, dataset="digits", aux_net_widen=0.1)


@pytest.fixture(scope="module")
def valid(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("valid") / "valid.pt"
    momentum = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    options = {"layers": 8, "local_module_num": 2, "dataset": "digits", "aux_net_widen": 0.1}
    save_checkpoint(path, Checkpoint(1, network.state_dict(), momentum, options, ["a", "b"]))
    return path.read_bytes(), read_checkpoint(path)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "drop", "repeat", "zero"]),
        st.floats(0, 1), st.integers(1, 255), st.integers(1, 5000),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


def edited(data, edits, near_end):
    """Bytes flipped, cut off, taken out, doubled or zeroed, at shares of the file."""
    data = bytearray(data)
    for kind, share, bits, length in edits:
        if near_end:  # where zip files have their directory, and this one its pickle
            share = 1 - share * 8000 / len(data) if len(data) > 8000 else share
        at = min(int(share * len(data)), len(data) - 1)
        if at < 0:
            break
        if kind == "flip":
            data[at] ^= bits
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + length]
        elif kind == "repeat":
            data[at:at] = data[at : at + length]
        else:
            data[at : at + length] = bytes(len(data[at : at + length]))
    return bytes(data)


@PROPERTY
@given(edits=EDITS, where=st.sampled_from(["anywhere", "start", "end"]))
def test_a_damaged_checkpoint_is_refused_or_is_what_it_was(
    tmp_path_factory, network, valid, edits, where
):
    """Nothing that is read from it differs from what was written, whatever its bytes."""
    data, state = valid
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    if where == "start":
        edits = [(kind, share * 4000 / len(data), *rest) for kind, share, *rest in edits]
    path.write_bytes(edited(data, edits, near_end=where == "end"))
    try:
        found = read_checkpoint(path)
    except InputError as error:
        text = one_line(error)
        assert str(path) in text and text.isprintable() and len(text) < 600
        return
    assert found.state_dict.keys() == state.state_dict.keys()
    for part in ("state_dict", "momentum"):
        for name, tensor in getattr(state, part).items():
            assert torch.equal(getattr(found, part)[name], tensor)
    assert found._replace(state_dict={}, momentum={}) == state._replace(state_dict={}, momentum={})
    load_weights(network, found)


@PROPERTY
@given(st.binary(max_size=300))
def test_bytes_that_were_never_a_checkpoint(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes.pt"
    path.write_bytes(data)
    with pytest.raises(InputError):
        read_checkpoint(path)
