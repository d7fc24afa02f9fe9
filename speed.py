"""Process-wide switches for speed, and how a network is made ready for them."""

import logging
import time

import torch

from memory import keep_heap
from models import ContSupNetwork


def set_switches(
    device: torch.device, *, cudnn_benchmark: bool, tf32: bool, keeps_heap: bool
) -> None:
    """What holds for the whole process: `--cudnn_benchmark`, `--tf32`, `--keep_heap`.

    Without `tf32` float32 is float32 everywhere; PyTorch's own default is TF32 in convs.
    """
    torch.backends.cudnn.benchmark = cudnn_benchmark
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    if keeps_heap and device.type == "cpu":
        keep_heap()


def ready(
    network: ContSupNetwork, device: torch.device, *, channels_last: bool, compiled: bool
) -> ContSupNetwork:
    """The network on its device, its conv weights in the format of the images."""
    network.to(device=device, memory_format=memory_format(channels_last))
    if compiled:
        if device.type == "cpu":  # whose compiler looks for CUDA, and warns that there is none
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        network.compile_steps()
    return network


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
