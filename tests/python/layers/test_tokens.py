"""trainable_token_indices: rows of an embedding that are trained beside the adapter, in PEFT's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pissa
from daily import each
from devices import put
from language_models import FORMS, Make, assert_same, error, logits, snapshot, train
from pissa import PissaConfig, PissaModel
from trainers import trainable

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")

TOKENS = [1, 5, 96]
DELTA = "token_adapter.trainable_tokens_delta"
EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
WHERE: dict[str, tuple[Any, set[str]]] = {
    "list": (TOKENS, {EMBEDDING}),
    "name": ({"embed_tokens": TOKENS}, {EMBEDDING}),
    "head": ({"lm_head": TOKENS}, {HEAD}),
    "both": ({"embed_tokens": TOKENS, "lm_head": [2, 3]}, {EMBEDDING, HEAD}),
}
tied = pytest.mark.parametrize("tie", [False, True])


@pytest.fixture
def seen(tokens: Tensor) -> Tensor:
    """The batch, with the tokens that are trained in it."""
    tokens = tokens.clone()
    tokens[:, :3] = torch.tensor(TOKENS)
    return tokens


@tied
@pytest.mark.parametrize("form", each(FORMS, ["implicit"]))
@pytest.mark.parametrize("where", WHERE)
def test_they_are_trained_saved_and_restored(
    where: str, form: str, tie: bool, small_llama: Make, seen: Tensor, tmp_path: Path
) -> None:
    indices, places = WHERE[where]
    fields = {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": indices, **FORMS[form]}
    base = small_llama(tie_word_embeddings=tie)
    before = logits(base, seen)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items() if "q_proj" not in name}
    model = pissa.wrap(base, **fields)
    if form == "implicit":
        assert torch.equal(logits(model, seen), before)
    start = logits(model, seen)
    assert {name for name in trainable(model) if ".lora_" not in name} == {f"{p}.{DELTA}.default" for p in places}
    losses = train(model, seen)
    assert losses[-1] < losses[0]
    assert all(bool((delta != 0).all()) for delta in moved(model))
    with model.disable_adapter():
        assert torch.equal(logits(model, seen), start)
    model.save_pretrained(tmp_path)
    expected = logits(model, seen)
    goes_on = train(model, seen)

    kept = {name for name in load_file(tmp_path / "adapter_model.safetensors") if ".lora_" not in name}
    assert kept == {f"{place}.{DELTA}" for place in places}
    again = PissaModel.from_pretrained(small_llama(tie_word_embeddings=tie), tmp_path)
    assert not trainable(again)
    assert torch.equal(logits(again, seen), expected)
    again = PissaModel.from_pretrained(small_llama(tie_word_embeddings=tie), tmp_path, is_trainable=True)
    assert train(again, seen) == goes_on
    again.load_adapter(tmp_path, "default")
    assert torch.equal(logits(again, seen), expected)
    if form == "implicit":
        plain = peft.PeftModel.from_pretrained(small_llama(tie_word_embeddings=tie), tmp_path)
        assert error(logits(plain, seen), expected) < 1e-5  # float32, two layers
        unloaded = model.unload()
        assert torch.equal(logits(unloaded, seen), before)
        assert all(torch.equal(unloaded.state_dict()[name], tensor) for name, tensor in weights.items())


def moved(model: nn.Module) -> list[Tensor]:
    """How far the trained rows are from the base's."""
    return [
        layer.trainable_tokens_delta["default"].detach() - layer.base_layer.weight[layer.token_indices["default"]]
        for layer in model.modules()
        if isinstance(layer, peft.tuners.trainable_tokens.layer.TrainableTokensLayer)
    ]


@tied
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_the_way_back(tie: bool, dtype: torch.dtype, small_llama: Make, seen: Tensor) -> None:
    base = small_llama(tie_word_embeddings=tie, dtype=dtype)
    before = logits(base, seen)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = pissa.wrap(base, r=4, target_modules=["q_proj"], trainable_token_indices=TOKENS)
    train(model, seen)
    expected = logits(model, seen)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2  # merging rounds W + dW once more; two layers
    model.merge_adapter()
    assert error(logits(model, seen), expected) < tolerance
    with model.disable_adapter():
        assert torch.equal(logits(model, seen), before)
    model.unmerge_adapter()
    assert torch.equal(logits(model, seen), expected)
    model.merge_adapter()
    unloaded = model.unload()  # which leaves the adapter out, merged or not
    assert all(torch.equal(unloaded.state_dict()[name], tensor) for name, tensor in weights.items())

    model = pissa.wrap(unloaded, r=4, target_modules=["q_proj"], trainable_token_indices=TOKENS)
    train(model, seen)
    expected = logits(model, seen)
    merged = model.merge_and_unload(safe_merge=True)
    assert error(logits(merged, seen), expected) < tolerance
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tie


