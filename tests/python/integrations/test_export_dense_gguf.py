"""`to="gguf-model"` from a base in safetensors: the new file is the merged model, with its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

import gguf_fixtures
import pissa
from daily import each
from dense_bases import KINDS, WORDS, finished, tokenizer_of, trained, trained_with_eyes
from gguf_fixtures import MODELS
from language_models import error, logits
from pissa.checkpoints.merge import merge
from pissa.containers.checkpoint import Checkpoint
from pissa.containers.gguf_file import GgufFile
from pissa.containers.gguf_metadata import metadata_of
from pissa.containers.gguf_tokenizer import SAMPLE, tokenizer_metadata

DAILY = {
    "llama",
    "llama3",
    "mixtral",
    "qwen2",
    "qwen3_5_moe",
    "gemma3",
    "gemma4",
    "longrope",
    "gpt_oss",
    "lfm2",
    "nemotron",
}
TEXTS = [
    SAMPLE,
    "<s>What is 12,345 + 67?</s> ",
    "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940 \u20ac 2024",
]


def split(name: str) -> Any:
    expression = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated")
    return pre_tokenizers.Sequence([expression, BYTES])


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS])
SPLITS = {"gpt-2": WORDS, "smollm": DIGITS} | {name: split(name) for name in ("llama-bpe", "qwen2", "tekken", "gpt-4o")}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", each(KINDS, DAILY))
def test_the_file_is_the_merged_model(kind: str, tmp_path: Path) -> None:
    """Every weight as `merge` writes it, and the same model around them."""
    base, run = trained(kind, torch.bfloat16, tokenizer_of(WORDS), tmp_path)
    merge(run, base, tmp_path / "merged")
    done = pissa.export(run, tmp_path / "out" / "model.gguf", "gguf-model", base=base)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.Modelfile", "model.gguf"]
    assert "ollama create NAME -f" in done.load
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    file = Checkpoint.open(tmp_path / "out" / "model.gguf")
    matrices = [entry.dtype for name, entry in file.files[0].entries.items() if len(entry.shape) > 1]
    assert set(matrices) - {torch.float32} == {torch.bfloat16}
    expected, names = merged.state_dict(), set(file.stored.names)
    assert names == expected.keys() - ({"lm_head.weight"} if merged.config.tie_word_embeddings else set())
    for name in names:
        torch.testing.assert_close(file.stored.read(name).float(), expected[name], rtol=0, atol=1e-7)
    read: Any = pissa.load(tmp_path / "out" / "model.gguf", r=1, init="lora", dtype=torch.float32).eval()
    ids = torch.arange(3, 43)[None]
    torch.testing.assert_close(read(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_longrope_has_the_factor_of_transformers() -> None:
    model: Any = gguf_fixtures.make("longrope")
    factor = metadata_of(model.config, "phi3", {})["phi3.rope.scaling.attn_factor"]
    assert factor == pytest.approx(model.model.rotary_emb.attention_scaling)
    assert factor > 1


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "qwen3_5"])
def test_of_a_model_that_reads_images_the_text_part_is_written(kind: str, tmp_path: Path) -> None:
    base, run = trained_with_eyes(kind, tokenizer_of(WORDS), tmp_path, r".*language_model.*(q|down)_proj")
    done = pissa.export(run, tmp_path / "out.gguf", "gguf-model", base=base)
    assert done.written == "out.gguf, and out.Modelfile for Ollama; for images, take the original model's mmproj file"
    merge(run, base, tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    read: Any = pissa.load(tmp_path / "out.gguf", r=1, init="lora", dtype=torch.float32).eval()
    ids = torch.arange(3, 43)[None]
    assert error(logits(read, ids), logits(merged, ids)) < 1e-5


def test_what_changes_the_part_for_images_is_refused(tmp_path: Path) -> None:
    base, run = trained_with_eyes("gemma3", tokenizer_of(WORDS), tmp_path, r".*vision_tower.*fc1")
    said = "the adapter changes model.vision_tower.encoder.layers.0.mlp.fc1, and only the model for text is written"
    with pytest.raises(ValueError, match=said):
        pissa.export(run, tmp_path / "out.gguf", "gguf-model", base=base)


def stored(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt_oss", "qwen3_5"])
def test_codes_are_those_of_gguf(kind: str, tmp_path: Path) -> None:
    """Of the matrices in 16 bits, in the file's order; rows that are no full blocks stay in 16 bits."""
    base, run = trained(kind, torch.bfloat16, tokenizer_of(WORDS), tmp_path, intermediate_size=80)
    for name, options in {"dense": {}, "codes": {"type": "q8_0"}}.items():
        pissa.export(run, tmp_path / f"{name}.gguf", "gguf-model", base=base, **options)
    dense, codes = stored(tmp_path / "dense.gguf"), stored(tmp_path / "codes.gguf")
    assert dense.keys() == codes.keys()
    is_coded = {name: tensor.tensor_type.name == "Q8_0" for name, tensor in codes.items()}
    for name, tensor in dense.items():
        expected = tensor.data
        if is_coded[name]:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        np.testing.assert_array_equal(codes[name].data, expected, err_msg=name)
        is_matrix = len(tensor.shape) > 1 and tensor.tensor_type.name == "BF16"
        assert is_coded[name] == (is_matrix and tensor.shape[0] % 32 == 0 and "ssm_out" not in name), name
    assert not all(is_coded[name] for name, tensor in dense.items() if tensor.tensor_type.name == "BF16")
    model, coded = (Checkpoint.open(tmp_path / f"{name}.gguf") for name in ("dense", "codes"))
    assert all(error(coded.read(name), model.read(name)) < 0.01 for name in model.names)


