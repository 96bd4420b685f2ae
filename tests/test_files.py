"""Files and folders: what cannot be written is refused before anything long begins."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from slimlmm.files import refuse_unwritable

WRITES = """
import os, sys
from pathlib import Path
from slimlmm.errors import UserError
from slimlmm.files import refuse_unwritable
if os.geteuid() == 0:
    os.setuid(65534)  # root may write anywhere
try:
    refuse_unwritable(Path(sys.argv[1]))
except UserError as error:
    print(error)
"""


@pytest.fixture
def folder():
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("name", ["there", "there/new", "file/below"])
def test_an_output_that_cannot_be_written_is_refused_with_the_reason(name, folder):
    (folder / "there").mkdir(mode=0o555)
    (folder / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", WRITES, str(folder / name)], capture_output=True, text=True, check=True
    )
    assert f"{folder / name}: cannot be written (" in done.stdout
    assert "Choose another --out" in done.stdout


def test_nothing_is_left_where_an_output_can_be_written(tmp_path):
    refuse_unwritable(tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())
