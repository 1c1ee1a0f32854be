"""Any adapter as a plain LoRA: `lora_start` finds where it started, `plain_lora` computes its factors, and `adapters`
writes them."""

from pissa.conversion.adapters import Conversion, ConvertedLayer, convert, total_kept

__all__ = ["Conversion", "ConvertedLayer", "convert", "total_kept"]
