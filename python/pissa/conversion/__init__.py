"""Converts any adapter to a plain LoRA: `plain_lora` finds where it started and computes its factors, and `adapters`
writes them. Errors are those of `containers`."""

from pissa.conversion.adapters import Conversion, ConvertedLayer, convert, total_kept

__all__ = ["Conversion", "ConvertedLayer", "convert", "total_kept"]
