"""Data parallel steps in two and three processes, against those of one process, in float64."""

import argparse
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from configs import DATASETS, METHODS, InputError
from dataloaders import Batches, Split, share_sizes
from engine.step import Totals, make_optimizers, train_step
from losses import LOCAL_LOSSES, TaskLoss, supervised_contrastive
from models import build_network
from parallel.data_parallel import DataParallelStrategy
from parallel.sync_batchnorm import synchronise

CPU = torch.device("cpu")
SIZE, BATCH, SAMPLES = 8, 7, 18  # batches of 7, 7 and 4, of which 2 and 3 ranks have uneven parts
OPTIONS = argparse.Namespace(
    parallel="data", device="cpu", sync_bn=False, compile=False, channels_last=False
)
DECODER = {"h_reconstruct": True, "loss_scale": (2, 1, 0.5, 1)}
CONTRAST = {"local_loss_mode": "contrast"}
OWN_LOSS = {"local_loss_mode": "warm"}
LOCAL_LOSSES["warm"] = TaskLoss(
    partial(supervised_contrastive, temperature=1.0), classifies=False, compares_samples=True
)
SYNCED = {
    "R1E, all": {"context_mode": "R1E", "recompute": True} | OWN_LOSS | DECODER,
    "end to end": {"local_module_num": 1},
    "E, groups of 16": {"context_mode": "E", "context_group": 16},
    "R2, plain encoder": {"context_mode": "R2", "context_group": 0} | DECODER,
    "E, bf16": {"context_mode": "E", "amp": "bf16", "recompute": True} | DECODER,
} | {
    f"{name}, R1E": DECODER | METHODS[name] | {"context_mode": "R1E"}
    for name in ("infopro", "man", "manpp", "hpff")
} | {
    f"{name}, E": METHODS[name] | {"context_mode": "E"}
    for name in ("dgl", "predsim", "auglocal", "sid")
}  # fmt: skip
OWN_STATISTICS = {
    "own: R1E": {"context_mode": "R1E"} | CONTRAST,
    "own: compiled": {"context_mode": "E", "recompute": True} | CONTRAST,
}
CASES = SYNCED | OWN_STATISTICS
slow = pytest.mark.slow


# ---------------------------------------------------------------------------------------------
# What runs, in one process or several


def make_network(seed=0, amp="off", **options):
    torch.manual_seed(seed)
    # Groups of 5 channels leave a smaller last one.
    defaults = {"layers": 8, "local_module_num": 3, "image_size": SIZE, "context_group": 5,
                "context_mode": "R0", "local_loss_mode": "cross_entropy"}  # fmt: skip
    network = build_network(**defaults | options, amp=amp)
    return network.double() if amp == "off" else network


