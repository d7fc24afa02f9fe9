"""Settings of the test suite."""

import pytest
import torch
from cli import few_test_images
from fork_server import Server

torch.set_num_threads(1)  # the nets are tiny, and threads that wait for a busy core cost minutes


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to run in, and a test split of 40 images."""
    monkeypatch.chdir(tmp_path)
    few_test_images(monkeypatch)
    return tmp_path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Starts runs of train.py in a folder of the test file."""
    with Server(tmp_path_factory.mktemp("runs")) as server:
        yield server
