"""Adapted layers put into a model, and taken out again."""

from pissa.model.pissa_model import PissaModel, wrap

__all__ = ["PissaModel", "wrap"]
