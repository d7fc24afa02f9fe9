"""Data parallel steps in real groups of processes, against those of one process.

One group of 2 and one of 3 go through all cases, each but once, and leave what they came to; the
tests look at that.
"""

import itertools
import os
import time
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import losses
from configs import DATASETS, InputError
from dataloaders import Batches, Split, share_sizes
from engine.step import Totals, make_optimizers, train_step
from models import build_network
from parallel.data_parallel import Replicas

CPU = torch.device("cpu")
SIZE, BATCH, SAMPLES, LR = 8, 7, 18, 0.1  # batches of 7 and 4, of which 2 and 3 have uneven parts
NUMBERS = [2, 3]
DECODER = {"h_reconstruct": True, "loss_scale": (2, 1, 0.5, 1)}
CONTRAST = {"local_loss_mode": "contrast"}
SYNCED = {
    "R0": {"context_mode": "R0"},
    "end to end": {"local_module_num": 1},
    "E": {"context_mode": "E"},
    "E, plain encoder": {"context_mode": "E", "context_group": 0},
    "E, groups of 16": {"context_mode": "E", "context_group": 16},
    "R2, decoder, plain encoder": {"context_mode": "R2", "context_group": 0} | DECODER,
    "R2, contrast": {"context_mode": "R2"} | CONTRAST,
    "R1E, recompute": {"context_mode": "R1E", "recompute": True},
    "R1E, all, plain encoder": {"context_mode": "R1E", "context_group": 0, "recompute": True}
    | CONTRAST
    | DECODER,
    "R1E, all": {"context_mode": "R1E", "recompute": True} | CONTRAST | DECODER,
}
OWN_STATISTICS = {
    "own: R1E": {"context_mode": "R1E"},
    "own: E, contrast": {"context_mode": "E"} | CONTRAST | DECODER,
    "own: compiled": {"context_mode": "E", "recompute": True} | CONTRAST | DECODER,
}
CASES = SYNCED | OWN_STATISTICS


def replicated(network, sync_bn):
    """A way to split the work, which the network is made ready for."""
    replicas = Replicas(sync_bn=sync_bn)
    replicas.ready(network)
    return replicas


def shared(replicas, batches, epoch):
    """This rank's parts of an epoch's batches, each announced."""
    replicas.begin(batches.sizes())
    for batch in batches.epoch(epoch):
        replicas.next()
        yield batch


def cases_of(number):
    """Those that a group of so many goes through; compiling takes some seconds."""
    return [name for name in CASES if number == 2 or "compiled" not in name]


def each(names):
    """Parametrizes a test by the size of a group and those of its cases that are in `names`."""
    both = [(n, name) for n in NUMBERS for name in cases_of(n) if name in names]
    return pytest.mark.parametrize("number, name", both)


# ---------------------------------------------------------------------------------------------
# What runs, in a group or alone


def make_network(seed=0, **options):
    torch.manual_seed(seed)
    # Groups of 5 channels leave a smaller last one.
    defaults = {"layers": 8, "local_module_num": 3, "image_size": SIZE, "context_group": 5}
    return build_network(**defaults | options).double()


