"""A run that was stopped at any moment, and goes on, ends as one that was not."""

import random
import signal

import pytest
from cli import end_of

from engine.checkpoint import read_checkpoint

TINY = [
    "--dataset", "digits", "--limit_per_class", "2", "--layers", "8", "--local_module_num", "2",
    "--context_mode", "R1E", "--droprate", "0.1", "--batch_size", "4", "--epochs", "3",
    "--local_loss_mode", "cross_entropy", "--device", "cpu",
]  # fmt: skip
STEPS = 5

FORMATS = {
    "plain": [],
    "often": ["--checkpoint_every", "2"],
    "all": ["--checkpoint_every", "1", "--local_loss_mode", "contrast", "--h_reconstruct",
            "--loss_scale", "5", "1", "5", "1"],
    "fp16": ["--checkpoint_every", "2", "--amp", "fp16"],
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(server):
    """By the name of its options, what an uninterrupted run ends as, and the lines that it runs."""
    found = {}

    def run(kind):
        if kind not in found:
            ended = server.run(*TINY, *FORMATS[kind], "--output_dir", f"whole_{kind}", line=0)
            assert (ended.status, ended.err) == (0, [])
            found[kind] = end_of(server.folder / f"whole_{kind}"), ended.lines
        return found[kind]

    return run


def assert_ends_like(folder, expected):
    end = end_of(folder)
    assert [m["epoch"] for m in end["metrics"]] == [1, 2, 3]
    assert end == expected
    assert not list(folder.glob("*.tmp"))


def moments(lines):
    """20 ways to die, each at a random moment: by a clock, at a line of the training or of the
    writing of files, and in the middle of a write.
    """
    chance = random.Random(0)
    files = ["engine/files.py", "engine/checkpoint.py"]
    plans = [
        *({"after": chance.uniform(0.05, 0.7)} for _ in range(5)),
        *({"line": chance.randrange(1, lines)} for _ in range(5)),
        *({"line": chance.randrange(1, 800), "files": files} for _ in range(5)),
        *({"limit": chance.randrange(1_000, 700_000), "deadly": True} for _ in range(5)),
    ]
    chance.shuffle(plans)
    return plans


def test_killed_at_20_random_moments(server, whole):
    """Each run dies and goes on until it is finished, some of them several times."""
    expected, lines = whole("often")
    method = [*TINY, *FORMATS["often"], "--resume", "auto"]
    killed = folders = 0
    plans = moments(lines)
    while plans:
        folders += 1
        assert folders < 30
        folder = server.folder / f"killed_{folders}"
        status = None
        while status != 0:
            plan = plans.pop() if plans else {}
            ended = server.run(*method, "--output_dir", folder.name, **plan)
            status = ended.status
            assert status in (0, -signal.SIGKILL, -signal.SIGXFSZ), ended.err
            if status:
                killed += 1
            elif plan:
                sooner = {"after": plan["after"] / 2} if "after" in plan else plan
                plans.insert(0, sooner)  # it came too late
        assert_ends_like(folder, expected)
        again = server.run(*method, "--output_dir", folder.name)
        assert again.status == 0
        assert again.out == [f"{folder.name} is finished: all 3 epochs are done"]
    assert killed == 20


@pytest.mark.parametrize("kind", FORMATS)
def test_stopped_by_a_signal_again_and_again(server, whole, kind):
    """Steps and evaluations are cut short, each at a random line."""
    expected, _ = whole(kind)
    chance = random.Random(0)
    method = [*TINY, *FORMATS[kind], "--output_dir", f"stopped_{kind}", "--resume", "auto"]
    statuses, stops = [], []
    while not statuses or statuses[-1]:
        name, status = chance.choice([("SIGINT", 130), ("SIGTERM", 143)])
        line = chance.randrange(100, 700)
        ended = server.run(*method, line=line, files=["engine/step.py"], send=[name])
        statuses.append(ended.status)
        assert len(statuses) < 100
        if ended.status:
            assert ended.status == status, ended.err
            if ended.err[-1] == "interrupted":  # the first step had not begun
                continue
            if ended.err[-1] == f"train.py: note: stopped by {name}; the run is finished":
                break  # nor was there another one
            how = f"--resume stopped_{kind}/checkpoint.pt"
            assert ended.err[-1] == f"train.py: note: stopped by {name}; continue with {how}"
            state = read_checkpoint(server.folder / f"stopped_{kind}" / "checkpoint.pt")
            stops.append((state.epoch, state.step))
    assert {STEPS} < {step for _, step in stops}  # within an evaluation, and before
    assert_ends_like(server.folder / f"stopped_{kind}", expected)
