"""One GGUF file that has the training in it. From a GGUF file: the base's, byte for byte, with other codes where the
adapter changes a weight. From any other base: a new file of the merged model."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from torch import Tensor

from pissa import ops
from pissa.adapters.lora_folder import LoraFolder
from pissa.base.digest import bytes_of
from pissa.checkpoints.merge import merge, plan_merge
from pissa.checkpoints.merge_codes import Kept, check_low_rank, coded_units, merged_layers, moments_of
from pissa.checkpoints.rewrite import Replace, Result, add_up
from pissa.checkpoints.trained import read_adapter
from pissa.containers.checkpoint import READ, Checkpoint, Contents
from pissa.containers.gguf_file import parts_of
from pissa.containers.gguf_model import GgufSource
from pissa.containers.hub import Name
from pissa.containers.staged import check_new, staged, write_text
from pissa.integrations.dense_gguf import TYPES, Text, describe, write
from pissa.integrations.exported import MERGE, Exported, no_base
from pissa.model.batches import Batch
from pissa.ops.checks import check_choice
from pissa.system import shell


def export_model(
    adapter: LoraFolder,
    base: Name | None,
    target: Path,
    calibration: Iterable[Batch] | None = None,
    type: str | None = None,
) -> Exported:
    """Writes the model with the adapter in it to the new file `target`, or its parts, and beside it a Modelfile. In the
    codes of a GGUF file `base`, matrices that the file has dense get the sum; of another base, which is merged first in
    a folder beside the target, all are dense, or in codes of that `type`. `calibration`: see `merge`. Raises ValueError
    for another base, for what cannot be merged, and for a model that is not written as GGUF, which is named."""
    if target.suffix != ".gguf":
        raise ValueError(f"{target} does not end with .gguf, by which programs know such files: give another name")
    model = base or adapter.named_base
    if model is None:
        raise no_base(adapter)
    checkpoint = Checkpoint.open(model)
    if type is not None:
        check_choice("type", type, TYPES)
    if checkpoint.contents is Contents.GGUF:
        if type is not None:
            raise ValueError(
                f"type: got {type!r}, and {checkpoint.name} is a GGUF file, which keeps its types: leave it out"
            )
        return _in_codes(adapter, checkpoint, target, calibration)
    if calibration is not None:
        raise ValueError(
            f"calibration: got one, and {checkpoint.name} contains {checkpoint.contents.value}; only merging into the "
            "codes of a GGUF file takes it: leave it out"
        )
    return _dense(adapter, checkpoint, target, type)


_TEXT_ONLY = "; for images, take the original model's mmproj file"


def _dense(adapter: LoraFolder, checkpoint: Checkpoint, target: Path, type: str | None) -> Exported:
    checkpoint.require(*READ)
    modelfile = f"{target.stem}.Modelfile"
    _check_new(target, target.name, modelfile)
    try:
        tokenizer = checkpoint.tokenizer(adapter.path)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise _not_written(checkpoint, adapter, "transformers builds no tokenizer of its files") from error
    try:
        text, _ = describe(checkpoint, tokenizer)
        if text.is_part:
            _check_only_text(checkpoint, adapter, text)
    except ValueError as error:
        raise _not_written(checkpoint, adapter, error) from error
    with staged(target.parent) as new, TemporaryDirectory(dir=target.parent, prefix=".merged-") as folder:
        merged = merge(adapter.path, checkpoint.name, folder)
        title = f"{Path(checkpoint.name).name} + {adapter.path.name}"
        note = f"{adapter.path.name} merged by pissa {ops.build_info()['version']}"
        texts = {"general.name": title, "general.description": note}
        try:
            write(new(target.name), Checkpoint.open(folder), tokenizer, texts, type)
        except ValueError as error:
            raise _not_written(checkpoint, adapter, error) from error
        size = new(target.name).stat().st_size
        # Nothing keeps that file open: Windows would not rename it.
        write_text(new(modelfile), _modelfile(target.name, Checkpoint.open(new(target.name)), adapter.path))
    return Exported(
        what=merged.what,
        layers=merged.layers,
        written=f"{target.name}, and {modelfile} for Ollama{_TEXT_ONLY if text.is_part else ''}",
        bytes_written=size,
        load=_load(target, target.with_name(modelfile)),
        error=merged.error,
    )


def _check_only_text(checkpoint: Checkpoint, adapter: LoraFolder, text: Text) -> None:
    names = [layer.name for unit in plan_merge(checkpoint, adapter).adapted for layer in unit.layers]
    if others := [name for name in names if not name.startswith((text.inner, "lm_head"))]:
        raise ValueError(f"the adapter changes {others[0]}, and only the model for text is written")


def _not_written(checkpoint: Checkpoint, adapter: LoraFolder, reason: object) -> ValueError:
    merge = shell("pissa", "merge", str(adapter.path), "merged", "--base", checkpoint.name)
    return ValueError(
        f"{checkpoint.name} is not written as a GGUF file: {reason}. Instead, run `{merge}`, and let llama.cpp's "
        "convert_hf_to_gguf.py read the folder, or Ollama: `echo FROM ./merged > Modelfile`, "
        "`ollama create NAME -f Modelfile` [P148]"
    )


def _check_new(target: Path, *names: str) -> None:
    for name in names:
        check_new(target.with_name(name))


def _load(file: Path, modelfile: Path) -> str:
    written, described = (shell(str(path)) for path in (file, modelfile))
    return f"llama-cli -m {written}; ollama create NAME -f {described} && ollama run NAME"


@torch.no_grad()
def _in_codes(
    adapter: LoraFolder, checkpoint: Checkpoint, target: Path, calibration: Iterable[Batch] | None
) -> Exported:
    source, files = cast(GgufSource, checkpoint.stored), checkpoint.files
    trained = read_adapter(adapter, checkpoint)
    check_low_rank(trained)
    plan = plan_merge(checkpoint, adapter)
    units = coded_units(plan)
    if others := [unit.name for unit in plan.units if isinstance(unit, Replace)]:
        raise ValueError(
            f"{others[0]} was trained whole, and only low-rank changes are merged into a file: run {MERGE}"
        )
    dense = [unit for unit in plan.adapted if unit not in units]
    ending = "" if len(files) == 1 else f"-00001-of-{len(files):05}"
    names = parts_of(f"{target.stem}{ending}.gguf")
    modelfile = f"{target.stem}.Modelfile"
    _check_new(target, target.name, *names, modelfile)
    moments = moments_of(trained, calibration)
    results: dict[str, Result] = {}
    with staged(target.parent) as new, ExitStack() as opened:
        handles, moved = {}, {}
        note = (
            f"{adapter.path.name} merged by pissa {ops.build_info()['version']}: codes rounded at random, scales kept"
        )
        for file, name in zip(files, names, strict=True):
            title = f"{file.metadata.get('general.name', checkpoint.name)} + {adapter.path.name}"
            header = file.header({"general.name": title, "general.description": note} if file is files[0] else {})
            moved[file.path] = len(header) - file.start
            handles[file.path] = output = opened.enter_context(new(name).open("xb+"))
            output.write(header)
            with file.path.open("rb") as old:
                old.seek(file.start)
                shutil.copyfileobj(old, output, 1 << 24)

        def put(name: str, matrix: Tensor, member: int | None) -> None:
            for path, position, values in source.stored_rows(name, matrix, member):
                handles[path].seek(position + moved[path])
                handles[path].write(bytes_of(values.contiguous()))

        for unit in units:
            sums = []
            for result, parts in merged_layers(trained, unit, moments):
                sums.append(result)
                for name, codes, member in parts:
                    put(name, codes, member)
            results[unit.name] = add_up(sums)
            checkpoint.release(unit.tensors)
        for unit in dense:
            for layer, weight, _ in trained.read_trained(unit):
                for name, matrix, member in checkpoint.divide(weight.to(layer.dtype), layer.parts):
                    put(name, matrix, member)
        for doubt in trained.doubts():
            warnings.warn(doubt, stacklevel=3)
        size = sum(handle.seek(0, 2) for handle in handles.values())
        write_text(new(modelfile), _modelfile(names[0], checkpoint, adapter.path))
    kept = Kept.of(add_up(results.values()))
    return Exported(
        what=trained.what,
        layers=sum(len(unit.layers) for unit in (*units, *dense)),
        written=f"{', '.join(names)}, and {modelfile} for Ollama",
        bytes_written=size,
        load=_load(target.with_name(names[0]), target.with_name(modelfile)),
        kept=kept,
        kept_of_layers={name: Kept.of(sums) for name, sums in results.items()},
    )


def _modelfile(file: str, checkpoint: Checkpoint, run: Path) -> str:
    """Ollama's description of a model: the file, the prompt of the chat template for one question, which is the
    training's if its folder has a tokenizer, and the tokens with which an answer ends."""
    lines, metadata = [f"FROM ./{file}"], checkpoint.files[0].metadata
    if "tokenizer.ggml.model" not in metadata:
        return lines[0] + "\n"
    tokenizer = checkpoint.tokenizer(run)
    if tokenizer.chat_template is not None:
        # A text of the template in which Ollama replaces the question. It may write the first token itself.
        asked = [{"role": "user", "content": "{{ .Prompt }}"}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        if metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.model"] == "llama"):
            prompt = prompt.removeprefix(tokenizer.bos_token or "")
        lines.append(f'TEMPLATE """{prompt}{{{{ .Response }}}}"""')
    ends = checkpoint.built_config().eos_token_id
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None:
            lines.append(f"PARAMETER stop {json.dumps(tokenizer.convert_ids_to_tokens(end))}")
    return "\n".join(lines) + "\n"
