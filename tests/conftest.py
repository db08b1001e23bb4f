"""Where test models and the data of others are found."""

import os
from pathlib import Path

import pytest
import torch

# With several threads sums depend on how the cores are shared, and BatchNorm over a few rows magnifies that.
torch.set_num_threads(1)

MODELS = Path(__file__).parent / "models"


@pytest.fixture
def models():
    """The folder of the small model files that tests train."""
    return MODELS


@pytest.fixture(scope="session")
def workloads():
    """The folder of published layer graphs, outside the project; skips where EVENSTAGE_WORKLOADS is unset."""
    folder = os.environ.get("EVENSTAGE_WORKLOADS")
    if not folder:
        pytest.skip("EVENSTAGE_WORKLOADS is not set: the published layer graphs are not part of the project")
    return Path(folder)
