"""Networks for greedy local learning with context supply; `build_network` is the way in."""

from models.build import build_network
from models.checkpoint import load_official_state_dict
from models.network import ContSupNetwork, LocalModule

__all__ = ["ContSupNetwork", "LocalModule", "build_network", "load_official_state_dict"]
