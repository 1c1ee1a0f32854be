"""Whether the vocabulary of a model with adapters can be resized: transformers replaces the embeddings and the output
layer, and knows neither an adapter in them nor rows that are trained."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from pissa.layers.layer import PissaLayer
from pissa.layers.tokens import TrainableTokensWrapper


def new_size(size: int, new_num_tokens: int | None, pad_to_multiple_of: int | None) -> int:
    """The size that transformers gives a vocabulary of `size` tokens for these arguments."""
    new = size if new_num_tokens is None else new_num_tokens
    return new if pad_to_multiple_of is None else -(-new // pad_to_multiple_of) * pad_to_multiple_of


def check_can_be_resized(base: Any) -> None:
    """Checks the embeddings and the output layer of an (unwrapped) transformers model.

    Raises:
        ValueError: naming the layer that an adapter changes, and what to do.
    """
    names = {module: name for name, module in base.named_modules()}
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise ValueError(
                f"the vocabulary cannot be resized: {names[module]} is {_trained_by(module)}. Resize it before "
                "pissa.wrap; or, for what has been trained so far: model = model.merge_and_unload(), resize that, and "
                "wrap it anew"
            )


def _trained_by(module: Any) -> str:
    if isinstance(module, PissaLayer):
        return "adapted (target_modules)"
    if isinstance(module, TrainableTokensWrapper):
        return "trained in some rows (trainable_token_indices)"
    return "trained as a whole (modules_to_save)"
