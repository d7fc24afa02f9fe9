"""A run that was stopped at any moment, and goes on, ends as one that was not."""

import random
import signal

import pytest
from cli import TINY as OF_16
from cli import end_of

from engine.checkpoint import read_checkpoint

TINY = [*OF_16, "--context_mode", "R1E", "--droprate", "0.1", "--batch_size", "4", "--seed", "0"]
STEPS = 5
"""Of an epoch."""

KINDS = {
    "plain": [],
    "often": ["--checkpoint_every", "2"],
    "all": ["--checkpoint_every", "1", "--local_loss_mode", "contrast", "--h_reconstruct",
            "--loss_scale", "5", "1", "5", "1"],
    "fp16": ["--checkpoint_every", "2", "--amp", "fp16"],
}  # fmt: skip


@pytest.fixture(scope="module")
def expected(server):
    """By the kind of run, what an uninterrupted one ends as."""
    found = {}

    def run(kind):
        if kind not in found:
            ended = server.run(*TINY, *KINDS[kind], "--output_dir", f"expected_{kind}")
            assert (ended.status, ended.err) == (0, [])
            found[kind] = end_of(server.folder / f"expected_{kind}")
            assert [m["epoch"] for m in found[kind]["metrics"]] == [1, 2, 3]
        return found[kind]

    return run


def assert_ends_like(server, method, expected):
    name = method[-1]
    assert end_of(server.folder / name) == expected
    assert not [*(server.folder / name).glob("*.tmp"), *(server.folder / name).glob("*.damaged*")]
    again = server.run(*method)
    assert (again.status, again.out) == (0, [f"{name} is finished after 3 epochs"])


KILLS = [
    {"call": "train_step", "nth": 4},  # with a checkpoint of step 2
    {"call": "save_checkpoint", "nth": 3},  # between the two files of an epoch: steps 4, best, this
    {"line": 4, "files": ["engine/files.py"]},  # a file is open and empty
    {"limit": 300_000, "deadly": True},  # in the middle of a checkpoint
    {"call": "add_summary"},
]


def test_killed_at_chosen_moments(server, expected):
    """One run, killed again and again: each start goes on from what the last one left."""
    end = expected("often")
    method = [*TINY, *KINDS["often"], "--resume", "auto", "--output_dir", "killed"]
    for plan in KILLS:
        ended = server.run(*method, **plan)
        assert ended.status in (-signal.SIGKILL, -signal.SIGXFSZ), (plan, ended.err)
    assert server.run(*method).status == 0
    assert_ends_like(server, method, end)


@pytest.mark.parametrize(
    "kind", ["often", "all", *(pytest.param(k, marks=pytest.mark.slow) for k in ("plain", "fp16"))]
)
def test_stopped_by_signals(server, expected, kind):
    """In a step, in an evaluation, and while a checkpoint is written."""
    end = expected(kind)
    method = [*TINY, *KINDS[kind], "--resume", "auto", "--output_dir", f"stopped_{kind}"]
    for call, nth, name, status, done in (
        ("train_step", 3, "SIGTERM", 143, (0, 3)),
        ("evaluate", 1, "SIGINT", 130, (0, STEPS)),
        ("add_epoch", 1, "SIGTERM", 143, (1, 1)),
    ):
        ended = server.run(*method, call=call, nth=nth, send=[name])
        assert ended.status == status, ended.err
        how = f"--resume stopped_{kind}/checkpoint.pt"
        assert ended.err[-1] == f"train.py: note: stopped by {name}; continue with {how}"
        assert read_checkpoint(server.folder / f"stopped_{kind}" / "checkpoint.pt").done == done
    assert server.run(*method).status == 0
    assert_ends_like(server, method, end)


def random_kills(lines):
    """20 deaths at random: by a clock, at a line of the training or of files, in a write."""
    chance = random.Random(0)
    files = ["engine/files.py", "engine/checkpoint.py"]
    for _ in range(5):
        yield {"after": chance.uniform(0.05, 0.7)}
        yield {"line": chance.randrange(1, lines)}
        yield {"line": chance.randrange(1, 400), "files": files}
        yield {"limit": chance.randrange(1_000, 700_000), "deadly": True}


@pytest.mark.slow
def test_killed_at_20_random_moments(server, expected):
    """Each run dies and goes on until it is finished, some of them several times."""
    end = expected("often")
    lines = server.run(*TINY, *KINDS["often"], "--output_dir", "counted", line=0).lines
    killed = folders = 0
    plans = [*random_kills(lines)]
    while plans:
        folders += 1
        assert folders < 30
        method = [*TINY, *KINDS["often"], "--resume", "auto", "--output_dir", f"random_{folders}"]
        status = None
        while status != 0:
            plan = plans.pop(0) if plans else {}
            status = server.run(*method, **plan).status
            assert status in (0, -signal.SIGKILL, -signal.SIGXFSZ)
            if status:
                killed += 1
            elif plan:  # it came too late
                halved = {"after": lambda n: n / 2, "line": lambda n: n // 2}
                plans.append({name: halved.get(name, lambda n: n)(n) for name, n in plan.items()})
        assert_ends_like(server, method, end)
    assert killed == 20


@pytest.mark.slow
def test_stopped_by_a_signal_again_and_again(server, expected):
    """Steps and evaluations are cut short, each at a random line."""
    end = expected("often")
    chance = random.Random(0)
    method = [*TINY, *KINDS["often"], "--resume", "auto", "--output_dir", "often_stopped"]
    statuses, stops = [], set()
    while not statuses or statuses[-1]:
        assert len(statuses) < 100
        name, status = chance.choice([("SIGINT", 130), ("SIGTERM", 143)])
        line = chance.randrange(50, 500)
        ended = server.run(*method, line=line, files=["engine/step.py"], send=[name])
        statuses.append(ended.status)
        assert ended.status in (0, status), ended.err
        if ended.status and ended.err[-1].endswith("the run is finished"):
            break
        if ended.status and ended.err[-1] != "interrupted":  # that was before the first step
            stops.add(read_checkpoint(server.folder / "often_stopped/checkpoint.pt").step)
    assert {STEPS} < stops  # within an evaluation, and before
    assert_ends_like(server, method, end)
