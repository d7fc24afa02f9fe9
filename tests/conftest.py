"""Settings of the test suite."""

import pytest
import torch
from cli import few_test_images

torch.set_num_threads(1)  # the nets are tiny, and threads that wait for a busy core cost minutes


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to run in, and a test split of 40 images."""
    monkeypatch.chdir(tmp_path)
    few_test_images(monkeypatch)
    return tmp_path
