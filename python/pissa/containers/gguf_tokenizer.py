"""The tokenizer of a GGUF file: transformers builds it from the metadata. And the metadata of a tokenizer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, pre_tokenizers
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
        if (pre := _PRE_TOKENIZERS.get(file.metadata.get("tokenizer.ggml.pre", ""))) is not None:
            backend.pre_tokenizer = pre
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
        tokenizer.name_or_path = str(file.path)  # as an argument, transformers looks on the Hub for a large vocabulary
    if tokenizer.eos_token_id is None:
        warnings.warn(
            f"{file.path} names no end token, so answers end at their longest: {_REMEDY}",
            NoEndTokenWarning,
            stacklevel=2,
        )
    return tokenizer


# ---- The inverse -----------------------------------------------------------------------------------------------------

_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
_PRE_TOKENIZERS = {"gpt-2": _BYTES, "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _BYTES])}
"""How llama.cpp splits texts by names that transformers does not read."""

_SPLITS = ("llama-bpe", "qwen2", "qwen35", "gpt-4o", "tekken")
"""The names that are written, of those that transformers reads."""

SAMPLE = (
    "Hello WORLD camelCaseWord, I'm here: we'LL they've 3 33 333 4444 12,345.67\n\n \n\t x  y   z\r\n//path/to\n/ //\n"
    "über Straße naïve e\u0301te\u0301 Žluťoučký ČAU Ωμέγα привет МИР שלום مرحبا नमस्ते สวัสดี 你好世界 こんにちは 한국어 "
    "🚀👩\u200d👩\u200d👧 ½ ² ١٢٣ ''' \"\" ---- ==> {x: [1]} $5.00 don't DON'T \u00a0 end "
)
"""A text that tokenizers split differently, by scripts, marks, capitals, digits, contractions and spaces."""

_TEXT, _UNKNOWN, _CONTROL, _OWN, _UNUSED, _BYTE = range(1, 7)
"""llama.cpp's types of tokens."""


def tokenizer_metadata(tokenizer: Any, size: int, ends: Sequence[int | None]) -> dict[str, Any]:
    """The keys and values of a file that describe the tokenizer of a model with `size` tokens, whose answers end with
    one of `ends`.

    Raises:
        ValueError: it is of a kind that is not written. The message says which part.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = {} if backend is None else json.loads(backend.to_str())
    model = whole.get("model", {})
    if model.get("type") != "BPE":
        raise ValueError(f"its tokenizer is of the type {model.get('type')}; written is BPE")
    is_pieces = bool(model["byte_fallback"])
    tokens, kinds = [f"[PAD{index}]" for index in range(size)], [_UNUSED] * size
    added = tokenizer.added_tokens_decoder
    for token, index in tokenizer.get_vocab().items():
        if index >= size:
            raise ValueError(f"its tokenizer has token {index}, {token!r}, and the model has {size} tokens")
        is_byte = is_pieces and len(token) == 6 and token.startswith("<0x")
        tokens[index], kinds[index] = token, _BYTE if is_byte else _TEXT
        if index in added:
            kinds[index] = _CONTROL if added[index].special else _OWN
        if is_pieces and token == model["unk_token"]:
            kinds[index] = _UNKNOWN
        if kinds[index] == _OWN:
            tokens[index] = token.replace("\u2581", " ")
    found: dict[str, Any] = {"model": "llama" if is_pieces else "gpt2", "tokens": tokens, "token_type": kinds}
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    if is_pieces:  # llama.cpp joins the pair with the largest score first, transformers that of the first merge
        ranks = {"".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(pairs, 1)))}
        found |= {"pre": "default", "scores": [ranks.get(token, 0.0) for token in tokens]}
        steps = json.dumps([whole["normalizer"], whole["pre_tokenizer"]])
        found["add_space_prefix"] = any(f'"{word}"' in steps for word in ("Prepend", "first", "always"))
    else:
        found |= {"pre": _pre_tokenizer_of(backend), "merges": [" ".join(pair) for pair in pairs]}
    first = tokenizer("a").input_ids[0]
    found["add_bos_token"] = tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id
    known = list(dict.fromkeys(end for end in (tokenizer.eos_token_id, *ends) if end is not None))
    names = dict(zip(("eos", "eot", "eom"), known, strict=False))
    names |= {"bos": tokenizer.bos_token_id, "padding": tokenizer.pad_token_id, "unknown": tokenizer.unk_token_id}
    found |= {f"{name}_token_id": number for name, number in names.items() if number is not None}
    metadata = {f"tokenizer.ggml.{name}": value for name, value in found.items()}
    if isinstance(tokenizer.chat_template, str):
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _pre_tokenizer_of(backend: Any) -> str:
    """llama.cpp's name of the way in which a tokenizer splits a text before it joins bytes."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = {name: pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated") for name in _SPLITS}
    known = _PRE_TOKENIZERS | {name: pre_tokenizers.Sequence([split, rest]) for name, split in splits.items()}
    own = backend.pre_tokenizer and _pieces(backend.pre_tokenizer)
    for name, candidate in known.items():
        if own == _pieces(candidate):
            return name
    raise ValueError(f"its tokenizer splits texts in a way that is not written; written are {', '.join(known)}")


def _pieces(pre_tokenizer: Any) -> list[str]:
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(SAMPLE)]
