"""Adapted layers: a base plus its changes, for each kind of module."""

from pissa.layers.layer import PissaLayer
from pissa.layers.modules import PissaConv1d, PissaConv2d, PissaConv3d, PissaEmbedding, PissaLinear

__all__ = ["PissaConv1d", "PissaConv2d", "PissaConv3d", "PissaEmbedding", "PissaLayer", "PissaLinear"]
