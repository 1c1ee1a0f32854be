"""Adapted layers: a base plus its changes, for each kind of module."""

from pissa.layers.kinds import PissaConv1d, PissaConv2d, PissaConv3d, PissaEmbedding, PissaLinear
from pissa.layers.layer import PissaLayer

__all__ = ["PissaConv1d", "PissaConv2d", "PissaConv3d", "PissaEmbedding", "PissaLayer", "PissaLinear"]
