"""Chosen cuts against all cuts, each metered as a network."""

import json
from functools import cache, partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from cli import main
from torch._subclasses.fake_tensor import FakeTensorMode

from configs import BALANCED_CUTS, InputError, choose_cuts, unit_names
from engine import options
from engine.checkpoint import read_checkpoint
from engine.console import readable
from engine.run_name import run_name
from models import build_network
from models.context import ContextMode, Contexts
from planning import dry_run
from planning.partition import Costs, Search, fewest_modules, metered_peak, smallest_peak
from planning.plan import fake_batch, step_peaks

BATCH = 512
NETWORK = {
    name: getattr(options.fill_in(options.build_parser().parse_args([])), name)
    for name in options.NETWORK_OPTIONS
} | {"dataset": "cifar10", "local_loss_mode": "cross_entropy", "context_mode": "R0"}
RUNS = [
    {"context_mode": "R0"},
    {"context_mode": "R2", "recompute": True},
    {"context_mode": "E", "h_reconstruct": True, "loss_scale": (1, 1, 1, 1)},
    {"context_mode": "R1E", "context_group": 0},
]


def arguments_of(run, layers=14, K=3):
    return NETWORK | {"layers": layers, "local_module_num": K} | dict(run)


@cache
def all_peaks(number, K):
    """Return the metered peak of all cuts of a ResNet-14 into K modules."""
    arguments = arguments_of(RUNS[number], K=K)
    return {
        cuts: metered_peak(arguments, BATCH, list(cuts))
        for cuts in combinations(unit_names(14)[:-1], K - 1)
    }


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("number", "K"), [(0, 2), slow(1, 2), slow(1, 3), (2, 2), slow(3, 2), slow(3, 3)]
)
def test_peaks_and_choice_of_auto_against_all_cuts(number, K):
    """The choice to 0.1 %: the search leaves out that heads of some stages have more weights."""
    costs, peaks = Costs(arguments_of(RUNS[number]), BATCH), all_peaks(number, K)
    for cuts, peak in peaks.items():
        assert max(costs.peaks(costs.ends(cuts))) == pytest.approx(peak, rel=0.002)
    found = smallest_peak(arguments_of(RUNS[number], K=K), BATCH)
    assert found.peak == peaks[tuple(found.cuts)]
    assert found.peak <= 1.001 * min(peaks.values())


@pytest.mark.parametrize(
    "run",
    [
        {"context_mode": "E", "aux_net_feature_dim": 1024, "aux_net_widen": 4.0},
        {"context_mode": "R1E", "h_reconstruct": True, "loss_scale": (1, 1, 1, 1)},
        {"context_mode": "R2", "recompute": True, "num_classes": 5000},
    ],
    ids=str,
)
def test_the_sum_is_right_module_by_module_where_weights_outweigh_features(run):
    arguments = arguments_of(run | {"image_size": 8, "aux_net_config": "0c2f"}, K=4)
    cuts = [(1, 0), (2, 0), (3, 0)]
    with FakeTensorMode():
        network = build_network(**arguments | {"cuts": cuts})
        metered = step_peaks(network, *fake_batch(arguments, 3))
    costs = Costs(arguments, 3)
    assert costs.peaks(costs.ends(cuts)) == pytest.approx(metered, rel=0.01)


def test_modules_are_as_even_as_the_peak_lets_them_be():
    """Here everything is allowed."""
    costs = Costs(arguments_of({"context_mode": "E"}, layers=32), BATCH)
    costs.search.peaks[:] = 2**40
    ends = costs.search.ends(4)
    kept = [costs.saved[e] - costs.saved[s] for s, e in zip([0, *ends[:-1]], ends, strict=True)]
    assert max(kept) < 1.3 * sum(kept) / 4


class FakeCosts:
    """What Search asks of Costs, for units of any size; module peaks depend on the context."""

    def __init__(self, sizes):
        self.names, self.shapes = sizes, [(size, 1) for size in sizes]
        self.mode, self.image = ContextMode.parse("R1"), (3, 32)
        self.saved = np.concatenate([[0], np.cumsum(sizes)])

    def modules_from(self, start, window):
        context = sum(channels for channels, _ in window.named().values()) if start else 0
        return np.cumsum(self.names[start:]) + context, None

    def peak(self, ends):
        window, start, peaks = Contexts(self.mode, self.image), 0, []
        for end in ends:
            peaks.append(self.modules_from(start, window)[0][end - start - 1])
            if start:
                window.push(self.shapes[start - 1])
            start = end
        return max(peaks)


