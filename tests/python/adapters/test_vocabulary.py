"""A vocabulary that was resized: its rows are random, so they travel with the adapter, whatever layers it adapts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pissa
from damage import write_marked
from devices import put
from language_models import FORMS, Make, assert_same, error, logits, snapshot, train
from mapped_files import read_tensors
from pissa import PissaConfig, PissaModel, notices
from pissa.containers.tensor_file import write_tensors

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")

SIZE, GROWN = 97, 104
EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"

Grown = Callable[..., nn.Module]
"""The fixture `grown`."""


@pytest.fixture
def grown(tiny_llama: Make, tmp_path: Path) -> Grown:
    """Loads a small Llama from its folder, in the way of users, and grows its vocabulary by random rows."""
    from transformers import LlamaForCausalLM

    def load(seed: int, *, tied: bool = False, size: int = GROWN, dtype: torch.dtype = torch.float32) -> nn.Module:
        folder = tmp_path / f"base{tied}"
        if not folder.exists():
            tiny_llama(tie_word_embeddings=tied).save_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        if size != SIZE:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model.resize_token_embeddings(size, mean_resizing=False)
        return put(model).eval()

    return load


@pytest.fixture
def new_tokens() -> Tensor:
    """A batch of token ids [3, 11], the new ones among them."""
    ids = torch.randint(0, GROWN, (3, 11), generator=torch.Generator().manual_seed(1))
    ids[:, 1] = GROWN - 1
    return put(ids)


def saved(folder: Path) -> set[str]:
    """The names of the tensors of the vocabulary that are the base's own, less the prefix."""
    names = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.") for name in names if name.endswith("weight") and ".lora_" not in name
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head"]])
def test_the_new_rows_come_back(
    targets: list[str], tied: bool, grown: Grown, new_tokens: Tensor, tmp_path: Path
) -> None:
    assert not torch.equal(*(logits(grown(seed, tied=tied), new_tokens) for seed in (1, 2)))
    before = logits(grown(1, tied=tied), new_tokens)
    model = pissa.wrap(grown(1, tied=tied), r=4, target_modules=targets)
    train(model, new_tokens)
    model.save_pretrained(tmp_path / "a")
    assert saved(tmp_path / "a") == {
        f"{name}.base_layer.weight" if leaf in targets else f"{name}.weight"
        for name, leaf in (("model.embed_tokens", "embed_tokens"), ("lm_head", "lm_head"))
    }
    expected = logits(model, new_tokens)
    goes_on = train(model, new_tokens)

    again = PissaModel.from_pretrained(grown(2, tied=tied), tmp_path / "a", is_trainable=True)
    assert torch.equal(logits(again, new_tokens), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again, new_tokens), before)
    assert train(again, new_tokens) == goes_on
    plain = peft.PeftModel.from_pretrained(grown(3, tied=tied), tmp_path / "a")
    assert error(logits(plain, new_tokens), expected) < 1e-5  # float32, two layers


