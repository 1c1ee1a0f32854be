"""Additions to the training of a wrapped model: a learning rate, and the adapter in memory for an engine that
generates."""
