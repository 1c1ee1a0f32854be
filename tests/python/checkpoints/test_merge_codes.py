"""Merges into the codes of the base: only codes change, as ops.merge_codes changes them, in every layout, in folders
and in GGUF files; killed runs; and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import gguf_fixtures
import pissa
from daily import each
from interrupted import Interrupted
from language_models import Make, logits, moved
from mapped_files import read_tensors
from pissa import ops
from pissa.base.digest import bytes_of, seed_of
from pissa.checkpoints import merge as merge_module
from pissa.checkpoints.init import init
from pissa.checkpoints.merge import merge
from pissa.checkpoints.merge_codes import Kept
from pissa.cli import main
from pissa.containers.checkpoint import Checkpoint
from pissa.layers.layer import pissa_layers
from pissa.model.calibrate import observe
from released_folders import DENSE_LAYOUTS, FIELDS, released

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")

LAYOUTS = [("llama", layout) for layout in DENSE_LAYOUTS]
LAYOUTS += [("gpt_oss", "mxfp4-gpt-oss"), ("qwen3_moe", "nvfp4-modelopt"), ("qwen3_moe", "fp8-tiles")]


def adapter_on(base: Path, folder: Path, **fields: Any) -> Any:
    model = moved(pissa.load(base, **{"init": "lora", "dtype": torch.float32, **FIELDS, **fields}))
    model.warned_of_plain_lora = True
    model.save_pretrained(folder)
    return model.eval()


def merged_in_memory(model: Any, moments: Mapping[str, Tensor] | None = None) -> dict[str, ops.Merged]:
    """The layers in codes by their names, each merged in the order of the model's matrix."""
    found, moments = {}, moments or {}
    for name, layer in pissa_layers(model.base_model.model).items():
        if layer.base.is_quantised:
            a, b = layer.start_of("default").factors_of_change(layer.deltas("default"))
            options = {"second_moment": moments.get(name), "seed": seed_of(name)}
            given = layer.base.quantized, a.detach(), b.detach(), layer.scaling["default"]
            found[name] = ops.merge_codes(*given, **options)
    return found


@pytest.mark.parametrize(("kind", "layout"), each(LAYOUTS, LAYOUTS[-3:]))
def test_only_codes_change_and_as_in_memory(kind: str, layout: str, tokens: Tensor, tmp_path: Path) -> None:
    released(kind, layout, tmp_path / "model")
    (tmp_path / "model" / "hf_quant_config.json").write_text("{}")
    model = adapter_on(tmp_path / "model", tmp_path / "run")
    done = merge(tmp_path / "run", tmp_path / "model", tmp_path / "merged", quant="same")
    for name in ("config.json", "hf_quant_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    old, new = (Checkpoint(tmp_path / name) for name in ("model", "merged"))
    codes = {weight.codes for weight in old.coded.values()}
    for name in old.stored.names:
        same = bytes_of(old.stored.read(name).contiguous()) == bytes_of(new.stored.read(name).contiguous())
        is_dense = kind == "gpt_oss" and name.endswith("_proj.weight")
        assert same != (name in codes or is_dense), name
    expected = merged_in_memory(model)
    for name, parts in new.coded_layers.items():
        assert torch.equal(new.codes(parts).codes, expected[name].weight.codes), name
    assert done.kept is not None
    assert len(expected) == done.quantised
    sums = {part: sum(getattr(one, part) for one in expected.values()) for part in ("change", "along", "moved")}
    elements = sum(one.weight.shape[0] * one.weight.shape[1] for one in expected.values())
    assert done.kept.share == pytest.approx(sums["along"] / sums["change"], rel=1e-6)
    assert done.kept.moved == pytest.approx(sums["moved"] / elements)
    assert 0.8 < done.kept.share < 1.2
    again = logits(pissa.load(tmp_path / "merged", init="lora", dtype=torch.float32, **FIELDS), tokens)
    assert (again - logits(model, tokens)).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "layout"), [("llama", "mxfp4-compressed"), ("gpt_oss", "mxfp4-gpt-oss"), ("llama", "gguf")]
)
def test_error_feedback_by_what_the_base_reads(kind: str, layout: str, tokens: Tensor, tmp_path: Path) -> None:
    if layout == "gguf":
        base, target = tmp_path / "base.gguf", tmp_path / "merged.gguf"
        gguf_fixtures.write(gguf_fixtures.make(kind), kind, base, without_floats)
        write = partial(pissa.export, tmp_path / "run", target, "gguf-model")
    else:
        base, target = tmp_path / "model", tmp_path / "merged"
        released(kind, layout, base)
        write = partial(merge, tmp_path / "run", base, target, quant="same")
    adapter_on(base, tmp_path / "run")
    write(calibration=[tokens])
    model = pissa.load(base, adapter=tmp_path / "run", is_trainable=False)
    moments = observe(model, [tokens], progressbar=False).moments
    expected, new = merged_in_memory(model, moments), Checkpoint.open(target)
    assert expected.keys() <= moments.keys()
    for name, merged in expected.items():
        assert torch.equal(new.codes(new.coded_layers[name]).codes, merged.weight.codes), name
    random = merged_in_memory(model)
    assert any(not torch.equal(random[name].weight.codes, merged.weight.codes) for name, merged in expected.items())


