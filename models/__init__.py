"""Networks for greedy local learning with context supply; `build_network` is the way in."""

from models.build import build_network
from models.network import ContSupNetwork, LocalModule
from models.official import load_official_state_dict

__all__ = ["ContSupNetwork", "LocalModule", "build_network", "load_official_state_dict"]
