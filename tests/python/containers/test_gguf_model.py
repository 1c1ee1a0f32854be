"""Models in GGUF files: config.json, tokenizer and weights as the original has them."""

from __future__ import annotations

import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import gguf_fixtures
from hub_cache import HubCache
from mapped_files import unmap_unused
from pissa import notices
from pissa.checkpoints.load import mapped_model
from pissa.containers.checkpoint import Checkpoint, Contents, ModelFolder
from pissa.containers.gguf_file import GgufFile
from pissa.containers.gguf_tokenizer import tokenizer_of
from pissa.containers.hub import model_files, weight_files
from pissa.containers.model_folder import Part
from pissa.ops.formats import READ

# What transformers decides by itself, or what does not matter to the model.
_OF_NO_USE = {"architectures", "dtype", "model_type", "initializer_range", "attention_bias", "mlp_bias", "head_dim"}
_OF_NO_USE |= {"pretraining_tp", "transformers_version"}


def written(kind: str, folder: Path, types: Any = gguf_fixtures.floats, **extra: Any) -> Path:
    path = folder / f"{kind}.gguf"
    gguf_fixtures.write(gguf_fixtures.make(kind), kind, path, types, extra)
    return path


@pytest.mark.parametrize("kind", gguf_fixtures.MODELS)
def test_config_and_weights_are_the_models(kind: str, tmp_path: Path) -> None:
    model: Any = gguf_fixtures.make(kind)
    gguf_fixtures.write(model, kind, tmp_path / "x.gguf")
    checkpoint = Checkpoint.open(tmp_path / "x.gguf")
    assert (checkpoint.contents, checkpoint.name) == (Contents.GGUF, str(tmp_path / "x.gguf"))
    ours, theirs = checkpoint.built_config().to_dict(), model.config.to_dict()
    if "yarn" in str(theirs["rope_parameters"]):  # the defaults
        theirs["rope_parameters"] = {"beta_fast": 32.0, "beta_slow": 1.0} | theirs["rope_parameters"]
        ours["rope_parameters"] = {"beta_fast": 32.0, "beta_slow": 1.0} | ours["rope_parameters"]
    assert {name for name in theirs if ours.get(name) != theirs[name]} <= _OF_NO_USE
    state = model.state_dict()
    assert len(checkpoint.names) == len(state) - model.config.tie_word_embeddings
    for name in checkpoint.names:
        assert checkpoint.entry(name).shape == state[name].shape
        torch.testing.assert_close(checkpoint.read(name), state[name], rtol=1e-6, atol=2e-7)