def test_the_search_finds_the_best_of_all():
    draw = np.random.default_rng(0)
    for _ in range(20):
        costs = FakeCosts(draw.integers(1, 50, 7))
        search = Search(costs)
        for count in range(1, 8):
            least = min(costs.peak([*cuts, 7]) for cuts in combinations(range(1, 7), count - 1))
            assert search.peaks[count] == least == costs.peak(search.ends(count))


@pytest.mark.parametrize(("K", "cuts"), [
    (2, [(1, 3)]),
    (4, [(1, 1), (1, 3), (2, 1)]),
    slow(8, [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 4)]),
])  # fmt: skip
def test_auto_is_no_worse_than_published_cuts(K, cuts):
    """ResNet-32's cuts are those in the documentation."""
    arguments = arguments_of({"context_mode": "E"}, layers=32, K=K)
    found = smallest_peak(arguments, 1024)
    assert found.cuts == cuts
    for listed in (choose_cuts(32, K, "cifar10"), BALANCED_CUTS[32, "cifar10", K]):
        assert found.peak <= metered_peak(arguments, 1024, listed)


def test_equal_cuts_win_where_none_are_better():
    arguments = arguments_of({}, layers=8, K=4)
    assert smallest_peak(arguments, BATCH).cuts == choose_cuts(8, 4, "cifar10")


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3])
def test_budget_takes_the_fewest_modules(number):
    arguments = arguments_of(RUNS[number])
    recent = int(number == 1) + 1  # of R2 and R1E, and no fewer modules
    least = {K: min(all_peaks(number, K).values()) for K in (2, 3)}
    least[1] = metered_peak(arguments | {"context_mode": "R0"}, BATCH, [])
    for budget in (1.01 * least[2], 1.01 * least[3], 0.99 * least[2], 2 * least[1]):
        fitting = [K for K in least if least[K] <= budget and recent <= K]
        if fitting:
            found = fewest_modules(arguments, BATCH, "auto", int(budget))
            assert len(found.cuts) + 1 == min(fitting)
            assert found.peak <= budget


def test_budget_with_equal_cuts():
    arguments = arguments_of({"context_mode": "E"})
    peaks = {K: metered_peak(arguments, BATCH, choose_cuts(14, K, "cifar10")) for K in range(1, 8)}
    for budget in set(peaks.values()):
        K = min(k for k in peaks if peaks[k] <= budget)
        found = fewest_modules(arguments, BATCH, "equal", budget)
        assert found == (choose_cuts(14, K, "cifar10"), peaks[K])


def test_budget_keeps_to_what_a_mode_and_the_loss_scales_allow():
    plenty = 2**40
    assert len(fewest_modules(arguments_of({"context_mode": "R3"}), 8, "auto", plenty).cuts) == 2
    with_decoder = arguments_of({"h_reconstruct": True}, layers=32)
    of_3 = metered_peak(with_decoder | {"loss_scale": (1, 1, 1, 1)}, 8, [(1, 1), (2, 0)])
    found = fewest_modules(with_decoder, 8, "auto", of_3)
    assert len(found.cuts) + 1 == 4  # no scales are published for 3


