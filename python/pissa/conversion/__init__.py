"""Converts any adapter to a plain LoRA: `plain_lora` finds where it started and computes its factors, and `convert`
writes them. Errors are those of `containers`."""

from pissa.conversion.convert import Conversion

__all__ = ["Conversion"]