def test_types_are_for_new_files(tmp_path: Path) -> None:
    base, run = trained("llama", torch.float16, tokenizer_of(WORDS), tmp_path)
    for to, options, said in [
        ("vllm", {"type": "q8_0"}, r"type: got one, and to='vllm'; it is for to=\"gguf-model\": leave it out"),
        ("gguf-model", {"type": "q4_k"}, "type: got 'q4_k'; allowed: 'q8_0'"),
    ]:
        with pytest.raises(ValueError, match=said):
            pissa.export(run, tmp_path / "out.gguf", to, base=base, **options)
    pissa.export(run, tmp_path / "out.gguf", "gguf-model", base=base)
    model = pissa.load(tmp_path / "out.gguf", r=2, init="lora", target_modules="all-linear")
    model.save_pretrained(tmp_path / "of the file")
    with pytest.raises(ValueError, match=r"type: got 'q8_0', and .*out.gguf is a GGUF file, which keeps its types: l"):
        pissa.export(tmp_path / "of the file", tmp_path / "again.gguf", "gguf-model", type="q8_0")


@pytest.mark.parametrize("name", SPLITS)
def test_texts_of_many_scripts_become_the_same_tokens(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(SPLITS[name])
    base, run = trained("llama", torch.float16, tokenizer, tmp_path)
    pissa.export(run, tmp_path / "model.gguf", "gguf-model", base=base)
    metadata = GgufFile(tmp_path / "model.gguf").metadata
    assert metadata["tokenizer.ggml.pre"] == name
    assert metadata["tokenizer.ggml.eos_token_id"] == 2
    assert metadata["tokenizer.ggml.token_type"] == [3] * 3 + [1] * (len(tokenizer) - 3) + [5] * 3
    read, own = Checkpoint.open(tmp_path / "model.gguf").tokenizer(), AutoTokenizer.from_pretrained(base)
    assert read.chat_template == own.chat_template
    for text in TEXTS:
        assert read(text).input_ids == own(text).input_ids


def pieces(prepends: bool) -> Any:
    """A tokenizer as SentencePiece's, with tokens of bytes for what it does not know."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps: list[Any] = [normalizers.Prepend("\u2581")] if prepends else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    first = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    text = "Hello world, the three most important things to know about the sea are these"
    backend.train_from_iterator([text] * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=first[:4]))
    trained_on = backend.get_vocab(with_added_tokens=False)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    rest = [token for token, _ in sorted(trained_on.items(), key=lambda item: item[1]) if token not in first]
    vocabulary = {token: index for index, token in enumerate([*first, *rest])}
    backend.model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    return finished(backend)


def test_the_scores_of_pieces_join_in_the_order_of_the_merges(tmp_path: Path) -> None:
    tokenizer = pieces(prepends=True)
    metadata = tokenizer_metadata(tokenizer, len(tokenizer), [2])
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    joined = [scores["".join(pair)] for pair in merges]
    assert joined == sorted(joined, reverse=True)
    assert len(set(joined)) > 50


def test_what_is_not_written_is_refused_with_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is left."""
    monkeypatch.setitem(MODELS, "olmo2", ("olmo2", "Olmo2", {"head_dim": 16}))
    base, run = trained("olmo2", torch.float16, tokenizer_of(WORDS), tmp_path)
    message = r"is not written as a GGUF file: it is a Olmo2ForCausalLM; written are .*run `pissa merge .*run merged "
    message += r"--base .*`, and let .*Ollama: `echo FROM \./merged > Modelfile`, `ollama create NAME -f Mod.* \[P148\]"
    with pytest.raises(ValueError, match=message):
        pissa.export(run, tmp_path / "out" / "model.gguf", "gguf-model", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("mistral", {"sliding_window": 16}, "sliding_window=16 becomes None"),
        ("gemma2", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar=7 becomes 32"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, r"no_rope_layers=\[1, 0, 1, 0\] becomes \[1, 1, 1, 0\]"),
        (
            "qwen3_5",
            {"linear_value_head_dim": 16},
            "linear_value_head_dim is 16; llama.cpp has that of keys, which is 32",
        ),
    ],
)
def test_what_a_file_cannot_say_is_refused(kind: str, fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    """llama.cpp would compute another model, without a word."""
    base, run = trained(kind, torch.float16, tokenizer_of(WORDS), tmp_path, **fields)
    with pytest.raises(ValueError, match=said):
        pissa.export(run, tmp_path / "out" / "model.gguf", "gguf-model", base=base)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_splits_otherwise_is_refused(tmp_path: Path) -> None:
    base, run = trained(
        "llama", torch.float16, tokenizer_of(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), WORDS])), tmp_path
    )
    with pytest.raises(ValueError, match="its tokenizer splits texts in a way that is not written; written are gpt-2"):
        pissa.export(run, tmp_path / "out" / "model.gguf", "gguf-model", base=base)
    assert not (tmp_path / "out").exists()
