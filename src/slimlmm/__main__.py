"""``python -m slimlmm``: the command line."""

from slimlmm.cli import main

main()
