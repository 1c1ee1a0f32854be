"""A base plus its changes: an adapted layer for each kind of module."""

from pissa.layers.convolution import PissaConv1d, PissaConv2d, PissaConv3d
from pissa.layers.embedding import PissaEmbedding
from pissa.layers.layer import PissaLayer
from pissa.layers.linear import PissaLinear

__all__ = ["PissaConv1d", "PissaConv2d", "PissaConv3d", "PissaEmbedding", "PissaLayer", "PissaLinear"]
