"""A machine with a GPU: builds, tests and measures there; `python -m bench.gpu`."""
