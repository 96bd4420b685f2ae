"""Prove every axis of every family on small random models and write the grid.

python benchmarks/conformance.py docs/families.md [--only llava gemma3] [--workers 2] [--check]

With --check it fails where the page was another one before.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from slimlmm.conformance import Cell, cells, page

#: the tiny configurations of the tests
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
CONFIGS: dict[str, Any] = importlib.import_module("zoo").CONFIGS


def prove(name: str) -> list[Cell]:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = cells(name, CONFIGS[name]())
    told = ", ".join(f"{cell.axis} {cell.verdict}" for cell in found)
    print(f"{name}: {told}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=list(CONFIGS), help="families")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="fail where the page differs from the one that is there")
    options = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        grid = dict(zip(options.only, pool.map(prove, options.only, chunksize=1), strict=True))
    before = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
    options.out.write_text(page(grid), encoding="utf-8")
    if options.check and page(grid) != before:
        sys.exit(f"{options.out} said something else; it is written anew: look at the difference and commit it.")


if __name__ == "__main__":
    main()