@tied
def test_adapters_with_and_without_tokens(tie: bool, small_llama: Make, seen: Tensor, tmp_path: Path) -> None:
    """PEFT 0.21 can neither save nor load nor merge the one that has none, beside one that has."""
    model = pissa.wrap(
        small_llama(tie_word_embeddings=tie), r=4, target_modules=["q_proj"], trainable_token_indices=[1]
    )
    model.add_adapter("none", PissaConfig(r=4, target_modules=["v_proj"]))
    model.add_adapter("other", PissaConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 5]))
    expected = {}
    for name in ("default", "none", "other"):
        model.set_adapter(name)
        train(model, seen)
        expected[name] = logits(model, seen)
    rows = model.eval()(input_ids=seen, adapter_names=["default", "none", "other"]).logits
    for row, name in enumerate(expected):
        assert error(rows[row].detach(), expected[name][row]) < 1e-6  # float32, other batch sizes
    model.save_pretrained(tmp_path)
    again = PissaModel.from_pretrained(small_llama(tie_word_embeddings=tie), tmp_path)
    for name in ("none", "other"):
        again.load_adapter(tmp_path / name, name)
        alone = PissaModel.from_pretrained(small_llama(tie_word_embeddings=tie), tmp_path / name)
        assert torch.equal(logits(alone, seen), expected[name])
    again.load_adapter(tmp_path / "none", "none")
    for name in expected:
        again.set_adapter(name)
        assert torch.equal(logits(again, seen), expected[name])
    again.set_adapter("none")
    again.merge_adapter(adapter_names=["none"])
    assert error(logits(again, seen), expected["none"]) < 1e-6
    again.unmerge_adapter()
    before = snapshot(again)
    with pytest.raises(ValueError, match=r"adapter other are already defined .* \[1\] are trained by another adapter"):
        again.merge_adapter(adapter_names=["default", "other"])
    assert_same(again, before)
    again.delete_adapter("default")
    again.set_adapter("other")
    assert torch.equal(logits(again, seen), expected["other"])


def test_a_grown_vocabulary_and_its_tokens(small_llama: Make, seen: Tensor, tmp_path: Path) -> None:
    """Rows that are new, random and trained: the file has what they are, and what they were."""
    from transformers import LlamaForCausalLM

    small_llama().save_pretrained(tmp_path / "base")

    def grown(seed: int) -> nn.Module:
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.resize_token_embeddings(100, mean_resizing=False)
        return put(model).eval()

    seen[:, 4] = 98
    model = pissa.wrap(grown(1), r=4, target_modules=["q_proj"], trainable_token_indices=[1, 98])
    train(model, seen)
    expected = logits(model, seen)
    model.save_pretrained(tmp_path / "unmerged")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    names = [name for name in load_file(tmp_path / "merged" / "adapter_model.safetensors") if ".lora_" not in name]
    assert set(names) == {f"{EMBEDDING}.{DELTA}", f"{EMBEDDING}.token_adapter.base_layer.weight", f"{HEAD}.weight"}
    for kind, tolerance in ((PissaModel, 0), (peft.PeftModel, 1e-5)):
        for state in ("unmerged", "merged"):
            again = kind.from_pretrained(grown(2), tmp_path / state)
            assert error(logits(again, seen), expected) <= tolerance
            with again.disable_adapter():
                assert torch.equal(logits(again, seen), logits(grown(1), seen))
    again = PissaModel.from_pretrained(grown(2), tmp_path / "merged")
    again.merge_adapter()
    again.unmerge_adapter()
    with again.disable_adapter():
        assert torch.equal(logits(again, seen), logits(grown(1), seen))