@pytest.mark.parametrize("recompute", [False, True])
def test_where_nothing_fits_the_smallest_peak_is_named(recompute):
    arguments = arguments_of({"context_mode": "E", "recompute": recompute}, layers=8)
    least, modules = min(
        (metered_peak(arguments, BATCH, list(cuts)), K)
        for K in range(1, 5)
        for cuts in combinations(unit_names(8)[:-1], K - 1)
    )
    with pytest.raises(InputError) as error:
        fewest_modules(arguments, BATCH, "auto", least // 3)
    advice = "take a smaller --batch_size" + " or --recompute" * (not recompute)
    found = f"the smallest peak found is {readable(least)}, with {modules} modules; {advice}"
    assert str(error.value).endswith(found)


# From the command line

TINY = [
    "--dataset", "digits", "--limit_per_class", "2", "--layers", "8", "--batch_size", "16",
    "--local_loss_mode", "cross_entropy", "--context_mode", "R0",
    "--epochs", "1", "--device", "cpu", "--output_dir", "run",
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "cuts"),
    [
        (["--partition", "auto", "--local_module_num", "2"], [(1, 0)]),
        (["--memory_budget", "0.0085"], [(0, 0), (1, 0)]),
        (["--cuts", "0,0", "2,0"], [(0, 0), (2, 0)]),
        (["--memory_budget", "1"], []),
        (["--memory_budget", "1", "--train_modules", "1"], [(1, 0)]),
        (["--partition", "equal", "--local_module_num", "2"], None),
    ],
)
def test_a_run_keeps_its_cuts(monkeypatch, capsys, tmp_path, arguments, cuts):
    """A run that is continued has the cuts that it began with."""
    monkeypatch.chdir(tmp_path)
    status, out, err = main(monkeypatch, capsys, *TINY, *arguments)
    assert (status, err) == (0, [])
    kept = read_checkpoint("run/checkpoint.pt").options
    assert kept["cuts"] == cuts
    assert json.loads(Path("run/config.json").read_text())["partition"] == kept["partition"]
    monkeypatch.setattr(dry_run, "smallest_peak", None)
    monkeypatch.setattr(dry_run, "fewest_modules", None)
    again = ["--resume", "run/checkpoint.pt", "--epochs", "2", "--output_dir", "longer"]
    status, longer, err = main(monkeypatch, capsys, *again)
    assert (status, err) == (0, [])
    assert longer[1] == out[1]
    assert main(monkeypatch, capsys, "--evaluate", "longer/checkpoint.pt")[0] == 0
    for other in (["--balanced_memory"], ["--memory_budget", "2"], ["--partition", "balanced"]):
        status, _, err = main(monkeypatch, capsys, *again, *other)
        assert (status, len(err)) == (2, 1)
        assert f"leave {other[0]} out" in err[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory_budget", "1", "--local_module_num", "2"], "exclude each other"),
        (["--cuts", "1,0", "--partition", "auto"], "--cuts and --partition"),
        (["--cuts", "1,0", "--memory_budget", "1"], "--cuts and --memory_budget"),
        (["--balanced_memory", "--partition", "auto"], "is not --partition auto"),
        (["--json"], "is for --dry_run: give that"),
        (["--dry_run", "--evaluate", "a.pt"], "exclude each other"),
        (["--cuts", "1.0"], "no STAGE,BLOCK"),
        (["--cuts", "3,0"], "not after [3, 0]"),
        (["--cuts", "2,0", "1,0"], "front to back"),
        (["--cuts", "1,0", "--local_module_num", "3"], "2 cuts between them"),
        (["--partition", "balanced", "--local_module_num", "2"], "no balanced cuts are published"),
        (["--memory_budget", "0.0001"], "take a smaller --batch_size"),
        (["--partition", "auto", "--local_module_num", "5"], "has 4 units"),
        (["--memory_budget", "0"], "not a number above 0"),
        (["--memory_budget", "1", "--h_reconstruct", "--context_mode", "R2"], "are published for"),
        (["--memory_budget", "1", "--context_mode", "R9"], "asks for 9 module inputs"),
        (["--dry_run", "--image_size", "64"], "image_size is for folder"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = main(monkeypatch, capsys, *TINY, *arguments)
    assert (status, len(err)) == (2, 1), err
    assert message in err[0]
    assert not list(Path().iterdir())


def test_balanced_memory_is_partition_balanced():
    published = ["--dataset", "cifar10", "--local_module_num", "4"]
    read = [
        vars(options.read_options([*published, *how])[0])
        for how in (["--balanced_memory"], ["--partition", "balanced"])
    ]
    assert read[0] == read[1]
    network = build_network(**{name: read[0][name] for name in options.NETWORK_OPTIONS})
    cuts = [module.unit_names[-1] for module in network.local_modules[:-1]]
    assert cuts == BALANCED_CUTS[32, "cifar10", 4]


def test_budget_is_in_gib(monkeypatch, capsys):
    asked = []

    def refuse(arguments, batch_size, kind, budget):
        asked.append((batch_size, kind, budget))
        raise InputError("no")

    monkeypatch.setattr(dry_run, "fewest_modules", refuse)
    main(monkeypatch, capsys, *TINY, "--memory_budget", "1.5")
    main(monkeypatch, capsys, *TINY, "--memory_budget", "2", "--partition", "equal")
    assert asked == [(16, "auto", 3 * 2**29), (16, "equal", 2**31)]


def name_of(*arguments):
    return run_name(options.read_options(["--dataset", "cifar10", *arguments])[0])


def test_run_names_say_how_cuts_were_chosen():
    four = ["--local_module_num", "4"]
    equal = name_of(*four)
    assert name_of(*four, "--partition", "equal") == equal
    typed = [["--cuts", "1,0"], ["--cuts", "1,1"], ["--cuts", *(f"1,{b}" for b in range(5))]]
    names = [
        equal, name_of(*four, "--balanced_memory"), name_of(*four, "--partition", "auto"),
        name_of("--memory_budget", "1"), *(name_of(*cuts) for cuts in typed),
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert max(map(len, names)) < 100
