"""Shared fixtures: small AdReview folders, and one thread so that results do not depend on the machine."""

from __future__ import annotations

import os
import random
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from slimlmm import adreview, checkpoint, data
from tiny import tiny
from zoo import CONFIGS

torch.set_num_threads(1)
#: which fourth of the families `make test` proves law by law; `make conformance` proves all
SEED = 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-grid",
        action="store_true",
        help="prove the laws for every family, not for a fourth of them, and run no other test",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    if config.getoption("--whole-grid"):
        other = [item for item in items if "sampled_family" not in item.fixturenames]
        config.hook.pytest_deselected(items=other)
        items[:] = [item for item in items if item not in other]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "sampled_family" in metafunc.fixturenames:
        drawn = random.Random(SEED).sample(list(CONFIGS), len(CONFIGS) // 4)
        whole = metafunc.config.getoption("--whole-grid")
        metafunc.parametrize("sampled_family", [name for name in CONFIGS if whole or name in drawn])


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


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny LLaVA."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    checkpoint.save(*tiny("llava-dinov2-llama"), folder)
    return folder
