"""Settings of the test suite."""

from functools import partial

import pytest
import torch
from cli import few_test_images, main
from fork_server import Server

torch.set_num_threads(1)  # the nets are tiny, and threads that wait for a busy core cost minutes


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    """Mark as `cuda` what is skipped without CUDA: planning/gpu.py runs these tests."""
    for item in items:
        reasons = [mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif")]
        if any("CUDA" in reason for reason in reasons):
            item.add_marker("cuda")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to run in, and a test split of 40 images."""
    monkeypatch.chdir(tmp_path)
    few_test_images(monkeypatch)
    return tmp_path


@pytest.fixture
def train_py(here, monkeypatch, capsys):
    """train.py as a function of its arguments; gives status, output lines and error lines."""
    return partial(main, monkeypatch, capsys)


@pytest.fixture
def refused(train_py):
    """As train_py, for a run that is refused: gives the one line that says why."""

    def run(*arguments):
        status, _, err = train_py(*arguments)
        assert (status, len(err)) == (2, 1), err
        assert err[0].startswith("train.py: error: ")
        return err[0]

    return run


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Starts runs of train.py in a folder of the test file."""
    with Server(tmp_path_factory.mktemp("runs")) as server:
        yield server