def test_codes_are_views_but_for_rows_that_move(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(written("llama", tmp_path, gguf_fixtures.mixed))
    kept, moved = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight")
    assert {name: checkpoint.coded[name].read().format for name in (kept, moved)} == {kept: "q4_0", moved: "q8_0"}
    first, second = (checkpoint.coded[kept].read().codes.data_ptr() for _ in range(2))
    assert first == second
    weight = checkpoint.coded[kept].read()
    assert weight.codes.numel() == weight.shape[0] * weight.shape[1] // 32 * READ["q4_0"].block_bytes
    assert checkpoint.nbytes(moved) == checkpoint.codes([Part(moved)]).codes.numel()
    assert "lm_head.weight" in checkpoint.names
    checkpoint.release(checkpoint.names)
    checkpoint.ahead(checkpoint.names)
    assert torch.equal(checkpoint.coded[kept].read().codes, weight.codes)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_are_read_one_by_one(kind: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(written(kind, tmp_path, gguf_fixtures.mixed))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    whole = checkpoint.read(name)
    assert whole.shape == checkpoint.entry(name).shape == checkpoint.tensors[name].shape
    assert all(torch.equal(whole[number], checkpoint.read(name, number)) for number in range(4))
    assert len(checkpoint.layers_of(name)) == 4


def test_halves_of_experts_in_two_types_are_refused(tmp_path: Path) -> None:
    import gguf

    path = written("mixtral", tmp_path, lambda name, _: "Q8_0" if "experts" in name else "F32")
    content, kind = path.read_bytes(), gguf.GGMLQuantizationType.I8  # that takes no more bytes
    place = content.index(b"blk.0.ffn_up_exps.weight") + len("blk.0.ffn_up_exps.weight") + 4 + 3 * 8
    path.write_bytes(content[:place] + int(kind).to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(ValueError, match=r"ffn_gate_exps.*ffn_up_exps.*, which make .*gate_up_proj, are of different"):
        Checkpoint.open(path)


def test_unknown_divisors_of_frequencies_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_fixtures, "llama3_divisors", lambda *_: [1.0 + number for number in range(16)])
    rope = ModelFolder.open(written("llama3", tmp_path)).built_config().rope_parameters
    assert (rope["rope_type"], rope["short_factor"], rope["attention_factor"]) == ("longrope", rope["long_factor"], 1)
    assert rope["long_factor"] == [1.0 + number for number in range(16)]


# ---- Refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"general.architecture": "deepseek2"}, "a model of the architecture 'deepseek2'; read are .*gemma4, gpt-oss"),
        ({"general.architecture": ["qwen3"]}, r"a model of the architecture \['qwen3'\]; read are"),
        ({"qwen3.nextn_predict_layers": [1]}, r"qwen3.nextn_predict_layers is \[1\]; needed: a number of blocks"),
        ({"qwen3.nextn_predict_layers": 2**31}, "qwen3.nextn_predict_layers is 2147483648; needed"),
        ({"qwen3.attention.shared_kv_layers": [1]}, r"shared_kv_layers is \[1\]; needed: a number of blocks, up to 2"),
        ({"qwen3.attention.shared_kv_layers": 2**31}, "shared_kv_layers is 2147483648; needed"),
        ({"qwen3.block_count": 3}, "lacks 11 tensors of a Qwen3ForCausalLM, 'model.layers.2"),
        ({"qwen3.block_count": 1}, r"11 tensors, 'blk.1.*' the first, have no place in a Qwen3ForCausalLM of 1 layers"),
        ({"qwen3.block_count": 2**31}, "block_count is 2,147,483,648, and there are 25 tensors.*config_from="),
        ({"qwen3.embedding_length": 32}, r"'.*' make \[.*\], and model.* of the model is \["),
        ({"qwen3.attention.head_count": "four"}, r"cannot be read: .*str"),
        ({"qwen3.rope.scaling.type": "dynamic"}, "rope.scaling.type is 'dynamic'; known: none, linear, yarn, longrope"),
    ],
)
def test_what_contradicts_itself_is_refused(extra: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = written("qwen3", tmp_path, **extra)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.*({words})"):
        mapped_model(Checkpoint.open(path), None)


@pytest.mark.parametrize("kind", ["llama3", "gemma3", "gemma4", "qwen3_5_moe", "gpt_oss", "phi3"])
def test_changed_headers_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    path, choice = written(kind, tmp_path, gguf_fixtures.mixed), random.Random(kind)
    content = path.read_bytes()
    end = content.index(b"blk.0.")
    for _ in range(100):
        changed = bytearray(content)
        for _ in range(choice.randint(1, 3)):
            changed[choice.randrange(24, end)] = choice.randrange(256)
        unmap_unused()
        path.write_bytes(changed)
        said = str(path)
        try:
            Checkpoint.open(path)
        except ValueError as error:
            said = str(error)
        assert str(path) in said


@pytest.mark.parametrize(
    ("kind", "name", "other"),
    [
        ("gemma4", "blk.1.attn_v.weight", "blk.1.attn_v.weighs"),  # the last two of its four layers share them
        ("gemma4", "blk.2.attn_q.weight", "blk.2.attn_q.weighs"),
        ("qwen3", "blk.1.attn_output.weight", "blk.1.attn_v.weight.else"),  # no layer does
    ],
)
def test_only_keys_and_values_that_are_shared_may_be_left_over(
    kind: str, name: str, other: str, tmp_path: Path
) -> None:
    path = written(kind, tmp_path)
    path.write_bytes(path.read_bytes().replace(name.encode(), other.encode()))
    with pytest.raises(ValueError, match=rf"1 tensors, '{other}' the first, have no place in a \w+ForCausalLM"):
        Checkpoint.open(path)


def test_metadata_that_do_not_describe_the_model_ask_for_a_configuration(tmp_path: Path) -> None:
    path = written("granite", tmp_path, **{"granite.rope.scaling.type": "dynamic"})
    with pytest.raises(ValueError, match=r"granite.gguf cannot be read: rope.scaling.type is 'dynamic'.*config_from="):
        ModelFolder.open(path)
    model: Any = gguf_fixtures.make("granite")
    model.config.architectures = ["GraniteForCausalLM"]
    model.config.save_pretrained(tmp_path / "config")
    opened = Checkpoint.open(path, config_from=tmp_path / "config")
    assert opened.built_config().residual_multiplier == 0.5
    assert sorted(opened.names) == sorted(model.state_dict())
    with pytest.raises(ValueError, match="is no GGUF file and describes itself: leave config_from out"):
        ModelFolder.open(tmp_path / "config", config_from=path.parent)


# ---- Tokenizers ------------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_the_files(tmp_path: Path) -> None:
    opened = ModelFolder.open(written("qwen3", tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = opened.tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a</s>"
    assert tokenizer("a</s>").input_ids[-1] == 2
    assert tokenizer.model_max_length == 128
    with opened.small_files() as folder:
        assert (folder / "tokenizer.json").is_file()


@pytest.mark.parametrize("length", ["long", [128]])
def test_a_context_that_is_no_number_is_refused(length: Any, tmp_path: Path) -> None:
    path = written("qwen3", tmp_path, **{"qwen3.context_length": length})
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} cannot be read: .*config_from="):
        tokenizer_of(GgufFile(path))


def test_the_tokenizer_of_gemma_4(tmp_path: Path) -> None:
    """Spaces and merges are the file's; its chat template writes the first token itself."""
    tokens = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<turn|>",
        "<|tool>",
        *map(chr, range(97, 123)),
        "▁",
        "▁▁",
        "ab",
        "▁ab",
    ]
    tokens += [f"<0x{byte:02X}>" for byte in range(60)]
    fields = {"model": "gemma4", "tokens": tokens, "token_type": [3, 3, 3, 3, 3, 4, *[1] * 30, *[6] * 60]}
    fields |= {"merges": ["a b", "▁ ab", "▁ ▁"], "add_bos_token": True, "add_space_prefix": False}
    fields |= {"eos_token_id": 1, "eot_token_id": 4, "bos_token_id": 2, "unknown_token_id": 3}
    path = written("gemma4", tmp_path, **{f"tokenizer.ggml.{name}": value for name, value in fields.items()})
    opened = ModelFolder.open(path)
    assert opened.config["eos_token_id"] == [1, 4]
    tokenizer, text = opened.tokenizer(), "ab ab  c<turn|>\n<|tool>"
    ids = tokenizer(text).input_ids
    assert [tokens[number] for number in ids] == ["ab", "▁ab", "▁▁", "c", "<turn|>", "<0x0A>", "<|tool>"]
    assert (tokenizer.decode(ids), tokenizer.bos_token, tokenizer.eos_token) == (text, "<bos>", "<eos>")


def test_a_missing_end_token_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = gguf_fixtures.metadata

    def without_end(*args: Any) -> dict[str, Any]:
        return {name: value for name, value in described(*args).items() if "eos" not in name}

    monkeypatch.setattr(gguf_fixtures, "metadata", without_end)
    path = written("qwen3", tmp_path)
    with pytest.warns(notices.NoEndTokenWarning, match="names no end token"):
        assert ModelFolder.open(path).tokenizer().eos_token is None


def test_several_tokens_end_an_answer(tmp_path: Path) -> None:
    ends = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2}
    assert ModelFolder.open(written("qwen3", tmp_path, **ends)).config["eos_token_id"] == [2, 5]


