"""Settings of the test suite."""

import torch

torch.set_num_threads(1)  # the nets are tiny, and threads that wait for a busy core cost minutes
