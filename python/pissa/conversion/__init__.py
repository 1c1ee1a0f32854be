"""Adapters of every PiSSA layout as plain LoRA: `adapters` what the source is and what is written, `lora_folder`
folders of plain LoRA, `lora_start` where other tools' adapters started, `change` factors without cancellation, of a
lower rank if wanted, and the check of what was written."""

from pissa.conversion.adapters import Conversion, ConvertedLayer, convert, total_kept

__all__ = ["Conversion", "ConvertedLayer", "convert", "total_kept"]
