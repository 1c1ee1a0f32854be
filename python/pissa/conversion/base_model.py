"""The base model of an adapter, of which one layer at a time is looked at."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

from peft import PeftModel
from torch import nn

from pissa.base.weights import with_weight
from pissa.files.hub import checkpoint_folder
from pissa.files.messages import first_line
from pissa.files.model_folder import ModelFolder, class_of, model_config
from pissa.notices import WholeModelWarning


class BaseModel:
    """A model in memory, or one in a folder, whose layers get their weights when they are asked for."""

    def __init__(self, model: nn.Module, folder: ModelFolder | None = None) -> None:
        self.model = model
        """Without values if it is in a folder."""
        self._folder = folder

    @staticmethod
    def of(base: nn.Module | str | os.PathLike[str], layers: Iterable[str]) -> BaseModel:
        """The model that `base` is, or whose folder or name it is. It is loaded as a whole, with a warning, if the
        weights of `layers` cannot be read from its files one by one.

        Raises:
            ValueError: it cannot be loaded, or is a model with an adapter.
        """
        if isinstance(base, nn.Module):
            return BaseModel(load_base(base))
        try:
            folder, wanted = ModelFolder(checkpoint_folder(base)), set(layers)
            uses = Counter(id(parameter) for _, parameter in folder.model.named_parameters(remove_duplicate=False))
            for name, module in folder.model.named_modules():
                if name in wanted and uses[id(getattr(module, "weight", None))] == 1:
                    folder.check(name)
            return BaseModel(folder.model, folder)
        except ValueError as reason:
            model = BaseModel(load_base(base))
            warnings.warn(
                f"{base} is loaded as a whole, into memory, because its weights cannot be read one by one: {reason}",
                WholeModelWarning,
                stacklevel=5,
            )
            return model

    @contextmanager
    def layer(self, name: str) -> Iterator[nn.Module]:
        """The layer of that name, which the model has, with its weight."""
        layer = self.model.get_submodule(name)
        if self._folder is None:
            yield layer
            return
        yield with_weight(layer, self._folder.weight(name))
        self._folder.release(name)


def load_base(base: nn.Module | str | os.PathLike[str]) -> nn.Module:
    """The model of a folder or a name, in the dtype of its files, on the CPU. A model is returned as it is.

    Raises:
        ValueError: it cannot be loaded, or is a model with an adapter.
    """
    if isinstance(base, PeftModel):
        raise ValueError("base is a PeftModel, in which PiSSA has replaced weights; needed: the unmodified model")
    if isinstance(base, nn.Module):
        return base
    try:
        return cast(nn.Module, class_of(model_config(base)).from_pretrained(base, dtype="auto"))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{base} cannot be loaded as a model: {first_line(error)}; load it yourself and give the model"
        ) from error
