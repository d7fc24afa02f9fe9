"""The depth of a net without context whose inference takes what another net's does with it.

python -m planning.equal_flops --layers 32 --local_module_num 16 --context_mode E

It prints the least depth. Context helps beyond its FLOPs if it errs less than this net.
"""

from itertools import count
from typing import Any

from engine.errors import run_script
from engine.options import read_options
from models import build_network
from models.torch_internals import FakeTensorMode
from planning.dry_run import choose_network
from planning.plan import END_TO_END, fake_batch, inference_flops


def equal_flops_layers(arguments: dict[str, Any]) -> int:
    """Return the least 6n+2 whose net without context takes at least the inference FLOPs of a net.

    Args:
        arguments: of `build_network` for that net, whose context counts.
    Raises:
        InputError: as `build_network` does.
    """

    def flops(arguments: dict[str, Any]) -> int:
        return sum(inference_flops(build_network(**arguments), image).values())

    with FakeTensorMode():
        image = fake_batch(arguments, 1)[0]
        wanted = flops(arguments)
        # At inference, one module is the same net as K without context.
        deeper = (arguments | END_TO_END | {"layers": n} for n in count(arguments["layers"], 6))
        return next(net["layers"] for net in deeper if flops(net) >= wanted)


def main(argv: list[str]) -> None:
    """Print the depth for options of train.py."""
    print(equal_flops_layers(choose_network(read_options(argv)[0])[0]))


if __name__ == "__main__":
    run_script(main)
