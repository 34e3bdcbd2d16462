"""What the tests of the method, the trainer and the command share.

They run on one thread: their models are too small to divide, and so do the workers of `iprm compare`.
"""

from __future__ import annotations

import pytest
import torch
from feature_files import arrays, save


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    torch.set_num_threads(1)  # for fixtures of a module, which are made before those of a test


@pytest.fixture(autouse=True)
def one_thread(two_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def features(tmp_path) -> str:
    """A small file for the dataset `features`."""
    return save(tmp_path, arrays())
