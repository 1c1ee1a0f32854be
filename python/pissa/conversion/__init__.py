"""Any adapter as a plain LoRA: `source` finds out what it is, `lora_start` where it started, `delta_weight` computes
its factors, and `adapters` writes and checks."""

from pissa.conversion.adapters import Conversion, ConvertedLayer, convert, total_kept

__all__ = ["Conversion", "ConvertedLayer", "convert", "total_kept"]
