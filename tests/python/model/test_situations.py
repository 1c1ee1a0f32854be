"""Twenty-one situations in which PEFT's own PiSSA (0.21) is wrong, silent or unavailable, or needs care, a test each.

They test what pissa does. What PEFT does is run by docs/situations.py, every night. All else that an adapter has to do
is tested with its kind: layers/test_kinds.py, model/test_architectures.py.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

import mixtures
import pissa
from devices import current, put
from language_models import Make, assert_same, error, logits, snapshot, train
from one_layer import filled
from oracle import assert_principal
from pissa import PissaConfig, PissaModel
from tiny_model import save_tiny_model
from trainers import QUIET, logged, options

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of kernels that it could download
    import bitsandbytes as bnb

pytestmark = pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")

# Another order of the sums of at most 256 terms, in float32, in each of the layers one after the other.
CLOSE = 1e-5


def trained(base: nn.Module, tokens: Tensor, **fields: Any) -> PissaModel:
    """With ours, which starts as the base does."""
    start = logits(base, tokens)
    model = pissa.wrap(base, **{"r": 4, **fields})
    assert torch.equal(logits(model, tokens), start)
    train(model, tokens)
    assert error(logits(model, tokens), start) > 1e-3
    return model


def saved_for_peft(model: PissaModel, base: nn.Module, tokens: Tensor, folder: Path) -> dict[str, Tensor]:
    """What is saved is a plain LoRA for PEFT on the unmodified base. Returns its tensors."""
    model.save_pretrained(folder)
    assert error(logits(peft.PeftModel.from_pretrained(base, folder), tokens), logits(model, tokens)) < CLOSE
    return load_file(folder / "adapter_model.safetensors")


# ----------------------------------------------------------------------------------------------------------------------


def test_situation_01_reload_after_another_seed(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """PEFT 0.21 decomposes with torch's generator when it loads, so after any other draw W_res is another one; here
    the start factors are saved, and the seed of the decomposition is ours."""
    set_seed(0)
    model = trained(tiny_llama(), tokens, svd_passes=2)
    model.save_pretrained(tmp_path)
    set_seed(1)
    assert torch.equal(logits(PissaModel.from_pretrained(tiny_llama(), tmp_path), tokens), logits(model, tokens))
    models = model, pissa.wrap(tiny_llama(), r=4, svd_passes=2)
    layers = [wrapped.base_model.model.model.layers[0].mlp.up_proj for wrapped in models]
    assert all(map(torch.equal, *(layer.start_of("default").buffers() for layer in layers)))


def test_situation_02_disable_and_unload_give_the_base(tiny_llama: Make, tokens: Tensor) -> None:
    """PEFT 0.21 gives W_res where the adapter is disabled or unloaded; here both give the base's own bits."""
    expected = logits(tiny_llama(), tokens)
    model = trained(tiny_llama(), tokens)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), expected)
    base, state = model.unload(), tiny_llama().state_dict()
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())


