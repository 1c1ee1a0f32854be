"""Every way to write what has been trained, for every kind of base: what is written loads and answers like the model in
memory, or is refused before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import checkpoint_folders
import gguf_fixtures
import pissa
from daily import each
from language_models import error, logits, moved, train
from pissa.checkpoints.merge import merge
from released_folders import SIZES, released

TOKENS = torch.arange(3, 51)[None]
ADAPTER: dict[str, Any] = {"r": 4, "target_modules": ["v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
"""Embeddings, head and other layers have no adapter. llama.cpp keeps the rows of these two in their order."""


class Base(NamedTuple):
    path: Path
    load: Callable[..., Any]
    """Makes a PissaModel of it."""
    original: Callable[[], nn.Module]
    """The model of transformers in which PEFT puts a LoRA."""


def from_folder(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def wrap(path: Path, **fields: Any) -> Base:
    return Base(path, lambda: pissa.wrap(from_folder(path), **ADAPTER, **fields), lambda: from_folder(path))


def dense(folder: Path, **fields: Any) -> Base:
    torch.manual_seed(0)
    checkpoint_folders.llama(**SIZES).save_pretrained(folder)
    return wrap(folder, **fields)


def nf4(folder: Path) -> Base:
    return dense(folder, quant="nf4")


def bitsandbytes(folder: Path) -> Base:
    source, config = dense(folder / "dense").path, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(folder / "4bit")
    return wrap(folder / "4bit", init="lora")


def loaded(path: Path, twin: nn.Module) -> Base:
    fields: dict[str, Any] = {**ADAPTER, "init": "lora", "dtype": torch.float32}
    return Base(path, lambda: pissa.load(path, **fields), lambda: copy.deepcopy(twin))


def of_gguf(folder: Path) -> Base:
    folder.mkdir()
    twin = gguf_fixtures.write(gguf_fixtures.make("llama"), "llama", folder / "base.gguf", gguf_fixtures.mixed)
    return loaded(folder / "base.gguf", twin)


def fp8(folder: Path) -> Base:
    return loaded(folder, released("llama", "fp8-tiles", folder))


def mxfp4(folder: Path) -> Base:
    return loaded(folder, released("llama", "mxfp4-compressed", folder))


BASES = {make.__name__.removeprefix("of_"): make for make in (dense, nf4, bitsandbytes, of_gguf, fp8, mxfp4)}


# ---- Writers: what is loaded from what they have written ------------------------------------------------------------


def merge_and_unload(model: Any, base: Base, run: Path, out: Path) -> Tensor:
    merged = model.merge_and_unload()
    expected = logits(merged, TOKENS)
    merged.save_pretrained(out)
    found = logits(AutoModelForCausalLM.from_pretrained(out), TOKENS)
    assert torch.equal(found, expected)
    assert torch.equal(logits(pissa.load(out, r=2, init="lora").eval(), TOKENS), expected)
    return found


def merge_files(model: Any, base: Base, run: Path, out: Path) -> Tensor:
    merge(run, base.path, out)
    return logits(from_folder(out), TOKENS)


def bnb4(model: Any, base: Base, run: Path, out: Path) -> Tensor:
    pissa.export(run, out, "bnb4", base=base.path)
    return logits(peft.PeftModel.from_pretrained(from_folder(out), out / "adapter"), TOKENS)


def vllm(model: Any, base: Base, run: Path, out: Path) -> Tensor:
    pissa.export(run, out, "vllm", base=base.path)
    return logits(peft.PeftModel.from_pretrained(base.original(), out), TOKENS)


def gguf_lora(model: Any, base: Base, run: Path, out: Path) -> Tensor:
    pissa.export(run, out, "gguf", base=base.path)
    found = gguf.GGUFReader(out)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in found.tensors}
    original: Any = base.original()
    for number, layer in enumerate(original.model.layers):
        for name, linear in {"attn_v": layer.self_attn.v_proj, "ffn_down": layer.mlp.down_proj}.items():
            a, b = (tensors[f"blk.{number}.{name}.weight.lora_{factor}"] for factor in "ab")
            linear.weight.data += found.fields["adapter.lora.alpha"].contents() / len(a) * (b @ a)
    return logits(original, TOKENS)


def gguf_model(model: Any, base: Base, run: Path, out: Path) -> Tensor:
    pissa.export(run, out, "gguf-model", base=base.path)
    merged = pissa.load(out, r=2, init="lora", dtype=torch.float32)
    return logits(merged.eval(), TOKENS)


WRITERS = {write.__name__: write for write in (merge_and_unload, merge_files, bnb4, vllm, gguf_lora, gguf_model)}

REFUSED = {
    **{(name, "bnb4"): "which 4 bits cannot hold exactly" for name in ("dense", "gguf", "fp8", "mxfp4")},
    ("bitsandbytes", "bnb4"): "which transformers and PEFT load as they are",
    **{(name, "gguf_lora"): "the GGUF file with which" for name in BASES if name != "gguf"},
    # With one, integrations/test_export_dense_gguf.py writes it.
    **{(name, "gguf_model"): "transformers builds no tokenizer of its files" for name in BASES if name != "gguf"},
}
"""What a writer says that has nothing to write for a base."""

BOUNDS = {
    ("bitsandbytes", "vllm"): 2.0**-7,  # on a CPU with AVX512-BF16, it computes in bfloat16
    ("nf4", "bnb4"): 2.0**-7,
    ("gguf", "merge_files"): 2.0**-10,  # written in float16, as some of the file's matrices are
    ("fp8", "merge_files"): 2.0**-6,  # written in bfloat16, as the libraries decode
    ("mxfp4", "merge_files"): 2.0**-6,
    ("fp8", "vllm"): 2.0**-6,  # on weights in bfloat16
    ("nf4", "vllm"): 0.3,  # without the residual's error, as a warning says
    ("gguf", "gguf_model"): 0.3,  # codes rounded at random
}
"""Of the relative error of logits, where it is more than float32's rounding."""

DAILY = {
    ("gguf", "merge_and_unload"),
    ("bitsandbytes", "merge_and_unload"),
    ("fp8", "merge_files"),
    ("nf4", "bnb4"),
    ("bitsandbytes", "bnb4"),
    ("fp8", "vllm"),
    ("gguf", "gguf_lora"),
    ("gguf", "gguf_model"),
    ("mxfp4", "gguf_model"),
}


@pytest.mark.parametrize(("name", "writer"), each([(name, writer) for name in BASES for writer in WRITERS], DAILY))
@pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")
def test_what_is_written_answers_like_the_model(name: str, writer: str, tmp_path: Path) -> None:
    base = BASES[name](tmp_path / "base")
    model = base.load()
    train(moved(model), TOKENS)
    trained = logits(model.eval(), TOKENS)
    model.warned_of_plain_lora = True
    model.save_pretrained(tmp_path / "run")
    out = tmp_path / ("out.gguf" if writer.startswith("gguf") else "out")
    if words := REFUSED.get((name, writer)):
        with pytest.raises(ValueError, match=words):
            WRITERS[writer](model, base, tmp_path / "run", out)
        assert not out.exists()
        return
    found = WRITERS[writer](model, base, tmp_path / "run", out)
    assert error(found, trained) <= BOUNDS.get((name, writer), 1e-5)
