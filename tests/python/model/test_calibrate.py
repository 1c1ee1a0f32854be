"""Calibration: what the layers of a model read, a base that knows it, and an adapter's folder of such a base."""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5EncoderModel,
)

import pissa
from pissa.base.protocol import Base
from pissa.layers.layer import PissaLayer
from pissa.model import decompose
from pissa.model.calibrate import BlockMoments, observe_blocks

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**sizes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | sizes)).eval()


def batches(count: int = 6, tokens: int = 24) -> list[dict[str, Tensor]]:
    """Rows of different lengths, padded on either side, with labels, which a calibration leaves out."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        ids = torch.randint(0, 64, (3, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, : 5 + number] = 0
        mask[2, -7:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    return found


def inputs_of(model: nn.Module, given: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """What each linear layer reads of the tokens alone, a row at a time, in float64."""
    read: dict[str, list[Tensor]] = {}
    model = model.double()
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: read.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in given:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                model(input_ids=ids[mask.bool()][None])
    for hook in hooks:
        hook.remove()
    return read


def test_moments_are_those_of_the_tokens_alone() -> None:
    model, given = llama(), batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = pissa.calibrate(model, given)
    assert list(model.state_dict()) == list(before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    read = inputs_of(llama(), given)
    read.pop("lm_head")
    assert found.moments.keys() == read.keys()
    assert found.tokens == sum(int(batch["attention_mask"].sum()) for batch in given)
    for name, moment in found.moments.items():
        x = torch.cat(read[name])
        expected = x.mT @ x / len(x)
        # Roundings of a forward pass in float32, of two blocks.
        torch.testing.assert_close(moment.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        assert torch.equal(moment, moment.mT)
    shared = {tensor.data_ptr() for tensor in found.moments.values()}
    assert len(shared) == 2 * 4  # q, k, v; o; gate, up; down


def gemma3() -> nn.Module:
    """Its blocks have masks and positions of their own."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 6, "head_dim": 16}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=4)).eval()


def t5() -> nn.Module:
    """Each block passes the position bias of the first one on."""
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)).eval()


@pytest.mark.parametrize("make", [llama, gemma3, t5])
def test_block_after_block(make: Callable[[], nn.Module]) -> None:
    """The same bits, a block at a time, in this thread."""
    whole, model = pissa.calibrate(make(), batches(), target_modules="all-linear"), make()
    wrapped = pissa.PissaModel(model, pissa.PissaConfig(r=2, target_modules="all-linear"), "default")
    threads: set[int] = set()
    hook = model.register_forward_pre_hook(lambda *_: threads.add(threading.get_ident()))
    found: dict[str, Tensor] = {}
    for number, block in enumerate(observe_blocks(wrapped, batches())):
        assert all(f".{number}." in name for name in block.moments)
        assert block.tokens == whole.tokens
        found |= block.moments
    hook.remove()
    assert threads == {threading.get_ident()}
    assert found.keys() == whole.moments.keys()
    assert all(torch.equal(found[name], moment) for name, moment in whole.moments.items())