def test_situation_03_a_second_adapter_leaves_the_first(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """PEFT 0.21 splits the first adapter's W_res once more, without a warning, and the first adapter is broken for
    good; here other adapters are changes of the same base, whether added, loaded or deleted."""
    model = trained(tiny_llama(), tokens)
    model.save_pretrained(tmp_path)
    first = logits(model, tokens)
    model.add_adapter("added", PissaConfig(r=2, svd_passes=2, seed=5))
    model.load_adapter(tmp_path, "loaded", is_trainable=True)
    for name, start in (("added", logits(tiny_llama(), tokens)), ("loaded", first)):
        model.set_adapter(name)
        assert torch.equal(logits(model, tokens), start)
        train(model, tokens)
        model.set_adapter("default")
        assert torch.equal(logits(model, tokens), first)
        model.delete_adapter(name)
        assert torch.equal(logits(model, tokens), first)


@pytest.mark.nightly  # trainers/test_trl.py has every way to a reference
@pytest.mark.filterwarnings(*QUIET)
def test_situation_04_preferences_start_at_ln_2(tmp_path: Path) -> None:
    """PEFT 0.21 under TRL's DPO takes W_res for the reference (loss .6588), or corrupts policy and reference alike;
    here the loss starts at ln 2, and the rewards at 0."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    base = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "base"))
    data = Dataset.from_list([{"prompt": f"{i}+{i}=", "chosen": f"{2 * i}", "rejected": f"{2 * i}."} for i in range(8)])
    arguments = DPOConfig(**options(tmp_path / "run", max_steps=1, save_strategy="no"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = pissa.wrap(base, r=4, task_type="CAUSAL_LM")
    run = DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    run.train()
    assert logged(run) == pytest.approx([math.log(2)], rel=2**-23)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert logged(run, key) == [0]


def test_situation_05_a_tied_head_leaves_the_embeddings(tiny_llama: Make, tokens: Tensor) -> None:
    """PEFT 0.21 overwrites the embeddings with W_res where an adapted lm_head is tied to them (relative error 0.38 at
    the start); here the weight stays as it is and is still one."""
    make = lambda: tiny_llama(tie_word_embeddings=True)  # noqa: E731
    embeddings = make().model.embed_tokens.weight
    base = trained(make(), tokens, target_modules=["lm_head"]).base_model.model
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight
    assert torch.equal(base.model.embed_tokens.weight, embeddings)


def test_situation_06_modules_to_save_in_the_plain_lora(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """PEFT 0.21 leaves the trained head out of the converted adapter, which then cannot be loaded (KeyError); here it
    is in the folder, for PEFT as for us."""
    model = trained(tiny_llama(), tokens, modules_to_save=["lm_head"])
    head = saved_for_peft(model, tiny_llama(), tokens, tmp_path)["base_model.model.lm_head.weight"]
    assert not torch.equal(head, tiny_llama().lm_head.weight.cpu())
    assert torch.equal(head, model.base_model.model.lm_head.modules_to_save["default"].weight.cpu())


def test_situation_07_magnitudes_in_the_plain_lora(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """PEFT 0.21 drops DoRA's magnitudes from the converted adapter, which loads without complaint (relative error
    0.038); here the plain LoRA has the trained magnitudes, and PEFT computes the same function from it."""
    saved = saved_for_peft(trained(tiny_llama(), tokens, use_dora=True), tiny_llama(), tokens, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"]
    assert len([name for name in saved if "magnitude" in name]) == 14


@pytest.mark.parametrize("fields", [{}, {"target_parameters": ["experts.gate_up_proj"], "target_modules": ["q_proj"]}])
def test_situation_08_fused_experts(fields: dict[str, Any], tokens: Tensor, tmp_path: Path) -> None:
    """PEFT 0.21 raises AttributeError for fused experts, by all-linear as by target_parameters; here both adapt every
    expert, and PEFT loads what is saved."""
    model = trained(mixtures.make("mixtral"), tokens, r=2, **fields)
    assert len(mixtures.expert_layers(model)) == 2 * 4 * (1 if fields else 2)  # layers, experts, weights
    saved_for_peft(model, mixtures.make("mixtral"), tokens, tmp_path)


def test_situation_09_embeddings(tiny_llama: Make, tokens: Tensor) -> None:
    """PEFT 0.21 ignores "pissa" for an embedding and starts plain LoRA (A = 0); here it starts from the principal
    components of the embedding's weight."""
    model = trained(tiny_llama(), tokens, target_modules=["embed_tokens"], svd_passes=32)
    layer = model.base_model.model.model.embed_tokens
    assert_principal(layer.start_of("default"), 1, layer.base_layer.weight.detach().double().T)  # [out, in]


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_situation_10_convolutions(kind: type[nn.Module]) -> None:
    """PEFT 0.21 raises ValueError, unknown initialization, for Conv1d, Conv2d and Conv3d; here they are adapted."""
    make = lambda: put(nn.Sequential(filled(kind(3, 8, 3)))).eval()  # noqa: E731
    layer = pissa.wrap(make(), r=2, target_modules=["0"], svd_passes=32).base_model.model[0]
    assert_principal(layer.start_of("default"), 1, layer.base_layer.weight.detach().double().flatten(1))