@pytest.mark.parametrize("form", ["explicit", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_layer_that_is_kept_as_a_residual(
    form: str, dtype: torch.dtype, grown: Grown, new_tokens: Tensor, tmp_path: Path
) -> None:
    """Its dense weight is not in memory any more: the residual is written, and takes the place of any weight."""
    model = pissa.wrap(grown(1, dtype=dtype), r=4, target_modules=["lm_head", "q_proj"], **FORMS[form])
    train(model, new_tokens)
    model.save_pretrained(tmp_path / "a")
    expected = logits(model, new_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # as of a residual that rounds otherwise
        again = PissaModel.from_pretrained(grown(2, dtype=dtype), tmp_path / "a", is_trainable=True)
    assert torch.equal(logits(again, new_tokens), expected)
    again.save_pretrained(tmp_path / "b")
    for name in ("adapter_model.safetensors", "pissa.json", "pissa.safetensors", "pissa_codes.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again.load_adapter(tmp_path / "a", "second")
    again.set_adapter("second")
    assert torch.equal(logits(again, new_tokens), expected)

    codes = read_tensors(tmp_path / "a" / "pissa_codes.safetensors")
    codes["lm_head.codes" if form == "nf4" else "lm_head.residual"].view(torch.uint8).view(-1)[0] ^= 1
    write_tensors(tmp_path / "a" / "pissa_codes.safetensors", codes)
    refuse(grown(2, dtype=dtype), tmp_path / "a", r"pissa_codes\.safetensors is not that of pissa\.safetensors")


def refuse(base: nn.Module, folder: Path, words: str) -> None:
    before = snapshot(base)
    with pytest.raises(ValueError, match=words):
        PissaModel.from_pretrained(base, folder)
    assert_same(base, before)


def test_what_is_written_when(grown: Grown, tiny_llama: Make, tmp_path: Path) -> None:
    """ "auto" compares the vocabulary with the files of the base; where these are not at hand nothing may be lost."""
    both = {"lm_head.weight", "model.embed_tokens.weight"}
    adapted = {"lm_head.weight", "model.embed_tokens.base_layer.weight"}

    def written(base: nn.Module, target: str, asked: Any) -> set[str]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        pissa.wrap(base, r=4, target_modules=[target]).save_pretrained(folder, save_embedding_layers=asked)
        return saved(folder)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert written(grown(1, size=SIZE), "embed_tokens", "auto") == set()
        assert written(grown(1, size=SIZE), "embed_tokens", True) == adapted
        assert written(grown(1, size=SIZE - 2), "q_proj", "auto") == both
        assert written(grown(1), "embed_tokens", False) == set()
        assert written(tiny_llama(), "embed_tokens", "auto") == adapted  # of no files at all
        assert written(tiny_llama(), "q_proj", "auto") == set()
        assert written(nn.Sequential(nn.Linear(8, 8)), "0", "auto") == set()
    with pytest.warns(notices.NoEmbeddingsWarning, match="Could not identify embedding layer"):  # PEFT's words
        assert written(nn.Sequential(nn.Linear(8, 8)), "0", True) == set()
    bases = [grown(1), grown(1)]
    (tmp_path / "baseFalse" / "config.json").unlink()
    assert written(bases[0], "embed_tokens", "auto") == adapted
    assert written(bases[1], "q_proj", "auto") == both
    with pytest.raises(ValueError, match="save_embedding_layers must be \"auto\", True or False, got 'all'"):
        written(tiny_llama(), "q_proj", "all")


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens", "lm_head"])
def test_a_base_that_was_not_resized_is_told_how(target: str, grown: Grown, tmp_path: Path) -> None:
    pissa.wrap(grown(1), r=4, target_modules=[target]).save_pretrained(tmp_path / "a")
    words = rf"is torch.float32 \[104, 64\], expected .*call model\.resize_token_embeddings\({GROWN}\) before"
    refuse(grown(1, size=SIZE), tmp_path / "a", words)


def test_another_base_is_still_refused(grown: Grown, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    pissa.wrap(grown(1), r=4, target_modules=["embed_tokens", "q_proj"]).save_pretrained(folder)
    other = grown(2)
    other.model.layers[1].self_attn.q_proj.weight.data[0, 0] += 1e-3
    refuse(other, folder, r"first layer that differs is model\.layers\.1\.self_attn\.q_proj")
    with pytest.warns(notices.OtherDtypeWarning, match=r"in torch.float32, which is in torch.bfloat16 here"):
        PissaModel.from_pretrained(grown(1, dtype=torch.bfloat16), folder)

    tensors = read_tensors(folder / "pissa.safetensors")
    tensors[f"{EMBEDDING}.base_layer.weight"][5, 5] += 1
    write_marked(folder, tensors)
    refuse(grown(1), folder, "not the weight that layer model.embed_tokens was trained on")


def test_a_wider_dtype_holds_the_rows(grown: Grown, new_tokens: Tensor, tmp_path: Path) -> None:
    model = pissa.wrap(grown(1, dtype=torch.bfloat16), r=4, target_modules=["embed_tokens"])
    model.save_pretrained(tmp_path / "a")
    again = PissaModel.from_pretrained(grown(2, dtype=torch.bfloat16).float(), tmp_path / "a")
    assert torch.equal(logits(again, new_tokens), logits(grown(1, dtype=torch.bfloat16).float(), new_tokens))


def test_tied_or_not_in_both_places(grown: Grown, new_tokens: Tensor, tmp_path: Path) -> None:
    for tied in (False, True):
        model = pissa.wrap(grown(1, tied=tied), r=4, target_modules=["embed_tokens"])
        train(model, new_tokens)
        model.save_pretrained(tmp_path / str(tied))
    again = PissaModel.from_pretrained(grown(2), tmp_path / "True")
    assert torch.equal(logits(again, new_tokens), logits(model, new_tokens))
    refuse(grown(2, tied=True), tmp_path / "False", "which in this model shares its weight: untie them first")


def test_other_adapters_keep_the_embedding_that_they_know(grown: Grown, new_tokens: Tensor, tmp_path: Path) -> None:
    for seed in (1, 2):
        pissa.wrap(grown(seed), r=4, target_modules=["embed_tokens"]).save_pretrained(tmp_path / str(seed))
    model = PissaModel.from_pretrained(grown(3), tmp_path / "1")
    before = snapshot(model)
    with pytest.raises(ValueError, match="differs from the model's embedding, which the model's other adapters were"):
        model.load_adapter(tmp_path / "2", "second")
    assert_same(model, before)
    model.load_adapter(tmp_path / "1", "second")
    with pytest.raises(ValueError, match="differs from the model's embedding"):
        model.load_adapter(tmp_path / "2", "default")
    model.delete_adapter("second")
    model.load_adapter(tmp_path / "2", "default")  # alone, it brings its own
    assert torch.equal(logits(model, new_tokens), logits(grown(2), new_tokens))


def test_adapters_of_other_layers_call_it_by_its_own_name(grown: Grown, new_tokens: Tensor, tmp_path: Path) -> None:
    """The embedding carries another adapter: in the files of this one it is a plain layer; merged or not."""
    model = pissa.wrap(grown(1), r=4, target_modules=["embed_tokens", "lm_head"])
    model.add_adapter("second", PissaConfig(r=4, target_modules=["q_proj"]))
    train(model, new_tokens)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "a")
    assert saved(tmp_path / "a" / "second") == {"lm_head.weight", "model.embed_tokens.weight"}
    for load in (PissaModel, peft.PeftModel):
        again = load.from_pretrained(grown(2), tmp_path / "a" / "second")
        assert torch.equal(logits(again, new_tokens), logits(grown(1), new_tokens))


@pytest.mark.cpu_only
def test_an_offloaded_embedding_is_read_and_not_overwritten(grown: Grown, new_tokens: Tensor, tmp_path: Path) -> None:
    from accelerate import cpu_offload

    def offloaded(seed: int) -> nn.Module:
        return cpu_offload(grown(seed), execution_device=torch.device("cpu"))

    pissa.wrap(offloaded(1), r=4, target_modules=["embed_tokens"]).save_pretrained(tmp_path / "a")
    for load in (offloaded, lambda seed: grown(seed + 1)):
        again = PissaModel.from_pretrained(load(1), tmp_path / "a")
        assert torch.equal(logits(again, new_tokens), logits(grown(1), new_tokens))
    refuse(offloaded(2), tmp_path / "a", "differs from the model's embedding, which is offloaded: give it a device")


def test_an_embedding_that_is_partitioned_is_refused_by_that(grown: Grown, tmp_path: Path) -> None:
    pissa.wrap(grown(1), r=4, target_modules=["q_proj"]).save_pretrained(tmp_path / "a")
    base: Any = grown(2)
    weight = base.lm_head.weight
    weight.ds_id, weight.ds_shape, weight.data = 0, weight.shape, torch.empty(0)
    refuse(base, tmp_path / "a", r"has the base's .*lm_head\.weight, which DeepSpeed ZeRO-3 has partitioned here")


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_modules_to_save_have_an_original(modules: list[str], grown: Grown, new_tokens: Tensor, tmp_path: Path) -> None:
    model = pissa.wrap(grown(1), r=4, target_modules=["q_proj"], modules_to_save=modules)
    train(model, new_tokens)
    model.save_pretrained(tmp_path / "a")
    for load, tolerance in ((PissaModel, 0), (peft.PeftModel, 1e-5)):
        again = load.from_pretrained(grown(2), tmp_path / "a")
        assert error(logits(again, new_tokens), logits(model, new_tokens)) <= tolerance
        with again.disable_adapter():
            assert torch.equal(logits(again, new_tokens), logits(grown(1), new_tokens))


def test_the_bias_of_an_output_layer_travels(tmp_path: Path) -> None:
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {"vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1}
    PhiForCausalLM(PhiConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path / "base")

    def load(bias: float) -> nn.Module:
        model = PhiForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(GROWN)
        model.lm_head.bias.data[SIZE:] = bias
        return put(model).eval()

    for target in ("lm_head", "q_proj"):
        pissa.wrap(load(1.0), r=4, target_modules=[target]).save_pretrained(tmp_path / target)
        for kind in (PissaModel, peft.PeftModel):
            head = kind.from_pretrained(load(2.0), tmp_path / target).base_model.model.lm_head
            assert (head.bias[SIZE:] == 1).all()


def test_an_embedding_without_rows_is_refused(tiny_llama: Make, tmp_path: Path) -> None:
    model = pissa.wrap(tiny_llama(), r=4)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    tensors, key = read_tensors(tmp_path / "pissa.safetensors"), f"{EMBEDDING}.weight"
    write_marked(tmp_path, tensors | {key: tensors[key].sum()})
    with pytest.raises(ValueError, match=rf"{key}' is torch\.float32 \[\], expected"):
        model.load_adapter(tmp_path, "default")
