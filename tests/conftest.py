"""Shared fixtures: small AdReview folders, and one thread so that results do not depend on the machine."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from slimlmm import adreview, data

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AdReview folder of 12 + 4 + 4 pictures."""
    folder = tmp_path_factory.mktemp("ads")
    adreview.write(folder, train=120, val=40, test=40, seed=5)
    return folder


@pytest.fixture(scope="session")
def rows(ads: Path) -> data.Splits:
    """The rows of that folder."""
    return data.load(ads)
