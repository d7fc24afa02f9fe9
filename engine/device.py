"""The device, its process-wide settings, and how a network moves to it."""

import argparse
import logging
import os

import torch

from configs import InputError
from engine.memory import keep_freed_memory
from models import ContSupNetwork


def choose_device(name: str) -> torch.device:
    """Return the device of `--device`; raise InputError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}, but PyTorch sees {torch.cuda.device_count()} CUDA devices here: "
            "use --device cpu or auto"
        )
    return device


def device_name(device: torch.device) -> str:
    """Return `cpu`, or a CUDA device with its model."""
    if device.type == "cpu":
        return "cpu"
    return f"{device} ({torch.cuda.get_device_name(device)})"


def configure_backends(device: torch.device, options: argparse.Namespace) -> None:
    """Apply `--deterministic`, `--cudnn_benchmark`, `--tf32` and `--keep_heap` to the process.

    Without `--tf32` float32 is float32 everywhere; PyTorch's own default is TF32 in convs. With
    `--deterministic` an operation without a deterministic algorithm raises RuntimeError.
    """
    torch.use_deterministic_algorithms(options.deterministic)
    if options.deterministic:
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        if device.type == "cpu":  # a sum's bits depend on how many threads share it
            torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    torch.backends.cudnn.allow_tf32 = options.tf32
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    if options.keep_heap and device.type == "cpu":
        keep_freed_memory()


def move_to_device(
    network: ContSupNetwork, device: torch.device, *, channels_last: bool, compiled: bool
) -> ContSupNetwork:
    """Move the network's stage, with conv weights in the format of the images; compile if asked."""
    for module in network.stage:
        module.to(device=device, memory_format=memory_format(channels_last))
    if compiled:
        if device.type == "cpu":  # where the compiler looks for CUDA, and warns that it is missing
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        network.compile_steps()
    return network


def wait_for(device: torch.device) -> None:
    """Return when the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return the format of images, conv weights and features."""
    return torch.channels_last if channels_last else torch.contiguous_format
