"""What an adapter may be called."""

from __future__ import annotations

from torch import nn

from pissa.files.messages import shown
from pissa.layers.layer import PissaLayer

# Parts of the names of parameters in a model with adapters, and the word for "no adapter" in adapter_names.
_PEFTS_NAMES = {"base_model", "model", "base_layer", "modules_to_save", "original_module", "weight", "bias", "__base__"}
_PEFTS_NAMES |= set(PissaLayer.adapter_layer_names) | set(PissaLayer.other_param_names)


def check_adapter_name(name: str, model: nn.Module) -> None:
    """Checks that `name` can be the name of a folder, a key of torch's dictionaries of modules, and a part of the names
    of parameters in `model`, by which PEFT tells the adapters of a state dict apart.

    Raises:
        ValueError: it cannot be all of these.
    """
    if (
        not isinstance(name, str)
        or not name.isprintable()  # printable names can be encoded, too
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