def make_batches(share=(0, 1), samples=SAMPLES, batch=BATCH, **options):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (samples, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    targets = torch.randint(3, (samples,), generator=generator)
    options = {"augment": True, "shuffle": True, "share": share} | options
    return Batches(Split(images, targets), DATASETS["cifar10"], batch, CPU, **options)


def train(network, batches, take=train_step):
    """An epoch; the losses and wrong answers, summed, and all that the network has become."""
    optimizers, totals = make_optimizers(network.train()), Totals(network, CPU)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = LR
    for images, targets in batches(1):
        with network.eagerly() if len(targets) < totals.full else nullcontext():
            for _ in take(network, optimizers, images.double(), targets, totals):
                pass
    return end_of(network, optimizers) | {"totals": totals.state()}


def end_of(network, optimizers):
    momentum = [s["momentum_buffer"] for o in optimizers for s in o.state.values()]
    weights = {name: p.detach() for name, p in network.named_parameters()}
    return {"weights": weights, "buffers": copied_buffers(network), "momentum": momentum}


def copied_buffers(network):
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


@torch.no_grad()
def logits(network):
    """Of one batch, evaluated whole."""
    images, _ = next(make_batches().epoch(3))
    return network.eval()(images.double())


def train_replicas(name, rank, number):
    """What a rank comes to in a case. It starts from other weights: it gets those of rank 0."""
    network = make_network(seed=rank, **CASES[name])
    names = list(network.state_dict())
    if "compiled" in name:
        network.compile_steps("aot_eager")
    replicas = replicated(network, name in SYNCED)
    batches = make_batches(share=(rank, number))
    logits(network)  # an evaluation may come before the first step
    end = train(network, lambda epoch: shared(replicas, batches, epoch))
    assert list(network.state_dict()) == names
    replicas.end()
    return end | {"shared buffers": copied_buffers(network), "logits": logits(network)}


def train_with_an_overflow(rank, number):
    """One rank has images that float16 does not hold: weights and scales before and after."""
    network = make_network(context_mode="E", amp="fp16").float()
    replicas = replicated(network, False)
    optimizers = make_optimizers(network.train())
    ends = []
    for step, (images, targets) in enumerate(shared(replicas, make_batches((rank, number)), 1)):
        if step == 1 and rank == 1:
            images[0] = 1e6
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = LR
        for _ in train_step(network, optimizers, images, targets, Totals(network, CPU)):
            pass
        weights = [p.detach().clone() for p in network.parameters()]
        ends.append((weights, [o.scaler.get_scale() for o in optimizers]))
    return ends


def train_in_bf16(rank, number):
    """The largest difference to one process with the whole batch, and the dtype of statistics."""
    options = {"context_mode": "E", "amp": "bf16", "recompute": True} | DECODER
    ends = []
    for share in ((0, 1), (rank, number)):
        network = make_network(**options).float()
        batches = make_batches(share)
        epoch = batches.epoch
        if share[1] > 1:
            replicas = replicated(network, True)
            epoch = lambda i: shared(replicas, batches, i)  # noqa: B023, E731
        optimizers = make_optimizers(network.train())
        for images, targets in epoch(1):
            for _ in train_step(network, optimizers, images, targets, Totals(network, CPU)):
                pass
        ends.append(network.state_dict())
    return ends


def refusals(rank, number):
    """What is said to --compile with --sync_bn, and to a batch that is no share."""
    said = []
    network = make_network()
    network.compile_steps("aot_eager")
    with pytest.raises(InputError) as error:
        replicated(network, True)
    said.append(str(error.value))
    network = make_network()
    replicated(network, False)
    images, targets = next(make_batches((rank, number)).epoch(1))
    with pytest.raises(ValueError) as error:
        network.local_step(images.double(), targets)
    return [*said, str(error.value)]


def work(rank, number, folder):
    """A process of a group: all cases."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=number,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    ends = {name: train_replicas(name, rank, number) for name in cases_of(number)}
    ends["overflow"] = train_with_an_overflow(rank, number)
    ends["bf16"] = train_in_bf16(rank, number)
    ends["refusals"] = refusals(rank, number)
    torch.save(ends, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_group(number, folder):
    """What each rank of a group comes to: case -> [of rank 0, of rank 1, ...]."""
    processes = multiprocessing.spawn(work, (number, folder), nprocs=number, join=False)
    deadline = time.monotonic() + 240
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail("the group did not end")
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(number)]
    return {name: [ends[name] for ends in ranks] for name in ranks[0]}


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """What both groups came to, by their size."""
    return {number: run_group(number, tmp_path_factory.mktemp("group")) for number in NUMBERS}


ALONE = {}


def alone(name):
    """What one process comes to with the whole batches."""
    if name not in ALONE:
        network = make_network(**CASES[name])
        ALONE[name] = train(network, make_batches().epoch) | {"logits": logits(network)}
    return ALONE[name]


def assert_same(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 1e-2)


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------
# Steps


@each(SYNCED)
def test_with_sync_bn_it_is_the_training_of_one_process(groups, number, name):
    expected, ranks = alone(name), groups[number][name]
    for end in ranks:
        for part in ("weights", "buffers", "momentum", "logits"):
            assert_same(end[part], expected[part])


@each(CASES)
def test_ranks_have_the_same_bits(groups, number, name):
    first, *others = groups[number][name]
    for part in (
        "weights",
        "momentum",
        "shared buffers",
        "logits",
        *["buffers"] * (name in SYNCED),
    ):
        for other in others:
            assert_equal(other[part], first[part])
    assert_equal(first["shared buffers"], first["buffers"])


@each(SYNCED)
def test_sums_over_the_ranks_are_those_of_one_process(groups, number, name):
    expected, ranks = alone(name)["totals"], [end["totals"] for end in groups[number][name]]
    for part in ("losses", "wrong"):
        assert_same(sum(totals[part] for totals in ranks), expected[part])
    assert sum(totals["samples"] for totals in ranks) == expected["samples"] == SAMPLES
    assert all(totals["steps"] == expected["steps"] for totals in ranks)


def step_by_parts(number):
    """A step of one process in which BatchNorm takes the statistics of each part apart.

    Losses are of the whole batch; running statistics are those of the first part.
    """

    def take(network, optimizers, images, targets, totals):
        outputs, decoded, buffers = {}, {}, []
        for part in images.tensor_split(number):
            for module, h_out in network.features(part):
                outputs.setdefault(module, []).append(module.head(h_out))
                if module.decoder:
                    image = module.decoder(h_out, part.shape[-2:])
                    decoded.setdefault(module, []).append(image)
            buffers = buffers or [buffer.clone() for buffer in network.buffers()]
        for module, optimizer in zip(network.held, optimizers, strict=True):
            rebuilt = None
            if module in decoded:
                rebuilt = losses.reconstruction(torch.cat(decoded[module]), network.pixels(images))
            task = module.task.function(torch.cat(outputs[module]), targets)
            module.weighed(task, rebuilt).backward()
            optimizer.step_and_free()
            yield module
        for buffer, of_first in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(of_first)

    return take


@each(OWN_STATISTICS)
def test_without_sync_bn_statistics_are_of_a_part_and_gradients_of_the_batch(groups, number, name):
    ranks = groups[number][name]
    network = make_network(**CASES[name] | {"recompute": False})
    expected = train(network, make_batches().epoch, step_by_parts(len(ranks)))
    for end in ranks:
        for part in ("weights", "momentum"):
            assert_same(end[part], expected[part])
    assert_same(ranks[0]["buffers"], expected["buffers"])
    for one, other in itertools.pairwise(ranks):
        different = [not torch.equal(b, other["buffers"][n]) for n, b in one["buffers"].items()]
        assert sum(different) == sum("running" in n for n in one["buffers"])


@each(OWN_STATISTICS)
def test_without_sync_bn_it_is_other_training(groups, number, name):
    expected, weights = alone(name)["weights"], groups[number][name][0]["weights"]
    distances = [(weights[n] - w).abs().max() for n, w in expected.items()]
    assert max(distances) > 1e-3


@pytest.mark.parametrize("number", NUMBERS)
def test_all_ranks_leave_out_a_step_that_overflowed_on_one(groups, number):
    first, *others = groups[number]["overflow"]
    for end in others:
        assert_equal(end, first)
    (before, scales), (after, halved), (later, _) = first
    assert_equal(after, before)
    assert halved == [scale / 2 for scale in scales]
    assert any(not torch.equal(a, b) for a, b in zip(after, later, strict=True))


@pytest.mark.parametrize("number", NUMBERS)
def test_in_bfloat16_statistics_are_float32_and_near_those_of_one_process(groups, number):
    for expected, actual in groups[number]["bf16"]:
        assert all(v.dtype in (torch.float32, torch.int64) for v in actual.values())
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
    first, *others = (end for _, end in groups[number]["bf16"])
    for other in others:
        assert_equal(other, first)


@pytest.mark.parametrize("number", NUMBERS)
def test_what_does_not_go_is_said(groups, number):
    for compiled, foreign in groups[number]["refusals"]:
        assert compiled == "--sync_bn and --compile exclude each other: leave one of them out"
        assert foreign.endswith("samples, not 0: say with Replicas.begin and .next what comes")


# ---------------------------------------------------------------------------------------------
# Shares of batches


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_shares_put_together_are_the_batches_of_one_process(number, skip, on_device):
    options = {"on_device": on_device, "channels_last": on_device}
    whole = list(make_batches(**options).epoch(2, skip))
    parts = [make_batches((rank, number), **options) for rank in range(number)]
    for expected, *shares in zip(whole, *(p.epoch(2, skip) for p in parts), strict=True):
        images, targets = (torch.cat(x) for x in zip(*shares, strict=True))
        assert_equal((images, targets), expected)
        sizes = [len(x) for x in expected[1].tensor_split(number)]
        assert [len(targets) for _, targets in shares] == sizes
    for rank, part in enumerate(parts):
        own = [share_sizes(size, number)[rank] for size in part.sizes()]
        assert [len(targets) for _, targets in part.epoch(2, skip)] == own[skip:]
        assert len(part) == 3
        assert part.sizes() == [7, 7, 4]
        assert_equal(part.spread(5), make_batches().spread(5))


def test_a_rank_makes_its_own_samples_alone(monkeypatch):
    made = []
    finished = Batches._finished

    def counting(self, sample, corners, flips):
        made.append((len(sample[0]), len(corners), len(flips)))
        return finished(self, sample, corners, flips)

    monkeypatch.setattr(Batches, "_finished", counting)
    assert len(list(make_batches((1, 2)).epoch(1))) == 3
    assert made == [(3, 3, 3), (3, 3, 3), (2, 2, 2)]


@pytest.mark.parametrize("samples, batch, number", [(13, 6, 2), (15, 6, 4), (2, 6, 3), (12, 2, 3)])
def test_a_batch_with_fewer_samples_than_ranks_is_refused(samples, batch, number):
    with pytest.raises(InputError) as error:
        make_batches((0, number), samples, batch)
    message = str(error.value)
    assert "\n" not in message
    fewest = samples % batch or batch
    assert f"a batch of {fewest} to {number} processes" in message


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_share_sizes_are_those_of_tensor_split(size, number):
    parts = torch.arange(size).tensor_split(number)
    assert share_sizes(size, number) == [len(part) for part in parts]
