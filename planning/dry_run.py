"""`--dry_run`, and the choice of cuts by predicted memory that a run begins with."""

import argparse
import json
from dataclasses import asdict
from typing import Any

import torch

from configs import DATASETS
from dataloaders import check_image_size, count_classes
from engine.console import GIB, headline, note, readable
from engine.options import NETWORK_OPTIONS
from engine.run_folder import RunFolder
from engine.run_name import run_folder
from planning.partition import fewest_modules, smallest_peak
from planning.plan import make_plan, print_plan


def choose_network(options: argparse.Namespace) -> tuple[dict[str, Any], int | None]:
    """Return the arguments of `build_network`, and the predicted peak where cuts are chosen by it.

    The cuts that --partition auto and --memory_budget ask for are chosen here, unless the options
    have cuts already, and put into the options. The peak is in bytes, else None.

    Raises InputError if something does not fit.
    """
    arguments = {name: getattr(options, name) for name in NETWORK_OPTIONS}
    arguments["num_classes"] = DATASETS[options.dataset].classes or count_classes(
        options.data_dir, "test" if options.evaluate else "train"
    )
    check_image_size(options.dataset, options.image_size)
    by_memory = options.memory_budget or options.partition == "auto"
    if options.cuts is not None or not by_memory:
        return arguments, None
    if options.memory_budget:
        budget = int(options.memory_budget * GIB)
        _note_if_above_free(budget, options.device)
        found = fewest_modules(arguments, options.batch_size, options.partition, budget)
    else:
        found = smallest_peak(arguments, options.batch_size)
    options.local_module_num = arguments["local_module_num"] = len(found.cuts) + 1
    options.cuts = arguments["cuts"] = found.cuts
    return arguments, found.peak


def _note_if_above_free(budget: int, device: str) -> None:
    """Print a note on stderr if a CUDA device has fewer bytes free than the budget."""
    if device == "cpu" or not torch.cuda.is_available():
        return
    index = 0 if device == "auto" else torch.device(device).index or 0
    if index >= torch.cuda.device_count():  # a plan for another machine
        return
    free, _ = torch.cuda.mem_get_info(index)
    if free < budget:
        note(f"the budget of {readable(budget)} is above the {readable(free)} that the device has "
             "free")  # fmt: skip


def dry_run(options: argparse.Namespace) -> None:
    """Print what a training step would take; with --save_plan, keep it in the run folder."""
    if options.save_plan and not options.json:
        folder = RunFolder(run_folder(options), options)
        if folder.is_planned(in_parallel=bool(options.parallel)):
            print(f"{folder.plan} is there already")
            return
    arguments, _ = choose_network(options)
    plan = make_plan(arguments, options.batch_size)
    contents, parallel = asdict(plan), None
    if options.parallel:
        from planning.pipeline_plan import make_parallel_plan, print_parallel_plan

        parallel = make_parallel_plan(options, plan, arguments)
        contents["parallel"] = asdict(parallel)
    if options.save_plan:
        RunFolder(run_folder(options), options).add_plan(contents)
    if options.json:
        print(json.dumps(contents))
        return
    precision = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}[options.amp]
    print(f"{headline(options)}; a step of {options.batch_size} samples in {precision}")
    if parallel is not None:
        print_parallel_plan(parallel)
    else:
        print_plan(plan)
