"""Checks of data before training: pictures, leaks, answers, and whether a model sees them as it should."""