def test_a_large_vocabulary_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks the Hub about tokenizers of more than 100,000 tokens, by their names."""
    tokens = ["<pad>", "<s>", "</s>", "ab", *map(chr, range(33, 127)), *(f"token{i}" for i in range(100_010))]
    vocabulary = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(tokens) - 3)]}
    path = written("llama", tmp_path, **vocabulary)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tokenizer = tokenizer_of(GgufFile(path))
    assert len(tokenizer) > 100_000
    assert tokenizer.name_or_path == str(path)


# ---- The Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts files of these names into the cache, as a repository."""
    cache = HubCache(tmp_path / "cache", monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(name: str, *files: str) -> str:
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(file)
        return cache.put(name, tmp_path / name)

    return put


def test_files_of_the_hub_by_their_tags(repository: Any) -> None:
    split = [f"Q8_0/m-Q8_0-{number:05}-of-00002.gguf" for number in (1, 2)]
    repository("us/m-GGUF", "m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf", "m-Q4_K_S.gguf", "mmproj-F16.gguf", *split)
    chosen = {"": "m-Q4_K_M.gguf", ":q4_k_m": "m-Q4_K_M.gguf", ":UD-Q4_K_M": "m-UD-Q4_K_M.gguf", ":Q8_0": split[0]}
    for tag, file in chosen.items():
        for files in (model_files, weight_files):
            path = files(f"us/m-GGUF{tag}")
            assert path.read_text() == file
    assert model_files("us/m-GGUF:q8_0").with_name("m-Q8_0-00002-of-00002.gguf").is_file()
    with pytest.raises(ValueError, match=r"no GGUF file with q2_k in its name; it has Q8_0/m-Q8_0-0.*, m-Q4_K_M"):
        model_files("us/m-GGUF:Q2_K")
    with pytest.raises(ValueError, match="several files with Q4 in their names"):
        model_files("us/m-GGUF:Q4")
    repository("us/one-gguf", "model-F16.gguf")
    assert model_files("us/one-gguf").read_text() == "model-F16.gguf"
    with pytest.raises(
        ValueError, match=r"'us/none' has no GGUF files: .*huggingface_hub, asked for a repository of that name, says"
    ):
        model_files("us/none:Q4_K_M")
