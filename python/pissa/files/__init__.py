"""Adapters on disk: writing them, finding them, reading them into a model."""
