"""The table of methods: errors, memory, FLOPs and speed of each, without and with the image."""

import math
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from configs import DATASETS, METHODS, InputError
from engine.options import NETWORK_OPTIONS
from models import build_network
from models.torch_internals import FakeTensorMode
from planning.equal_flops import equal_flops_layers
from planning.plan import fake_batch, inference_flops, step_flops
from report.results import END_TO_END, KIND_OPTIONS, SETUP, method_kind
from report.tables import STATISTICS, cell_texts, markdown

LAYERS = 32
"""Depth of the nets that are compared."""

MEASURES = {
    "train_flops_per_sample": ("Training FLOPs/sample, 10^6", 1e-6),
    "inference_flops_per_sample": ("Inference FLOPs/sample, 10^6", 1e-6),
    "samples_per_second": ("Samples/s in training", 1),
}
"""Columns, with the caption and the factor that they have in Markdown."""

PUBLISHED = "published, %: "
"""Begins the names of columns of published errors."""

HOW = (
    "FLOPs are counted when the report is made: planning/plan.py runs the training step and the "
    "inference of a net on tensors without data, with the options and the batch size of the run. "
    "They are those of convolutions and matrix products; what the backward computes again counts. "
    "Samples/s are what the runs measured in training, each on its machine: the median over "
    "epochs, and of that the mean over seeds.\n\n"
    "A deeper net is a control: it has no context, and the least depth whose inference takes the "
    "FLOPs of E. A published error is shown only beside runs with the same data, net, K, method, "
    "epochs and other options; InfoPro's loss weights are taken to be the rows of ContSup's paper. "
    "The head of its column names source and schedule; in brackets is the name that the source "
    "gives to the method."
)


