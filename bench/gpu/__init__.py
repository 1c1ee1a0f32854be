"""Builds, tests and measures on a machine with a GPU: `python -m bench.gpu`."""
