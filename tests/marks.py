"""Marks of parameters."""

import pytest


def thorough(value):
    """Return a parameter of a test that is tried with `--thorough` alone: another one is tried always."""
    return pytest.param(value, marks=pytest.mark.thorough)