def method_cells(runs: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Return the cells of METHODS in order, given what `read_runs` and `over_seeds` return.

    The column `method` has names of methods. There are columns for `MEASURES`, and one for each
    source of published errors that has an error of these cells. A setting and K with one method
    are left out: other tables have them.
    """
    setups = runs.groupby(SETUP, sort=False)
    cells = cells.join(setups[["config", "parameters"]].first(), on=SETUP)
    cells["method"] = [method_name(cell) for cell in cells.to_dict("records")]
    cells = cells.dropna(subset="method")
    is_end_to_end = cells["mode"] == END_TO_END
    several = cells.groupby(["setting", "K"]).method.transform("nunique") > 1
    cells = cells[several | (is_end_to_end & cells.setting.isin(cells.setting[several]))]
    names = ["R0", "E", END_TO_END, *METHODS]
    place = {label: names.index(label.split(",")[0]) for label in [*names, *cells.method]}
    place |= {setting: index for index, setting in enumerate(cells.setting.unique())}
    cells = cells.sort_values(
        ["setting", "K", "method", "layers", "mode"],
        key=lambda column: column.map(lambda value: place.get(value, value)),
    )
    flops = [count_flops(cell) for cell in cells.to_dict("records")]
    cells["train_flops_per_sample"] = [train for train, _ in flops]
    cells["inference_flops_per_sample"] = [inference for _, inference in flops]
    speeds = runs.assign(speed=runs.metrics.map(median_speed)).groupby(SETUP).speed.mean()
    cells = cells.join(speeds.rename("samples_per_second"), on=SETUP)
    return add_published(cells)


def method_name(cell: dict[str, Any]) -> str | None:
    """Return the name in METHODS that a cell's options are those of, with the control's depth."""
    if cell["mode"] == END_TO_END and cell["layers"] == LAYERS:
        return END_TO_END
    if cell["mode"] not in ("R0", "E"):
        return None
    if cell["layers"] == LAYERS:
        plain = {option: value for option, value in cell["config"].items()
                 if option not in KIND_OPTIONS} | {"h_reconstruct": False}  # fmt: skip
        softmax = {"local_loss_mode": "cross_entropy"}
        kinds = {method_kind(plain | preset | softmax): name for name, preset in METHODS.items()}
        return kinds.get(cell["kind"])
    is_deeper = (cell["mode"], cell["kind"]) == ("R0", "softmax") and cell["layers"] > LAYERS
    try:
        is_control = is_deeper and cell["layers"] == equal_flops_layers(
            network_arguments(cell) | {"layers": LAYERS, "context_mode": "E"}
        )
    except (InputError, KeyError):
        return None
    return f"contsup, ResNet-{cell['layers']}" if is_control else None


def network_arguments(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `build_network` of a cell's runs.

    Raises KeyError if they are not known.
    """
    config = cell["config"]
    arguments = {name: config[name] for name in NETWORK_OPTIONS if name in config}
    classes = DATASETS[config["dataset"]].classes
    if classes is None:  # the images decided it, and each class has parameters in the real head
        with FakeTensorMode():
            ten, eleven = (
                build_network(**arguments, num_classes=n).parameter_counts()["backbone"]
                for n in (10, 11)
            )
        classes = 10 + (cell["parameters"]["backbone"] - ten) // (eleven - ten)
    return arguments | {"num_classes": classes}


def count_flops(cell: dict[str, Any]) -> tuple[float, float]:
    """Return the FLOPs a sample of a training step and of inference, NaN if they are not known."""
    try:
        arguments, batch_size = network_arguments(cell), cell["config"]["batch_size"]
        with FakeTensorMode():
            network = build_network(**arguments)
            images, targets = fake_batch(arguments, batch_size)
            train = sum(step_flops(network, images, targets)) // batch_size
            return train, sum(inference_flops(network, images[:1]).values())
    except (InputError, KeyError):  # a value that was removed since, or added by a script
        return math.nan, math.nan


def median_speed(metrics: list[dict[str, Any]]) -> float:
    """Return the median of the epochs' samples a second, NaN for a plan."""
    speeds = [m["samples_per_second"] for m in metrics if "samples_per_second" in m]
    return median(speeds) if speeds else math.nan


def add_published(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the cells with a column, of texts, for each source of errors of these cells."""
    path = Path(__file__).with_name("published.csv")
    published = pd.read_csv(path, dtype={"mean": str, "std": str}, keep_default_na=False)
    keys = [name for name in SETUP if name != "dataset"]  # which `setting` begins with
    for (source, epochs), rows in published.groupby(["source", "epochs"], sort=False):
        texts = (rows["mean"] + " ± " + rows["std"]).str.removesuffix(" ± ")
        texts += " (" + rows["name"] + ")"
        texts.index = pd.MultiIndex.from_frame(rows[keys])
        texts = texts.rename(f"{PUBLISHED}{source}, {epochs} epochs")
        joined = cells.join(texts, on=keys)
        if joined[texts.name].notna().any():
            cells = joined
    return cells


def csv_columns(cells: pd.DataFrame) -> list[str]:
    """Return the columns that the CSV of these cells has beside those of other tables."""
    return ["mode", *MEASURES, *(name for name in cells if name.startswith(PUBLISHED))]


def methods_markdown(cells: pd.DataFrame) -> str:
    """Return the file of the table, with a section for each setting."""
    parts = [f"# Methods, ResNet-{LAYERS}", STATISTICS, HOW]
    for setting, group in cells.groupby("setting", sort=False):
        texts, footnotes = cell_texts(group)
        texts.insert(2, "mode", group["mode"].replace(END_TO_END, "-"))
        for name, (caption, factor) in MEASURES.items():
            texts[caption] = [f"{x * factor:,.0f}" if x >= 0 else "-" for x in group[name]]
        published = group.filter(like=PUBLISHED).dropna(axis=1, how="all").fillna("-")
        parts += [f"## {setting}", markdown(texts.join(published)), footnotes]
    return "\n\n".join(parts) + "\n"