def test_a_plain_lora_of_them(small_llama: Make, seen: Tensor, tmp_path: Path) -> None:
    model = pissa.wrap(small_llama(), r=4, target_modules=["q_proj"], trainable_token_indices=TOKENS)
    train(model, seen)
    model.save_pretrained(tmp_path / "ours")
    pissa.convert(tmp_path / "ours", tmp_path / "plain", rank=8)
    plain = peft.PeftModel.from_pretrained(small_llama(), tmp_path / "plain")
    assert error(logits(plain, seen), logits(model, seen)) < 1e-5  # float32, two layers


def test_the_bias_of_an_output_layer_is_kept() -> None:
    """PEFT 0.21 leaves it out."""
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1}
    base = put(PhiForCausalLM(PhiConfig(**sizes, num_attention_heads=4))).eval()
    nn.init.normal_(base.lm_head.bias)
    x = put(torch.arange(9)[None])
    before = logits(base, x)
    model = pissa.wrap(base, r=4, target_modules=["q_proj"], trainable_token_indices={"lm_head": TOKENS})
    assert torch.equal(logits(model, x), before)
    train(model, x)
    expected = logits(model, x)
    model.merge_adapter()
    assert error(logits(model, x), expected) < 1e-6  # float32


# -- refused


REFUSED: dict[str, tuple[bool, dict[str, Any], str]] = {
    "no such token": (False, {"trainable_token_indices": [97]}, "index 97 is out of bounds"),
    "no such layer": (False, {"trainable_token_indices": {"wte": [1]}}, "Target modules {'wte'} not found"),
    "not an index": (False, {"trainable_token_indices": {"embed_tokens": [-1]}}, "trainable_token_indices: got -1"),
    "adapted": (False, {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, "cannot be applied to"),
    "wholly trained": (
        False,
        {"trainable_token_indices": {"embed_tokens": [1]}, "modules_to_save": ["embed_tokens"]},
        "already marked to be trained fully",
    ),
    "tied and adapted": (
        True,
        {"trainable_token_indices": [1], "target_modules": ["q_proj", "lm_head"]},
        "lm_head is in target_modules, and its weight is tied .* leave 'lm_head' out of target_modules",
    ),
    "tied and wholly trained": (
        True,
        {"trainable_token_indices": [1], "modules_to_save": ["lm_head"]},
        "lm_head is in modules_to_save, and its weight is tied .* leave 'lm_head' out of modules_to_save",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_and_the_model_is_as_it_was(what: str, small_llama: Make) -> None:
    tie, fields, words = REFUSED[what]
    fields = {"r": 4, "target_modules": ["q_proj"], **fields}
    base = small_llama(tie_word_embeddings=tie)
    before = snapshot(base)
    with pytest.raises((ValueError, TypeError, IndexError), match=words):
        pissa.wrap(base, **fields)
    assert_same(base, before)

    model = pissa.wrap(base, r=4, target_modules=["q_proj"])
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError, IndexError), match=words):
        model.add_adapter("second", PissaConfig(**fields))
    assert_same(model, before)


@pytest.mark.parametrize("field", [{"trainable_token_indices": [1, 5]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_that_failed_can_be_added_again(
    field: dict[str, Any], small_llama: Make, seen: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT keeps the names of the adapters that a wrapper serves in a set."""
    model = pissa.wrap(small_llama(), r=4, target_modules=["q_proj"], **field)
    with monkeypatch.context() as patch:
        patch.setattr(pissa.model.pissa_model, "decompose", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.add_adapter("second", PissaConfig(r=4, target_modules=["q_proj"], **field))
    model.add_adapter("second", PissaConfig(r=4, target_modules=["q_proj"], **field))
    model.set_adapter("second")
    losses = train(model, seen)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_tokens_of_one_of_two_tied_layers_are_not_merged(targets: list[str], small_llama: Make, seen: Tensor) -> None:
    """They would be written into the other as well, as PEFT 0.21 does."""
    model = pissa.wrap(
        small_llama(tie_word_embeddings=True), r=4, target_modules=targets, trainable_token_indices={"lm_head": [1, 2]}
    )
    model.merge_adapter()  # rows that are still the base's
    model.unmerge_adapter()
    train(model, seen)
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"tokens of lm_head are trained apart from model\.embed_tokens"):
            merge()
        assert_same(model, before.copy())
