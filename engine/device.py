"""The device, process-wide switches for it, and how a network is made ready for both."""

import logging
import os
import time

import torch

from configs import InputError
from engine.memory import keep_heap
from models import ContSupNetwork


def choose_device(name: str) -> torch.device:
    """The device of `--device`; InputError if it is not there."""
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
    """`cpu`, or a CUDA device with its model."""
    if device.type == "cpu":
        return "cpu"
    return f"{device} ({torch.cuda.get_device_name(device)})"


def set_switches(
    device: torch.device,
    *,
    cudnn_benchmark: bool,
    tf32: bool,
    keeps_heap: bool,
    deterministic: bool = False,
) -> None:
    """What holds for the whole process: `--cudnn_benchmark`, `--tf32`, `--keep_heap` and
    `--deterministic`.

    Without `tf32` float32 is float32 everywhere; PyTorch's own default is TF32 in convs. What has
    no deterministic algorithm raises RuntimeError when it is `deterministic`.
    """
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it wakes
        if device.type == "cpu":  # sums are split among threads, so their number is in the bits
            torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = cudnn_benchmark
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    if keeps_heap and device.type == "cpu":
        keep_heap()


def ready(
    network: ContSupNetwork, device: torch.device, *, channels_last: bool, compiled: bool
) -> ContSupNetwork:
    """What the network holds on its device, its conv weights in the format of the images."""
    for module in network.stage:
        module.to(device=device, memory_format=memory_format(channels_last))
    if compiled:
        if device.type == "cpu":  # whose compiler looks for CUDA, and warns that there is none
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        network.compile_steps()
    return network


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_format(channels_last: bool) -> torch.memory_format:
    """Of images, conv weights and features."""
    return torch.channels_last if channels_last else torch.contiguous_format


def compile_errors() -> tuple[type[Exception], ...]:
    """What compiling raises: a graph break, no C++ compiler, ..."""
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


class CompileTime:
    """Seconds and number of compilations since it was made.

    Attributes:
        seconds: spent compiling; what is nested counts once.
        count: compilations, a forward and its backward apart.
    """

    def __init__(self) -> None:
        self.seconds, self.count, self._told = 0.0, 0, 0
        self._depth, self._start = 0, 0.0
        from torch._dynamo.callback import callback_handler  # seconds that others needn't wait

        callback_handler.register_start_callback(self._begin)
        callback_handler.register_end_callback(self._end)

    def is_news(self) -> bool:
        """Whether something was compiled since `news` was last told."""
        return self.count > self._told

    def news(self) -> str:
        """What was compiled so far, in a line."""
        self._told = self.count
        return f"compiled {self.count} graphs in {self.seconds:.1f} s so far"

    def _begin(self, _: object) -> None:
        if not self._depth:
            self._start = time.perf_counter()
        self._depth += 1

    def _end(self, _: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.seconds += time.perf_counter() - self._start
            self.count += 1
