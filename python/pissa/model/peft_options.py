"""Refuses the options of PEFT's loading calls that cannot be honoured."""

from __future__ import annotations

from typing import Any

from torch import nn

from pissa.containers.messages import quote


def refuse_unsupported(
    model: nn.Module,
    *,
    key_mapping: dict[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    device_map: str | dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Raises ValueError for a PEFT option that would be ignored. The message says what to do instead."""
    for name, value in {"key_mapping": key_mapping, "ignore_mismatched_sizes": ignore_mismatched_sizes}.items():
        if value:
            raise ValueError(
                f"{name}={quote(value)} is not supported: an adapter is restored as a whole, into layers of the names "
                "that it was saved with. Load the base that it was trained on, or use peft.PeftModel.from_pretrained, "
                "for which the folder is a plain LoRA"
            )
    places = getattr(model, "hf_device_map", None) or {}
    if isinstance(device_map, dict) and device_map != places and {"cpu", "disk"} & set(places.values()):
        raise ValueError(
            "device_map is not supported for an offloaded model, which stays where it is: give the device_map to the "
            "from_pretrained of the base, or to accelerate.dispatch_model, before the adapter is loaded"
        )
