"""A model as config.json describes it, built without values, and which tensors of a checkpoint make its parameters.

transformers renames the tensors of many architectures when it loads them, and joins some. Its own tables describe how.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from pissa.containers.messages import CodeError, file_errors, quote, read_object
from pissa.containers.recognise import CONFIG


def class_of(config: Any) -> Any:
    """The transformers class that a config.json names."""
    if found := _class_named(config.architectures):
        return found
    raise ValueError(
        f"architectures is {quote(config.architectures)}; needed: a class of transformers {transformers.__version__}, "
        "such as LlamaForCausalLM"
    )


def _class_named(architectures: object) -> type[PreTrainedModel] | None:
    for name in architectures if isinstance(architectures, list) else ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return None


def check_no_code(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises CodeError if the model with that content of config.json is not one of transformers' own, but comes with
    its code. transformers would load another model in its place, or none."""
    is_own = config.get("model_type") in CONFIG_MAPPING and _class_named(config.get("architectures"))
    if (names := config.get("auto_map")) and not is_own:
        raise CodeError(folder, CONFIG, names)


def load_tokenizer(name: str | os.PathLike[str], *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The tokenizer in a folder, or of a name on the Hub. Code that comes with it is only run if it is trusted: where
    transformers is not told, it asks on stdin.

    Raises:
        CodeError: it needs that code.
        ValueError, OSError, KeyError, TypeError: there is none that transformers can build.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise CodeError(name, "tokenizer_config.json", get_tokenizer_config(name).get("auto_map")) from error


def model_config(folder: str | os.PathLike[str]) -> Any:
    """The config.json of a model's folder, as transformers takes it. Code that comes with the model is not run."""
    with file_errors(Path(folder) / CONFIG, NO_MODEL):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


NO_MODEL = f"It describes no model that transformers {transformers.__version__} can build [P086]"
"""For errors of transformers, of huggingface_hub, and of Python for values that these have not checked."""


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the object in the config.json of a model's folder, unchanged."""
    with file_errors(
        folder / CONFIG, "It is damaged or the folder is no model's; needed: a folder that save_pretrained wrote [P085]"
    ):
        return read_object(folder / CONFIG)


# ---- Which tensors make each parameter -------------------------------------------------------------------------------


class Part(NamedTuple):
    """Rows of a matrix [out, in]: a tensor of the checkpoint, or one matrix of a stack; either may be transposed."""

    tensor: str
    member: int | None = None
    """The number of the matrix in a stack [number, ..., ...]."""
    transposed: bool = False


class Composition:
    """Determines which tensors of a checkpoint, given by name, make the parameters of a model. The weights are not
    read."""

    def __init__(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        names = set(names)
        # A checkpoint with the model's own names needs no table, which takes transformers a second to build.
        is_own = all(name in names for name, _ in model.named_parameters())
        mapping = [] if is_own else get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        expected, prefix = model.state_dict(), model.base_model_prefix
        sources: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        # Follows core_model_loading.convert_and_load_state_dict_in_model, in the same order.
        for name in sorted(names, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            if renamed not in expected and name in expected:
                renamed, pattern = rename_source_key(name, [], [], prefix, expected)
            sources[renamed][pattern or ""].append(name)
        # The tensors of each pattern, in the order in which transformers takes them, and its operations on them.
        self._joined: dict[str, tuple[list[list[str]], list[object]]] = {}
        for renamed, lists in sources.items():
            converter = next((by_pattern[pattern] for pattern in lists if pattern), None)
            order: Sequence[str] = [""] if converter is None else converter.source_patterns
            operations = [] if converter is None else list(converter.operations)
            self._joined[renamed] = [lists[key] for key in order if key in lists], operations

    def tensors(self, parameter: str) -> set[str]:
        """The names of the tensors that make a parameter."""
        lists, _ = self._joined.get(parameter, ([], []))
        return {name for names in lists for name in names}

    def matrix(self, parameter: str, transposed: bool) -> tuple[Part, ...]:
        """The parts, stacked by rows, of the matrix [out, in] that a parameter contains. The parameter is [in, out] if
        `transposed`."""
        (parts,) = self.stack(parameter, None, transposed)
        return parts

    def stack(self, parameter: str, number: int | None, transposed: bool) -> list[tuple[Part, ...]]:
        """The same for each matrix of a parameter [number, out, in] or [number, in, out]; without a number, for [out,
        in]."""
        lists, operations = self._joined.get(parameter, ([], []))
        if not lists:
            raise ValueError(f"the checkpoint has no tensor {parameter}")
        left, first = list(operations), 0 if number is None else 1
        if number is not None and left and isinstance(left[0], MergeModulelist) and left[0].dim == 0:
            del left[0]
            columns = [[Part(name) for name in names] for names in lists]
            if any(len(column) != number for column in columns):
                counts = " and ".join(str(len(column)) for column in columns)
                raise ValueError(f"{parameter} needs {number} tensors of a kind, and the checkpoint has {counts}")
        else:
            indices = [None] if number is None else range(number)
            columns = [[Part(name, index) for index in indices] for names in lists for name in names]
        if left and len(columns) == 1 and _transposes(left[0], first):
            del left[0]
            columns = [[part._replace(transposed=True) for part in column] for column in columns]
        # If the parameter is transposed, the rows of the matrix are its columns.
        if left and isinstance(left[0], Concatenate) and left[0].dim == first + transposed:
            del left[0]
        elif len(columns) > 1:
            left = list(operations)
        if left:
            raise ValueError(
                f"transformers makes {parameter} of {len(columns)} tensors by {', '.join(map(repr, operations))}; what "
                "can be split is a tensor, transposed or not, one of a stack, or several joined by their rows"
            )
        if transposed:
            columns = [[part._replace(transposed=not part.transposed) for part in column] for column in columns]
        return list(zip(*columns, strict=True))


def _transposes(operation: object, first: int) -> bool:
    return (
        isinstance(operation, Transpose)
        and not operation.check_dims
        and {operation.dim0, operation.dim1} == {first, first + 1}
    )