def decoded(layer: Any) -> Tensor:
    """By bitsandbytes."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return layer.weight.data.double() * layer.weight.SCB.double()[:, None] / 127
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()


def assert_starts_from_what_is_decoded(make: Callable[[], nn.Module]) -> None:
    layer = pissa.wrap(nn.Sequential(make()), r=2, target_modules=["0"], svd_passes=32).base_model.model[0]
    assert_principal(layer.start_of("default"), 1, decoded(make()))


@pytest.mark.parametrize("bits", [4, 8])
def test_situation_11_layers_of_bitsandbytes(bits: int) -> None:
    """PEFT 0.21 raises TypeError for weights that bitsandbytes has quantised to 4 or 8 bits; here they are decomposed
    as they are, and stay the base."""
    kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    fields = {"quant_type": "nf4"} if bits == 4 else {"has_fp16_weights": False}
    make = lambda: filled(kind(64, 32, **fields)).to(current)  # noqa: E731
    assert_starts_from_what_is_decoded(make)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_situation_12_four_bits_in_a_float_storage(storage: torch.dtype) -> None:
    """PEFT 0.21 decomposes the packed bytes where bitsandbytes keeps them in a float dtype, as QLoRA with FSDP does
    (LinAlgError, or silent garbage); here they are read as the 4-bit weight that they are."""
    make = lambda: filled(bnb.nn.Linear4bit(64, 32, quant_type="nf4", quant_storage=storage)).to(current)  # noqa: E731
    assert make().weight.dtype == storage
    assert_starts_from_what_is_decoded(make)


class FewOperations(Tensor):
    """A tensor of a class that knows few operations, as torchao's do."""

    @staticmethod
    def __new__(cls, values: Tensor) -> FewOperations:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].values)
        raise NotImplementedError(f"{cls.__name__} dispatch: attempting to run unimplemented operator {function}")


def few_operations(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(FewOperations(layer.weight.detach()), requires_grad=False)


def torchao_int8(layer: nn.Linear) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())


@pytest.mark.parametrize("quantise", [few_operations, pytest.param(torchao_int8, marks=pytest.mark.slow)])
def test_situation_13_tensors_of_torchao(quantise: Callable[[nn.Linear], None], tiny_llama: Make) -> None:
    """PEFT 0.21 fails with NotImplementedError from the dispatch of torchao's tensors (5 seconds to import, so in their
    place one of ours; the real ones in `make test-slow`); we refuse the layer by name, say what can be adapted, and
    leave the model as it was."""
    model = tiny_llama()
    layer = model.model.layers[1].mlp.up_proj
    quantise(layer)
    weight, modules = layer.weight, dict(model.named_modules())
    found = type(weight).__name__
    words = rf"weight of model\.layers\.1\.mlp\.up_proj is a {found} .* plain float32, bfloat16 and float16 weights"
    with pytest.raises(TypeError, match=words):
        pissa.wrap(model, r=4)
    assert dict(model.named_modules()) == modules
    assert layer.weight is weight


def test_situation_14_weights_elsewhere(tiny_llama: Make, tokens: Tensor) -> None:
    """PEFT 0.21 fails (set_data, incompatible type) on the meta device, under accelerate's offloading and with
    low_cpu_mem_usage=True; here a weight without values is refused by name, and the other two work, to the
    bit."""
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj is on the meta device"):
        pissa.wrap(tiny_llama().to("meta"), r=4)
    trained(cpu_offload(tiny_llama(), execution_device=tokens.device), tokens)
    trained(tiny_llama(), tokens, low_cpu_mem_usage=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_situation_15_half_precision(dtype: torch.dtype, tiny_llama: Make, tokens: Tensor) -> None:
    """PEFT 0.21 rounds W_res (relative error of the logits 9e-3 at the start, 66% of the weights as they were after an
    untrained merge, in bfloat16); here the start is the base and an untrained merge gives every weight, to the
    bit."""
    base = tiny_llama(dtype=dtype)
    expected, weights = logits(base, tokens), {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = pissa.wrap(base, r=4)
    assert torch.equal(logits(model, tokens), expected)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in merged.state_dict().items())
    assert torch.equal(logits(merged, tokens), expected)


def test_situation_16_dropout(tiny_llama: Make, tokens: Tensor) -> None:
    """PEFT 0.21 takes lora_dropout without a warning and drops parts of the principal components, too (relative error
    of the logits 0.31 at the start, in training mode); here dropout touches the change only."""
    expected = logits(tiny_llama().train(), tokens)
    model = pissa.wrap(tiny_llama(), r=4, lora_dropout=0.1, fuse=False)
    model.train()
    assert torch.equal(logits(model, tokens), expected)
    train(model, tokens)
    assert not torch.equal(logits(model, tokens), logits(model, tokens))  # it does drop
    model.eval()
    assert torch.equal(logits(model, tokens), logits(model, tokens))


def test_situation_17_a_rank_that_is_too_large(tiny_llama: Make) -> None:
    """PEFT 0.21 makes the factors smaller than the rank that it notes, so that what it saves cannot be loaded; here the
    layer is named, with the largest rank that it can have, or has it where the targets are left to us."""
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"rank 33 is too large for layer .*\.0\.self_attn\.k_proj: .* at most 32"):
        pissa.wrap(model, r=33, target_modules=["q_proj", "k_proj"])
    assert_same(model, before)