def test_a_block_s_moments_at_a_time() -> None:
    """And the model is as it was when nobody asks for more, or a call fails."""
    model = llama()
    wrapped = pissa.PissaModel(model, pissa.PissaConfig(r=2), "default")
    alive = []  # moments of the layer with 96 inputs: no weight has their shape
    for _ in observe_blocks(wrapped, batches()):
        alive.append(sum(type(one) is Tensor and one.shape == (96, 96) for one in gc.get_objects()))
    assert alive[0] == alive[1]
    begun = observe_blocks(wrapped, batches())
    next(begun)
    begun.close()
    with pytest.raises(ValueError, match="You must specify exactly one of input_ids"):
        next(observe_blocks(wrapped, [{"input_idz": torch.ones(1, 2, dtype=torch.long)}]))
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "fields",
    [
        {"init": "lora", "repair": "activations"},
        {"init": "lora", "error_feedback": True},
        {"error_feedback": True},
        {"init": "lora", "repair": "activations", "error_feedback": True},
        {"init": "activations", "error_feedback": True, "quant_iters": 2},
        {"init": "activations", "repair": "pissa", "error_feedback": True},  # whose layers are asked twice
    ],
    ids=str,
)
def test_batches_are_their_calibration(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits; a block's moments at a time, where each is asked for once."""
    monkeypatch.setattr("pissa.model.decompose._GROUP", 1)
    most, of = [0], BlockMoments.of

    def counted(moments: BlockMoments, *args: Any) -> list[Tensor]:
        found = of(moments, *args)
        most.append(len(found) + len(moments._waiting))
        return found

    monkeypatch.setattr(BlockMoments, "of", counted)
    given = {"r": 4, "quant": "nf4", **fields}
    expected = pissa.wrap(llama(), **given, calibration=pissa.calibrate(llama(), batches())).state_dict()
    found = pissa.wrap(llama(), **given, calibration=batches()).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert max(most) == (0 if fields.get("repair") == "pissa" else 7)


def test_blocks_that_run_more_than_once() -> None:
    """ALBERT's, which run in turn."""
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    given = {"r": 4, "quant": "nf4", "init": "lora", "repair": "activations", "target_modules": ["query", "ffn"]}
    calls = [batch | {"labels": None} for batch in batches()]
    config = AlbertConfig(**sizes, embedding_size=32, num_hidden_layers=4, num_hidden_groups=2)
    models = [AlbertModel(config).eval() for _ in range(3)]
    for model in models:
        model.load_state_dict(models[0].state_dict())
    calibration = pissa.calibrate(models[0], calls, target_modules=given["target_modules"])
    expected = pissa.wrap(models[1], **given, calibration=calibration).state_dict()
    found = pissa.wrap(models[2], **given, calibration=calls).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


class Between(nn.Module):
    """Four blocks, and what a model does between them."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.change(block(x))
        return x


@pytest.mark.parametrize("change", [lambda x: x / 2, lambda x: x.div_(2)], ids=["new", "in place"])
def test_models_that_do_more_between_their_blocks(change: Callable[[Tensor], Tensor]) -> None:
    calls = [{"x": torch.randn(5, 8)} for _ in range(3)]
    expected = pissa.calibrate(Between(change), calls, target_modules=r"blocks\..\.0").moments
    config = pissa.PissaConfig(r=2, target_modules=r"blocks\..\.0")
    (found,) = observe_blocks(pissa.PissaModel(Between(change), config), calls)
    assert found.moments.keys() == expected.keys()
    assert all(torch.equal(found.moments[name], moment) for name, moment in expected.items())


def test_blocks_that_a_model_computes_for_the_last_token_alone() -> None:
    """Gemma 4 does so where blocks share the keys of earlier ones and only the last logits are wanted."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
        more = {"head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 8}
        sizes = SIZES | {"num_hidden_layers": 4, "vocab_size_per_layer_input": 64}
        return Gemma4ForCausalLM(Gemma4TextConfig(**sizes, **more, **kinds)).eval()

    found = pissa.calibrate(model(), batches(), target_modules=r".*\.3\.mlp\..*_proj")
    read = inputs_of(model(), batches())
    assert len(found.moments) == 3
    for name, moment in found.moments.items():
        x = torch.cat(read[name])
        torch.testing.assert_close(moment.double(), x.mT @ x / len(x), rtol=0, atol=1e-4 * float(x.square().max()))


@pytest.mark.parametrize("embedding", ["cpu", "disk"])
def test_an_offloaded_model(embedding: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    places = {"model.embed_tokens": embedding, "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    fields = {"r": 4, "quant": "nf4", "init": "lora"}
    models = [
        LlamaForCausalLM.from_pretrained(tmp_path, device_map=places | {"lm_head": "cpu"}, offload_folder=tmp_path)
        for _ in range(2)
    ]
    expected = outputs(pissa.wrap(llama(), **fields, calibration=batches()), batches())
    calibration = pissa.calibrate(models[0], batches())
    assert torch.equal(outputs(pissa.wrap(models[0], **fields, calibration=calibration), batches()), expected)
    assert torch.equal(outputs(pissa.wrap(models[1], **fields, calibration=batches()), batches()), expected)


@pytest.mark.parametrize("fields", [{"init": "lora", "error_feedback": True}, {"init": "activations"}], ids=str)
def test_a_process_that_has_no_more_layers_to_decompose(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes along with others that have more, as if it had an empty group, where the weights are partitioned."""
    groups = decompose.own_groups

    def with_an_empty_one(layers: dict[str, PissaLayer]) -> Iterator[dict[str, Base]]:
        yield from groups(layers)
        yield {}

    fields = {"r": 4, "quant": "nf4", "calibration": pissa.calibrate(llama(), batches()), **fields}
    expected = outputs(pissa.wrap(llama(), **fields), batches())
    monkeypatch.setattr(decompose, "own_groups", with_an_empty_one)
    assert torch.equal(outputs(pissa.wrap(llama(), **fields), batches()), expected)


def test_layers_that_are_called_by_keyword() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(input=x)

    x = torch.randn(20, 8)
    (moment,) = pissa.calibrate(Model(), [{"x": x}], target_modules=["first"]).moments.values()
    torch.testing.assert_close(moment, x.mT @ x / 20)
    assert torch.equal(pissa.wrap(Model(), r=2, target_modules=["first"]).eval()(x), Model()(x))


def test_a_calibration_changes_nothing_else() -> None:
    """A frozen adapter stays frozen; what autocast is to compute in its dtype is."""
    given = {"r": 4, "quant": "nf4", "init": "lora", "repair": "activations"}
    frozen = pissa.wrap(llama(), **given, inference_mode=True, calibration=batches())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        expected = pissa.wrap(llama(), **given, calibration=pissa.calibrate(llama(), batches())).state_dict()
        found = pissa.wrap(llama(), **given, calibration=batches()).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def outputs(model: nn.Module, given: list[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=batch["input_ids"]).logits for batch in given])


def test_layers_of_bitsandbytes_are_not_repacked(tmp_path: Path) -> None:
    """By bitsandbytes in evaluation mode, on a CPU: they would return no gradient."""
    llama().bfloat16().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    layer = model.model.layers[1].mlp.up_proj
    before = layer.weight.data.clone()
    moments = pissa.calibrate(model, batches(), quant="nf4", repair="activations", target_modules=["q_proj"]).moments
    assert len(moments) == 2
    assert torch.equal(layer.weight.data, before)
    assert not layer.training


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_base_that_knows_its_inputs_loses_less_of_the_outputs(format: str) -> None:
    given, quant = batches(), {"quant": format, "r": 4, "init": "lora"}
    exact = outputs(llama(), given)
    calibration = pissa.calibrate(llama(), given)

    def lost(**fields: Any) -> float:
        return float((outputs(pissa.wrap(llama(), **quant, **fields), given) - exact).norm())

    plain, repaired = lost(), lost(repair="activations", calibration=calibration)
    fed_back = lost(error_feedback=True, calibration=calibration)
    both = lost(repair="activations", error_feedback=True, quant_iters=3, calibration=given)
    assert both < min(repaired, fed_back)
    assert max(repaired, fed_back) < plain


@pytest.mark.parametrize(
    "fields", [{}, {"repair": "activations"}, {"init": "activations"}, {"repair": "activations", "quant": "int8"}]
)
def test_saved_and_loaded(fields: dict[str, Any], tmp_path: Path) -> None:
    given = batches()
    model = pissa.wrap(
        llama(), r=4, **{"init": "lora", "quant": "nf4", **fields}, error_feedback=True, calibration=given
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**given[0]).loss.backward()
    optimizer.step()
    expected = outputs(model, given)
    model.save_pretrained(tmp_path / "adapter")
    loaded = pissa.PissaModel.from_pretrained(llama(), tmp_path / "adapter")
    assert torch.equal(outputs(loaded, given), expected)
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    with pytest.raises(ValueError, match=r"is not the base .* the first layer that differs is .*layers.1.mlp.up_proj"):
        pissa.PissaModel.from_pretrained(other, tmp_path / "adapter")


def test_a_configuration_cannot_hide_error_feedback(tmp_path: Path) -> None:
    """Without it, the codes would be taken for those of any base, and be left out of the next folder."""
    given = batches(2)
    pissa.wrap(llama(), r=4, quant="nf4", init="lora", error_feedback=True, calibration=given).save_pretrained(tmp_path)
    config = dataclasses.replace(pissa.PissaConfig.from_pretrained(tmp_path), error_feedback=False)
    with pytest.raises(ValueError, match=r"error_feedback is False, the adapter in .* was saved with True"):
        pissa.PissaModel.from_pretrained(llama(), tmp_path, config=config)


def test_a_repair_without_error_feedback_needs_no_codes_in_the_folder(tmp_path: Path) -> None:
    model = pissa.wrap(llama(), r=4, quant="nf4", init="lora", repair="activations", calibration=batches())
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "pissa_codes.safetensors").exists()
    loaded = pissa.PissaModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(outputs(loaded, batches()), outputs(model, batches()))


def test_experts_that_no_token_visits_have_their_siblings_inputs() -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=1)).eval()
    found = pissa.calibrate(model, [torch.tensor([[1, 2]])], target_modules="all-linear")
    experts = {name: moment for name, moment in found.moments.items() if ".experts." in name}
    for part in ("gate_up_proj", "down_proj"):
        some = {name: moment for name, moment in experts.items() if "layers.0.mlp.experts." in name and part in name}
        assert len(some) == 8
        moments = sorted(some.values(), key=lambda moment: sum(torch.equal(moment, other) for other in some.values()))
        torch.testing.assert_close(moments[2], (moments[0] + moments[1]) / 2)  # those of two tokens, one an expert's
        assert all(torch.equal(moments[2], other) for other in moments[3:])
    wrapped = pissa.wrap(model, r=2, quant="nf4", init="lora", repair="activations", calibration=found)
    assert outputs(wrapped, [{"input_ids": torch.tensor([[1, 2]])}]).isfinite().all()


@pytest.mark.parametrize(
    ("given", "fields", "error"),
    [
        (None, {"repair": "activations"}, "calibration: got None; init or repair 'activations' weighs errors"),
        (None, {"error_feedback": True}, "calibration: got None; error_feedback=True weighs errors"),
        (batches(1), {"repair": "pissa"}, "calibration: got one that nothing uses"),
        (batches(1), {"quant": None}, "calibration: got one that nothing uses"),
        ([], {"repair": "activations"}, "calibration: got no batch with tokens"),
        ([[1, 2]], {"repair": "activations"}, "calibration: got a batch of list; needed: a mapping, or input_ids"),
        (
            [{"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 0, 1]])}],
            {"repair": "activations"},
            "calibration: row 0 of attention_mask has zeros between ones",
        ),
    ],
)
def test_what_cannot_be_is_refused(given: Any, fields: dict[str, Any], error: str) -> None:
    model = llama()
    modules = list(model.modules())
    with pytest.raises((ValueError, TypeError), match=error):
        pissa.wrap(model, calibration=given, **{"r": 4, "quant": "nf4", "init": "lora", **fields})
    assert list(model.modules()) == modules


def test_a_calibration_repairs_unless_it_is_for_more() -> None:
    given, fields = batches(), {"r": 4, "quant": "nf4", "init": "lora"}
    wrapped = pissa.wrap(llama(), **fields, calibration=given)
    assert wrapped.peft_config["default"].repair == "activations"
    assert torch.equal(
        outputs(wrapped, given), outputs(pissa.wrap(llama(), **fields, repair="activations", calibration=given), given)
    )
    fed_back = pissa.wrap(llama(), **fields, error_feedback=True, calibration=given)
    assert fed_back.peft_config["default"].repair is None


def test_a_calibration_of_other_layers() -> None:
    calibration = pissa.calibrate(llama(), batches(1), target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"calibration: has no layer model\.layers\.0\.self_attn\.k_proj"):
        pissa.wrap(llama(), r=4, quant="nf4", init="lora", repair="activations", calibration=calibration)
