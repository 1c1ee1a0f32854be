"""The tokenizer of a GGUF file: transformers builds it from the metadata."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import PreTrainedTokenizerFast

from pissa.containers.gguf_file import GgufFile
from pissa.containers.messages import file_errors
from pissa.notices import NoEndTokenWarning

_REMEDY = "Give the folder or the name of a model that has its tokenizer: config_from=, or --config-from"


def tokenizer_of(file: GgufFile) -> Any:
    """The tokenizer of the file's model, with its chat template.

    Raises:
        ValueError: the metadata describe none that transformers can build. The message names the file.
    """
    with file_errors(file.path, _REMEDY):
        # Not in transformers' first releases that are supported.
        from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

        architecture, content, options = get_gguf_tokenizer(str(file.path))
        backend, _ = convert_gguf_tokenizer(architecture, content)
        context = file.metadata.get(f"{architecture}.context_length")
        if context is not None:
            options["model_max_length"] = int(context)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
        tokenizer.name_or_path = str(file.path)  # as an argument, transformers looks on the Hub for a large vocabulary
    if tokenizer.eos_token_id is None:
        warnings.warn(
            f"{file.path} names no end token, so answers end at their longest: {_REMEDY}",
            NoEndTokenWarning,
            stacklevel=2,
        )
    return tokenizer