def test_a_calibration_is_a_part_of_the_run(tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released("llama", "mxfp4-compressed", tmp_path / "model")
    adapter_on(tmp_path / "model", tmp_path / "run")
    with pytest.raises(ValueError, match=r"calibration: got one, and quant=None; it is for quant=\"same\""):
        merge(tmp_path / "run", tmp_path / "model", tmp_path / "out", calibration=[tokens])
    with pytest.raises(ValueError, match=r"calibration: got one, and to='vllm'; it is for to=\"gguf-model\""):
        pissa.export(tmp_path / "run", tmp_path / "out", "vllm", calibration=[tokens])
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "merged_layers", Interrupted(merge_module.merged_layers, at=5))
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path / "run", tmp_path / "model", tmp_path / "out", quant="same", calibration=[tokens])
    with pytest.raises(ValueError, match="another plan: calibration was '"):
        merge(tmp_path / "run", tmp_path / "model", tmp_path / "out", quant="same")
    merge(tmp_path / "run", tmp_path / "model", tmp_path / "out", quant="same", calibration=[tokens])
    with pytest.raises(pissa.CompletedError):
        merge(tmp_path / "run", tmp_path / "model", tmp_path / "out", quant="same", calibration=[tokens])


def test_codes_of_bitsandbytes(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    pissa.wrap(tiny_llama(dtype=torch.bfloat16), init="lora", r=2).save_pretrained(tmp_path / "nothing")
    merge(tmp_path / "nothing", tmp_path / "dense", tmp_path / "model", quant="nf4")
    model = adapter_on(tmp_path / "model", tmp_path / "run")
    merge(tmp_path / "run", tmp_path / "model", tmp_path / "merged", quant="same")
    new, expected = Checkpoint(tmp_path / "merged"), merged_in_memory(model)
    assert expected
    assert new.coded_layers.keys() >= expected.keys()
    for name, merged in expected.items():
        assert torch.equal(new.codes(new.coded_layers[name]).codes, merged.weight.codes), name


def test_a_part_of_a_set_of_codes_is_refused(tiny_llama: Make, tmp_path: Path) -> None:
    """Also if the adapter does not change the layer, whose codes would be copied."""
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    pissa.wrap(tiny_llama(dtype=torch.bfloat16), init="lora", r=2).save_pretrained(tmp_path / "nothing")
    merge(tmp_path / "nothing", tmp_path / "dense", tmp_path / "model", quant="nf4")
    adapter_on(tmp_path / "model", tmp_path / "run", target_modules=["q_proj"])
    file = tmp_path / "model" / "model.safetensors"
    tensors = read_tensors(file)
    del tensors["model.layers.1.mlp.up_proj.weight.absmax"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: '.*\.1\.mlp\.up_proj\.weight': no 4-bit"):
        merge(tmp_path / "run", tmp_path / "model", tmp_path / "merged", quant="same")
    assert not (tmp_path / "merged").exists()


def test_of_no_change_all_is_kept() -> None:
    sums = {"change": 0.0, "along": 0.0, "square": 0.0, "moved": 0.0, "beyond": 0.0, "elements": 6.0}
    assert Kept.of(sums) == Kept(share=1.0, noise=0.0, moved=0.0, beyond=0.0)


def test_the_command_says_what_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    released("llama", "mxfp4-compressed", tmp_path / "model")
    adapter_on(tmp_path / "model", tmp_path / "run")
    folders = [str(tmp_path / name) for name in ("run", "merged")]
    assert main(["merge", *folders, "--base", str(tmp_path / "model"), "--quant", "same"]) == 0
    shown = capsys.readouterr().out
    assert "14 layers into the codes of the base" in shown
    share = float(
        re.search(r"\nmerge     (?:good|poor, .*): (.*)% of the change is kept\n +least in model\.lay", shown)[1]
    )
    assert (share >= 94) == ("merge     good: " in shown)
    assert re.search(r"\n +rounding adds noise of \d+\.\d times the change, which", shown)
    folders[1] += "2"
    assert main(["merge", *folders, "--base", str(tmp_path / "model"), "--quant", "same", "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)["kept"]
    assert kept.keys() == {"share", "noise", "moved", "beyond"}


def test_losses_on_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of codes, and of a dense model, whose merge is the adapter within rounding."""
    (tmp_path / "data.jsonl").write_text('{"question": "a b", "answer": "b a"}\n{"question": "b", "answer": "a a a"}\n')
    for name, arguments in {"codes": ["--quant", "same"], "dense": []}.items():
        if name == "codes":
            gguf_fixtures.write(gguf_fixtures.make("qwen3"), "qwen3", tmp_path / "q.gguf", gguf_fixtures.floats)
            tokenizer = Checkpoint.open(tmp_path / "q.gguf").tokenizer()
            released("llama", "fp8-tiles", tmp_path / name)
        else:
            gguf_fixtures.make("qwen3").save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        adapter_on(tmp_path / name, tmp_path / f"{name}-run")
        given = ["merge", str(tmp_path / f"{name}-run"), str(tmp_path / f"{name}-out"), "--base", str(tmp_path / name)]
        assert main([*given, *arguments, "--data", str(tmp_path / "misspelt.jsonl")]) == 2
        assert not (tmp_path / f"{name}-out").exists()  # a merge in vain could not be repeated there
        capsys.readouterr()
        calibration = ["--calibration", str(tmp_path / "data.jsonl"), "--examples", "1"] if name == "codes" else []
        assert main([*given, *arguments, *calibration, "--data", str(tmp_path / "data.jsonl")]) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if "adapter " in line and "merged " in line]
        losses = {word: float(number) for word, number in re.findall(r"(base|adapter|merged) ([0-9.]+)", line)}
        assert losses.keys() == {"base", "adapter", "merged"}
        assert abs(losses["merged"] - losses["adapter"]) < (1e-3 if name == "dense" else 0.5)


# ---- GGUF files ------------------------------------------------------------------------------------------------------

KINDS = ["llama", "qwen3", "qwen3_moe", "gpt_oss", "gemma3", "mixtral"]


def without_floats(name: str, values: Tensor) -> str:
    kind = gguf_fixtures.mixed(name, values)
    return "Q8_0" if kind == "F16" and values.shape[-1] % 32 == 0 else kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_with_the_adapter_in_its_codes(kind: str, tmp_path: Path) -> None:
    path, target = tmp_path / "base.gguf", tmp_path / "merged.gguf"
    gguf_fixtures.write(gguf_fixtures.make(kind), kind, path, without_floats)
    model = adapter_on(path, tmp_path / "run")
    done = pissa.export(tmp_path / "run", target, "gguf-model")
    expected = merged_in_memory(model)
    assert done.layers == len(expected)
    assert done.bytes_written == target.stat().st_size
    new = Checkpoint.open(target)
    for name, merged in expected.items():
        assert torch.equal(new.codes(new.coded_layers[name]).codes, merged.weight.codes), name
    old, read = gguf.GGUFReader(path), gguf.GGUFReader(target)
    changed = {tensor for name in expected for part in new.coded_layers[name] for tensor in _stored(new, part.tensor)}
    for before, after in zip(old.tensors, read.tensors, strict=True):
        assert (before.name, before.tensor_type, list(before.shape)) == (
            after.name,
            after.tensor_type,
            list(after.shape),
        )
        assert (before.data.tobytes() != after.data.tobytes()) == (before.name in changed), before.name
    assert read.fields["general.name"].contents().endswith(" + run")
    assert "codes rounded at random" in read.fields["general.description"].contents()
    for name, field in old.fields.items():
        if name not in ("general.name", "general.description") and not name.startswith("GGUF."):
            assert field.contents() == read.fields[name].contents(), name
    lines = (tmp_path / "merged.Modelfile").read_text()
    assert lines.startswith("FROM ./merged.gguf\nTEMPLATE")
    assert 'PARAMETER stop "</s>"' in lines
    assert "{{ .Prompt }}" in lines
    assert lines.count("{{ .Response }}") == 1


def test_dense_matrices_of_a_gguf_file_are_summed(tmp_path: Path) -> None:
    """Also those whose rows llama.cpp stores in another order."""

    def types(name: str, values: Tensor) -> str:
        return "F16" if "q_proj" in name else without_floats(name, values)

    path, target = tmp_path / "base.gguf", tmp_path / "merged.gguf"
    gguf_fixtures.write(gguf_fixtures.make("llama"), "llama", path, types)
    adapter_on(path, tmp_path / "run")
    pissa.export(tmp_path / "run", target, "gguf-model")
    merge(tmp_path / "run", path, tmp_path / "dense")
    new, dense = Checkpoint.open(target), Checkpoint.open(tmp_path / "dense")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert new.read(name).dtype == torch.float16
    torch.testing.assert_close(new.read(name).float(), dense.read(name).float(), rtol=2**-10, atol=0)


def _stored(checkpoint: Checkpoint, name: str) -> list[str]:
    source: Any = checkpoint.stored
    return list(source.place(name).tensors)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_modelfile_has_the_prompt_of_the_training(adds_bos: bool, tmp_path: Path) -> None:
    path, target = tmp_path / "base.gguf", tmp_path / "merged.gguf"
    extra = {"tokenizer.ggml.add_bos_token": adds_bos}
    gguf_fixtures.write(gguf_fixtures.make("qwen3"), "qwen3", path, without_floats, extra)
    adapter_on(path, tmp_path / "run")
    tokenizer = Checkpoint.open(path).tokenizer()
    tokenizer.chat_template = "{{ bos_token }}Q: {{ messages[0]['content'] }} A: "
    tokenizer.save_pretrained(tmp_path / "run")
    pissa.export(tmp_path / "run", target, "gguf-model")
    prompt = "Q: {{ .Prompt }} A: {{ .Response }}"
    first = "" if adds_bos else "<s>"
    assert f'TEMPLATE """{first}{prompt}"""' in (tmp_path / "merged.Modelfile").read_text()


def test_parts_of_a_split_file_stay_parts(tmp_path: Path) -> None:
    gguf_fixtures.write(gguf_fixtures.make("llama"), "llama", tmp_path / "base.gguf", without_floats)
    parts = gguf_fixtures.split(tmp_path / "base.gguf", 3)
    adapter_on(parts[0], tmp_path / "run")
    pissa.export(tmp_path / "run", tmp_path / "merged.gguf", "gguf-model")
    pissa.export(tmp_path / "run", tmp_path / "whole.gguf", "gguf-model", base=tmp_path / "base.gguf")
    split, whole = (Checkpoint.open(tmp_path / name) for name in ("merged-00002-of-00003.gguf", "whole.gguf"))
    assert set(split.names) == set(whole.names)
    for name in split.names:
        assert torch.equal(split.read(name), whole.read(name))


# ---- Refused ---------------------------------------------------------------------------------------------------------


def refuses(words: str, run: Path, base: Path, target: Path) -> None:
    to_file = partial(pissa.export, run, target, "gguf-model", base=base)
    with pytest.raises(ValueError, match=words):
        (to_file if base.suffix == ".gguf" else partial(merge, run, base, target, quant="same"))()
    assert not target.exists()
    assert not [*target.parent.glob(".*.tmp"), *target.parent.glob("*.Modelfile")]


def test_what_is_refused(tiny_llama: Make, tmp_path: Path) -> None:
    model, path = tmp_path / "model", tmp_path / "base.gguf"
    released("llama", "mxfp4-compressed", model)
    gguf_fixtures.write(gguf_fixtures.make("llama"), "llama", path, without_floats)
    tiny_llama().save_pretrained(tmp_path / "dense")
    adapter_on(model, tmp_path / "run")
    adapter_on(path, tmp_path / "of-gguf")
    refuses("contains weights in 16 or 32 bits: leave it out", tmp_path / "run", tmp_path / "dense", tmp_path / "out")
    with pytest.raises(ValueError, match=r'got "same", and .*base\.gguf contains.*to="gguf-model"'):
        merge(tmp_path / "of-gguf", path, tmp_path / "out", quant="same")
    with pytest.raises(ValueError, match=r"dense is not written .*: transformers builds no tokenizer of its files"):
        pissa.export(tmp_path / "run", tmp_path / "out.gguf", "gguf-model", base=tmp_path / "dense")
    adapter_on(model, tmp_path / "dora", use_dora=True)
    refuses("has use_dora, whose change scales whole rows: `pissa merge`", tmp_path / "dora", model, tmp_path / "out")
    adapter_on(path, tmp_path / "trained", modules_to_save=["norm"])
    refuses("norm.* was trained whole, and only low-rank", tmp_path / "trained", path, tmp_path / "out.gguf")
    refuses("out does not end with .gguf", tmp_path / "of-gguf", path, tmp_path / "out")
    (tmp_path / "there.gguf").write_text("")
    with pytest.raises(ValueError, match=r"there\.gguf exists already and nothing is overwritten"):
        pissa.export(tmp_path / "of-gguf", tmp_path / "there.gguf", "gguf-model")
    other = gguf_fixtures.make("llama")
    nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    gguf_fixtures.write(other, "llama", tmp_path / "other.gguf", without_floats)
    refuses(
        "is not the base that .* was trained on", tmp_path / "of-gguf", tmp_path / "other.gguf", tmp_path / "o.gguf"
    )


def test_residuals_are_refused(tiny_llama: Make, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    init(tmp_path / "dense", tmp_path / "split", pissa.PissaConfig(r=4, quant="nf4", init="lora"))
    moved(pissa.load(tmp_path / "split")).save_pretrained(tmp_path / "run")
    refuses(
        "contains a residual of pissa|trained on a residual", tmp_path / "run", tmp_path / "split", tmp_path / "out"
    )