def make_batches(share=(0, 1), samples=SAMPLES, batch=BATCH, **options):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (samples, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    targets = torch.randint(3, (samples,), generator=generator)
    options = {"augment": True, "shuffle": True, "share": share} | options
    return Batches(Split(images, targets), DATASETS["cifar10"], batch, CPU, **options)


def train(network, batches, step=train_step):
    """Return all that the network has become, with the sums of losses and wrong answers."""
    optimizers, totals = make_optimizers(network.train()), Totals(network, CPU)
    dtype = next(network.parameters()).dtype
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.1
    largest_batch = 0
    for images, targets in batches:
        largest_batch = max(largest_batch, len(targets))
        with network.eagerly() if len(targets) < largest_batch else nullcontext():
            step(network, optimizers, images.to(dtype), targets, totals)
    return {
        "weights": {name: p.detach() for name, p in network.named_parameters()},
        "buffers": {name: buffer.clone() for name, buffer in network.named_buffers()},
        "momentum": [s["momentum_buffer"] for o in optimizers for s in o.state.values()],
        "totals": totals.state(),
    }


@torch.no_grad()
def logits(network):
    images, _ = next(make_batches().epoch(3))
    return network.eval()(images.to(next(network.parameters()).dtype))


def train_rank(strategy, name):
    """Return what this rank comes to in a case. It starts from other weights than rank 0."""
    network = make_network(seed=strategy.rank, **CASES[name])
    names = list(network.state_dict())
    if "compiled" in name:
        network.compile_steps("aot_eager")
    options = argparse.Namespace(**vars(OPTIONS) | {"sync_bn": name in SYNCED})
    strategy.divide(options, {}, CPU)
    strategy.place(network, options, CPU)
    logits(network)  # an evaluation may come before the first step
    end = train(network, strategy.batches(make_batches(strategy.share), 1))
    assert list(network.state_dict()) == names
    return end | {"logits": logits(network)}


def train_with_overflow(strategy):
    """Return weights and loss scales after each step; in the second one rank has huge images."""
    network = make_network(context_mode="E", amp="fp16")
    strategy.divide(OPTIONS, {}, CPU)
    strategy.place(network, OPTIONS, CPU)
    optimizers, steps = make_optimizers(network.train()), []
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.1
    for images, targets in strategy.batches(make_batches(strategy.share), 1):
        if len(steps) == 1 and strategy.rank == 1:
            images[0] = 1e6
        train_step(network, optimizers, images, targets, Totals(network, CPU))
        weights = [p.detach().clone() for p in network.parameters()]
        steps.append((weights, [o.scaler.get_scale() for o in optimizers]))
    return steps


def work(argv):
    """Go through the cases as one of several ranks, and save what this one comes to."""
    with DataParallelStrategy(OPTIONS) as strategy:
        ends = {
            name: train_rank(strategy, name) if name in CASES else train_with_overflow(strategy)
            for name in argv
        }
        torch.save(ends, f"group_{strategy.rank}_of_{strategy.size}.pt")


@pytest.fixture(scope="module")
def ranks_of(server):
    """Return what the ranks come to in a case, by their number; all slow cases run at once."""
    found = {}

    def run(number, name):
        if (number, name) not in found:
            names = [name] if name == "R1E, all" else [*cases_of(number, CASES), "overflow"]
            ended = server.run_together(number, *names, main="test_data_parallel.work")
            assert [each.status for each in ended] == [0] * number, ended
            files = [server.folder / f"group_{rank}_of_{number}.pt" for rank in range(number)]
            ends = [torch.load(file, weights_only=False) for file in files]
            found.update({(number, n): [end[n] for end in ends] for n in names})
        return found[number, name]

    return run


def assert_same(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance / 2)


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------
# Steps


def cases_of(number, names):
    """Return the cases for so many ranks; compiling takes seconds, so only two do that."""
    return [name for name in names if number == 2 or "compiled" not in name]


def cases(names):
    """Parametrize a test by numbers of ranks and cases; one is fast."""
    return pytest.mark.parametrize(("number", "name"), [
        pytest.param(number, name, marks=[] if (number, name) == (2, "R1E, all") else slow)
        for number in (2, 3) for name in cases_of(number, names)
    ])  # fmt: skip


@cases(SYNCED)
def test_with_sync_bn_it_is_the_training_of_one_process(ranks_of, number, name):
    network = make_network(**CASES[name])
    expected = train(network, make_batches().epoch(1)) | {"logits": logits(network)}
    first, *others = ranks = ranks_of(number, name)
    dtype, tolerance = (torch.float32, 0.1) if "bf16" in name else (torch.float64, 1e-10)
    for part in ("weights", "buffers", "momentum", "logits"):
        assert_same(first[part], expected[part], tolerance)
        for other in others:
            assert_equal(other[part], first[part])
    assert {b.dtype for b in first["buffers"].values()} == {dtype, torch.int64}
    totals = [end["totals"] for end in ranks]
    for part in ("losses", "wrong"):
        assert_same(sum(of_rank[part] for of_rank in totals), expected["totals"][part], tolerance)
    assert sum(of_rank["samples"] for of_rank in totals) == SAMPLES


def step_by_parts(number):
    """A step of one process in which BatchNorm takes the statistics of each part of the batch.

    Losses are of the batch; running statistics are those of the first part.
    """

    def step(network, optimizers, images, targets, totals):
        outputs, buffers = {}, []
        for part in images.tensor_split(number):
            for module, h_out in network.features(part):
                outputs.setdefault(module, []).append(module.head(h_out))
            buffers = buffers or [buffer.clone() for buffer in network.buffers()]
        for module, optimizer in zip(network.stage, optimizers, strict=True):
            module.head.task.function(torch.cat(outputs[module]), targets).backward()
            optimizer.step_and_free()
        for buffer, of_first in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(of_first)

    return step


@cases(OWN_STATISTICS)
def test_without_sync_bn_statistics_are_of_a_part_and_gradients_of_the_batch(
    ranks_of, number, name
):
    network = make_network(**CASES[name] | {"recompute": False})
    expected = train(network, make_batches().epoch(1), step_by_parts(number))
    first, *others = ranks_of(number, name)
    for part in ("weights", "momentum", "buffers"):
        assert_same(first[part], expected[part])
        for other in others:
            assert_equal(other[part], first[part])
    synced = train(make_network(**CASES[name]), make_batches().epoch(1))["weights"]
    assert max((first["weights"][n] - w).abs().max() for n, w in synced.items()) > 1e-3


@slow
@pytest.mark.parametrize("number", [2, 3])
def test_all_ranks_skip_a_step_that_overflows_on_one(ranks_of, number):
    first, *others = ranks_of(number, "overflow")
    for end in others:
        assert_equal(end, first)
    (before, scales), (after, halved), (later, _) = first
    assert_equal(after, before)
    assert halved == [scale / 2 for scale in scales]
    assert any(not torch.equal(a, b) for a, b in zip(after, later, strict=True))


# ---------------------------------------------------------------------------------------------
# Options, and shares of batches


def test_sync_bn_refuses_a_batchnorm_of_another_kind():
    with pytest.raises(InputError, match="--sync_bn is for BatchNorm1d and BatchNorm2d, not"):
        synchronise(torch.nn.Sequential(torch.nn.BatchNorm3d(3)))


def test_sync_bn_is_not_compiled():
    options = argparse.Namespace(sync_bn=True, compile=True)
    with pytest.raises(InputError, match="--sync_bn and --compile exclude each other"):
        DataParallelStrategy.divide(None, options, {}, CPU)


@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_shares_put_together_are_the_batches_of_one_process(number, skip):
    batches = list(make_batches().epoch(2, skip))
    parts = [make_batches((rank, number)).epoch(2, skip) for rank in range(number)]
    for expected, *shares in zip(batches, *parts, strict=True):
        images, targets = (torch.cat(x) for x in zip(*shares, strict=True))
        assert_equal((images, targets), expected)
        sizes = [len(x) for x in targets.tensor_split(number)]
        assert [len(targets) for _, targets in shares] == sizes
        assert share_sizes(len(targets), number) == sizes


@pytest.mark.parametrize("samples, batch, number", [(13, 6, 2), (15, 6, 4), (2, 6, 3), (12, 2, 3)])
def test_a_batch_with_fewer_samples_than_ranks_is_refused(samples, batch, number):
    fewest = samples % batch or batch
    with pytest.raises(InputError, match=f"a batch of {fewest} to {number} processes") as error:
        make_batches((0, number), samples, batch)
    assert "\n" not in str(error.value)
