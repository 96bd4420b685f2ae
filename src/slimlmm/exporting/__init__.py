"""Exports: a checkpoint as graphs of another runtime, or in 8 bits for plain loading; each checked against its source."""
