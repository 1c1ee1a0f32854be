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
    use_auth_token: bool | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Raises ValueError for a PEFT option that would be ignored. The message says what to do instead."""
    if key_mapping:
        raise ValueError(
            f"key_mapping={quote(key_mapping)} is not supported: an adapter is restored into layers of the names that "
            "it was saved with. Use peft.PeftModel.from_pretrained with key_mapping, for which the folder is a plain "
            "LoRA"
        )
    if ignore_mismatched_sizes:
        raise ValueError(
            "ignore_mismatched_sizes=True is not supported: an adapter is restored as a whole. Load the base that it "
            "was trained on, or use peft.PeftModel.from_pretrained, for which the folder is a plain LoRA"
        )
    if use_auth_token:
        raise ValueError("use_auth_token is not supported, huggingface_hub has dropped it: use token")
    places = getattr(model, "hf_device_map", None) or {}
    if isinstance(device_map, dict) and device_map != places and {"cpu", "disk"} & set(places.values()):
        raise ValueError(
            "device_map is not supported for an offloaded model, which stays where it is: give the device_map to the "
            "from_pretrained of the base, or to accelerate.dispatch_model, before the adapter is loaded"
        )