def test_situation_18_a_slash_at_the_end(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """PEFT 0.21 raises ValueError, "Adapter does not exist", for a slash at the end of
    path_initial_model_for_weight_conversion; here every path may end so, and no such path is needed."""
    model = trained(tiny_llama(), tokens)
    model.save_pretrained(f"{tmp_path}/saved/")
    again = PissaModel.from_pretrained(tiny_llama(), f"{tmp_path}/saved/")
    again.load_adapter(f"{tmp_path}/saved/", "second")
    for name in ("default", "second"):
        again.set_adapter(name)
        assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("rslora", [False, True])
def test_situation_19_scalings(rslora: bool, tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """PEFT 0.21 is right for lora_alpha, use_rslora, rank_pattern and alpha_pattern, though it refuses to convert
    rslora with patterns; here they are right together, in the saved LoRA too."""
    ranks = {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}
    alphas = {"v_proj": 3, r"layers\.1\.mlp\.up_proj": 5}
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
    model = trained(tiny_llama(), tokens, lora_alpha=6, use_rslora=rslora, svd_passes=32, **patterns)
    saved = saved_for_peft(model, tiny_llama(), tokens, tmp_path)
    found = set()
    for name, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, pissa.layers.PissaLinear)):
        r = next((r for key, r in ranks.items() if re.search(rf"{key}$", name)), 4)
        alpha = next((alpha for key, alpha in alphas.items() if re.search(rf"{key}$", name)), 6)
        found.add((r, alpha))
        assert_principal(
            layer.start_of("default"), alpha / (math.sqrt(r) if rslora else r), layer.base_layer.weight.double()
        )
        assert len(saved[f"{name}.lora_A.weight"]) == 2 * r
    assert found == {(2, 6), (4, 3), (7, 5), (4, 6)}


def test_situation_20_a_converted_adapter_of_less_rank(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """PEFT 0.21 always writes rank 2r, although the change has most of its energy in fewer directions; here `convert`
    can write the best approximation of a lower rank, and says what it keeps (conversion/test_convert_ranks.py)."""
    trained(tiny_llama(), tokens).save_pretrained(tmp_path / "ours")
    done = pissa.convert(tmp_path / "ours", tmp_path / "small", rank=4)
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["r"] == 4
    assert 0.5 < done.kept < 1
    peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "small")


def test_situation_21_from_a_gguf_file(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """transformers 5.24 marks a model that it has dequantised from a GGUF file as quantised, and its Trainer refuses
    PEFT's adapters on it; here the model is what it is: dense."""
    quantizer = pytest.importorskip("transformers.quantizers.quantizer_gguf", reason="transformers is older")
    model, mark = tiny_llama(), transformers.GgufConfig()
    model.config.quantization_config, model.quantization_method = mark, mark.quant_method
    model.hf_quantizer, model.is_quantized = quantizer.GgufHfQuantizer(mark), True
    wrapped = pissa.wrap(model, r=4)
    data = [{"input_ids": tokens[0], "labels": tokens[0]}]
    arguments = TrainingArguments(**options(tmp_path / "run", max_steps=1))
    assert Trainer(wrapped, arguments, train_dataset=data).train().global_step == 1
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "merged"), tokens), logits(merged, tokens))
