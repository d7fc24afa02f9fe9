"""Whatever is typed or handed in: a run's options or a checkpoint, or one line and status 2."""

import contextlib
import io
import sys
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from configs import DATASETS, InputError, one_line
from engine.checkpoint import Checkpoint, load_weights, read_checkpoint, save_checkpoint
from engine.errors import exit_status
from engine.options import NETWORK_OPTIONS, as_arguments, build_parser, read_options
from models import build_network

REPRODUCIBLE = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
MANY = pytest.mark.parametrize("examples", [50, pytest.param(500, marks=pytest.mark.slow)])

NAMES = sorted(build_parser()._option_string_actions)
VALUES = [
    "", "-1", "0", "1", "2", "32", "16", "1e9", "nan", "inf", "-inf", "1e-320", "True", "false",
    "E", "R1", "R2E", "R99", "contrast", "cross_entropy", "0,0", "1,4", "1,4,5", "digits",
    "folder", "svhn", "auto", "balanced", "1c2f", "9c9f", "bf16", "cpu", "cuda:99", "a b", "../..",
    "a\nb", "\0", "é", "\udcff", "--", "-", "-h", "=", "\u0661", "1_000", " 1", "0x10", "💥", "~",
]  # fmt: skip
PAIRS = st.builds("{}={}".format, st.sampled_from(NAMES), st.sampled_from(VALUES))
WORDS = st.one_of(
    st.sampled_from(NAMES), st.sampled_from(VALUES), PAIRS, st.text(max_size=20),
    st.builds(str, st.integers(-(10**20), 10**20) | st.floats()),
)  # fmt: skip
NETWORK_PAIRS = st.builds(
    "--{}={}".format, st.sampled_from(NETWORK_OPTIONS), st.sampled_from(VALUES)
)


def outcome(argv):
    """Return the options, or None where they are refused in one line and with status 2."""
    found, out, err = [], io.StringIO(), io.StringIO()
    out.reconfigure = lambda **_: None
    command = mock.patch.object(sys, "argv", ["train.py", *argv])
    with command, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = exit_status(lambda argv: found.append(read_options(argv)[0]))
    if found or "usage:" in out.getvalue():
        assert status == 0
        return found[0] if found else None
    lines = err.getvalue().encode("utf-8", "backslashreplace").decode().split("\n")
    assert (status, len(lines), lines[-1]) == (2, 2, ""), lines
    assert lines[0].startswith("train.py: error: ")
    return None


def check_valid(options):
    """Check that each option has a value of its type, and survives being typed again."""
    assert options.dataset in DATASETS
    assert options.batch_size >= 2 and 0 < options.lr <= 1000
    assert options.epochs >= 1 and options.local_module_num >= 1
    kept = {k: v for k, v in vars(options).items() if k in NETWORK_OPTIONS}
    again = build_parser().parse_args(as_arguments(kept))
    given = {k: getattr(again, k) for k in kept}
    assert {k: v for k, v in given.items() if v == v} == {k: v for k, v in kept.items() if v == v}


@pytest.mark.parametrize("words", [st.lists(WORDS, max_size=8), st.lists(PAIRS, max_size=4)])
@MANY
def test_any_command_line(words, examples):
    @settings(REPRODUCIBLE, max_examples=examples)
    @given(words)
    def check(argv):
        options = outcome(argv)
        if options is not None:
            check_valid(options)

    check()


@pytest.mark.parametrize("examples", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_valid_options_make_a_network_or_are_refused_in_words(examples):
    """Even where each of them is valid, but not all together."""

    @settings(REPRODUCIBLE, max_examples=examples)
    @given(st.lists(NETWORK_PAIRS, max_size=3))
    def check(argv):
        options = outcome(argv)
        if options is None or options.layers > 32 or options.dataset == "folder":
            return
        arguments = {name: getattr(options, name) for name in NETWORK_OPTIONS}
        with FakeTensorMode():
            try:
                network = build_network(**arguments)
            except InputError as error:
                assert one_line(error) == str(error)
            else:
                assert len(network.local_modules) == options.local_module_num

    check()


@MANY
def test_any_options_in_a_checkpoint(tmp_path, examples):
    names = st.sampled_from(sorted(vars(build_parser().parse_args([])))) | st.text(max_size=10)
    values = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10),
        st.sampled_from(VALUES), st.binary(max_size=4),
        st.lists(st.one_of(st.integers(), st.text(max_size=10), st.lists(st.integers()))),
    )  # fmt: skip

    @settings(REPRODUCIBLE, max_examples=examples)
    @given(st.dictionaries(names, values, max_size=4))
    def check(options):
        save_checkpoint(tmp_path / "x.pt", Checkpoint(1, {}, {}, options, []))
        found = outcome(["--evaluate", str(tmp_path / "x.pt")])
        if found is not None:
            check_valid(found)
            assert (found.output_dir, found.resume) == (None, None)

    check()


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "drop", "repeat", "zero"]),
        st.floats(0, 1), st.integers(1, 255), st.integers(1, 5000),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


def edited(data, edits, where):
    """Return bytes of which some are changed: `where` is the start, the end or anywhere."""
    data = bytearray(data)
    for kind, share, bits, length in edits:
        if where != "anywhere":  # a zip file's directory and this one's pickle are at the end
            share *= 4000 / max(len(data), 4000)
        at = min(int((1 - share if where == "end" else share) * len(data)), len(data) - 1)
        if at < 0:
            break
        end = len(data) if kind == "cut" else at + (1 if kind == "flip" else length)
        old = data[at:end]
        data[at:end] = {
            "flip": bytes(x ^ bits for x in old), "repeat": old * 2, "zero": bytes(len(old))
        }.get(kind, b"")  # fmt: skip
    return bytes(data)


@MANY
def test_a_damaged_checkpoint_is_refused_or_is_what_it_was(tmp_path, examples):
    """Nothing that is read from it differs from what was written, whatever its bytes."""
    torch.manual_seed(0)
    options = {"layers": 8, "local_module_num": 2, "dataset": "digits", "aux_net_widen": 0.1}
    network, path = build_network(**options), tmp_path / "damaged.pt"
    momentum = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    save_checkpoint(path, Checkpoint(1, network.state_dict(), momentum, options, ["a", "b"]))
    data, state = path.read_bytes(), read_checkpoint(path)

    @settings(REPRODUCIBLE, max_examples=examples)
    @given(edits=EDITS, where=st.sampled_from(["anywhere", "start", "end"]))
    def check(edits, where):
        path.write_bytes(edited(data, edits, where))
        try:
            found = read_checkpoint(path)
        except InputError as error:
            text = one_line(error)
            assert str(path) in text and text.isprintable() and len(text) < 600
            return
        for part in ("state_dict", "momentum"):
            read, written = getattr(found, part), getattr(state, part)
            assert read.keys() == written.keys()
            assert all(torch.equal(read[name], written[name]) for name in written)
        rest = {"state_dict": {}, "momentum": {}}
        assert found._replace(**rest) == state._replace(**rest)
        load_weights(network, found)

    check()
