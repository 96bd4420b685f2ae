"""Shared fixtures: small AdReview folders, and one thread so that results do not depend on the machine."""

from __future__ import annotations

import gc
import os
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

from slimlmm import adreview, certificate, checkpoint, data, measure, probes
from tiny import tiny
from zoo import CONFIGS

torch.set_num_threads(1)
#: the same examples at each run, so that a failure is one of the change; `pytest --hypothesis-profile default` draws new ones
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")
#: which of the families `make test` proves law by law, and one of how many; `make conformance` proves all
SEED, SHARE = 4, 12


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-grid",
        action="store_true",
        help="prove the laws for every family, not for a twelfth of them, and run no other test",
    )

    parser.addoption("--thorough", action="store_true", help="also the tests that have a quicker sibling")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    if not config.getoption("--thorough"):
        slow = [item for item in items if "thorough" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    if config.getoption("--whole-grid"):
        other = [item for item in items if "sampled_family" not in item.fixturenames]
        config.hook.pytest_deselected(items=other)
        items[:] = [item for item in items if item not in other]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "sampled_family" in metafunc.fixturenames:
        drawn = random.Random(SEED).sample(list(CONFIGS), len(CONFIGS) // SHARE)
        whole = metafunc.config.getoption("--whole-grid")
        metafunc.parametrize("sampled_family", [name for name in CONFIGS if whole or name in drawn])


@pytest.fixture(autouse=True, scope="module")
def settled_heap() -> None:
    """Leave what is imported by now out of garbage collections, which go through all of it again and again."""
    gc.collect()
    gc.freeze()


def stay_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out new processes, seconds each, where no test is about them: memory of an answer, certificate (made here)."""
    told = measure.Memory(kind="rss", before=1, peak=2)
    monkeypatch.setattr(measure, "answering_memory", lambda *_, **__: told)
    monkeypatch.setattr(certificate, "afresh", probes.told)
    monkeypatch.setattr(certificate, "LIMIT", 4)


@pytest.fixture(autouse=True)
def no_new_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stay in this process but where a test says `new_process`; a fixture of more than one test has to ask for itself."""
    if "new_process" not in request.keywords:
        stay_in_this_process(monkeypatch)


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


@pytest.fixture(scope="session")
def postgres_server():
    """Yield the URL of a PostgreSQL server of our own, on a socket in a folder; it does not run as root, so as nobody there."""
    if not all(shutil.which(name) for name in ("postgres", "pg_ctl", "initdb")):
        pytest.skip("PostgreSQL is not installed (postgres, pg_ctl, initdb)")
    pytest.importorskip("psycopg")
    with tempfile.TemporaryDirectory() as folder:
        run = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder}
        if os.geteuid() == 0:
            shutil.chown(folder, "nobody")
            run["user"] = "nobody"
        subprocess.run(
            ["initdb", "-D", f"{folder}/data", "-U", "us", "--auth=trust", "-E", "UTF8", "--locale=C"], **run
        )
        control = ["pg_ctl", "-D", f"{folder}/data", "-w", "-l", f"{folder}/log"]
        subprocess.run([*control, "-o", f"-k {folder} -h '' -c fsync=off", "start"], **run)
        yield f"postgresql+psycopg://us@/postgres?host={folder}"
        subprocess.run([*control, "-m", "immediate", "stop"], **run)


@pytest.fixture
def postgres(postgres_server):
    """Yield the URL of a PostgreSQL database without tables."""
    from slimlmm.serving.store import METADATA, opened

    yield postgres_server
    database = opened(postgres_server)
    METADATA.drop_all(database)
    database.dispose()
