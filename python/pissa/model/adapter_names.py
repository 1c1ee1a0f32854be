"""What an adapter may be called."""

from __future__ import annotations

from torch import nn

from pissa.files.json_file import shown
from pissa.layers.layer import PissaLayer

# Parts of the names of parameters in a model with adapters, and what stands for "no adapter" in adapter_names.
_PEFTS_NAMES = {"base_model", "model", "base_layer", "modules_to_save", "original_module", "weight", "bias", "__base__"}
_PEFTS_NAMES |= set(PissaLayer.adapter_layer_names) | set(PissaLayer.other_param_names)


def check_adapter_name(name: str, model: nn.Module) -> None:
    """An adapter's name is that of a folder, a key of torch's dictionaries of modules, and a part of the names of
    parameters, by which PEFT tells the adapters of a state dict apart.

    Raises:
        ValueError: a name that cannot be all of these in `model`.
    """
    if (
        not isinstance(name, str)
        or not name.isprintable()  # then it can be encoded, too
        or not 0 < len(name.encode()) <= 200
        or set(name) & set("./\\")
    ):
        raise ValueError(
            f"adapter_name: got {shown(name)}; allowed: a string of 1 to 200 bytes, printable, without '.', '/' "
            "and '\\'"
        )
    taken = {part for key, _ in model.named_parameters() for part in key.split(".")}
    if name in taken | _PEFTS_NAMES or hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise ValueError(
            f"adapter_name: got {name!r}, which is part of the names of the model's parameters or an attribute of "
            f"torch's modules, so the adapter could not be told from it; give another name, such as {name + '_1'!r}"
        )
