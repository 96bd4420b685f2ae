"""Prove every axis of every family on small random models and write the grid.

python benchmarks/conformance.py docs/families.md [--only llava gemma3]
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from slimlmm.conformance import cells, page

#: the tiny configurations of the tests
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
CONFIGS: dict[str, Any] = importlib.import_module("zoo").CONFIGS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=list(CONFIGS), help="families")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    grid = {}
    for name in options.only:
        grid[name] = cells(name, CONFIGS[name]())
        told = ", ".join(f"{cell.axis} {cell.verdict}" for cell in grid[name])
        print(f"{name}: {told}", flush=True)
    options.out.write_text(page(grid), encoding="utf-8")


if __name__ == "__main__":
    main()
