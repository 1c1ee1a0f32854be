"""Fused experts of transformers are unfused without a copy, split one by one, and decoded only where tokens go."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import pissa
from devices import put
from language_models import assert_same, logits, snapshot
from mixtures import EXPERTS, KINDS, ROUTED, R, expert_layers, fused_parameters, make
from oracle import change_all
from pissa import ops
from pissa.base.stored import QuantizedLinear
from pissa.layers.experts import UnfusedExperts, unfused_experts
from pissa.layers.layer import pissa_layers
from reference import EPS

kinds = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.AllLinearWarning")  # Llama 4's router


# ---- Unfusing --------------------------------------------------------------------------------------------------------


CONFIG = SimpleNamespace(
    n_routed_experts=EXPERTS, num_local_experts=EXPERTS, moe_num_experts=EXPERTS, hidden_size=32, moe_hidden_size=32,
    moe_intermediate_size=24, intermediate_size=24, moe_latent_size=None, mlp_hidden_act="relu2", hidden_act="silu",
    mlp_gate_softcap=5.0, mlp_up_softcap=5.0, post_norm_eps=1e-6, swiglu_limit=7.0, swiglu_alpha=1.702,
    _experts_implementation="eager",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("nemotron_h", "NemotronHExperts"),  # no gate, sums in float32
        ("inkling2", "Inkling2Experts"),  # a gate of its own, sums in float32
        ("muse_spark", "MuseSparkExperts"),  # a norm after each expert
        ("aria", "AriaExperts"),  # weights [in, out]
        ("minimax_m3_vl", "MiniMaxM3VLExperts"),  # a gate of its own
    ],
)
def test_every_kind_of_experts_is_computed_as_transformers_does(family: str, name: str, dtype: torch.dtype) -> None:
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}", reason="another transformers")
    fused = getattr(module, name)(CONFIG)
    if not hasattr(fused, "has_gate"):
        pytest.skip("another transformers")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    fused = put(fused.to(dtype))
    x = put(torch.randn(9, 32, generator=generator).to(dtype))
    index = put(torch.stack([torch.randperm(EXPERTS + 1, generator=generator)[:2] for _ in range(9)]))
    weights = put(torch.rand(9, 2, generator=generator))  # float32, as routers compute them
    with torch.no_grad():
        if family == "nemotron_h":  # which knows no token without experts
            index = index.clamp(max=EXPERTS - 1)
        expected = fused(x, index, weights)
        assert torch.equal(UnfusedExperts(fused)(x, index, weights), expected)


def test_a_release_of_transformers_that_knows_no_norm_after_an_expert(tokens: Tensor) -> None:
    base = make("mixtral")
    before = logits(base, tokens)
    for module in base.modules():
        vars(module).pop("has_post_expert_norm", None)
    model = pissa.wrap(base, r=R)
    assert expert_layers(model)
    assert torch.equal(logits(model, tokens), before)


@kinds
def test_unfusing_copies_no_weight(kind: str) -> None:
    base = make(kind)
    fused = {name: value.detach() for name, value in fused_parameters(base).items() if value.dim() == 3}
    pointers = {name: value.data_ptr() for name, value in fused.items()}
    model = pissa.wrap(base, r=R)
    for name, weights in fused.items():
        path, _, leaf = name.rpartition(".")
        for index in range(EXPERTS):
            weight = model.base_model.model.get_submodule(f"{path}.{index}.{leaf}").base_layer.weight
            assert weight.data_ptr() == pointers[name] + index * weights[0].numel() * weights.element_size()
            assert weight.numel() == weights[0].numel()


def test_storing_in_4_bits_frees_the_fused_weights() -> None:
    base = make("mixtral")
    storages = [StorageWeakRef(value.untyped_storage()) for value in fused_parameters(base).values()]
    model = pissa.wrap(base, r=R, quant="nf4")
    gc.collect()
    assert all(storage.expired() for storage in storages)
    assert all(isinstance(layer.base_layer, QuantizedLinear) for layer in expert_layers(model).values())


# ---- Splitting -------------------------------------------------------------------------------------------------------


def test_the_experts_of_a_block_are_split_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    split_many, calls = ops.split_many, []

    def counted(weights: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["names"])
        return split_many(weights, *args, **kwargs)

    monkeypatch.setattr(ops, "split_many", counted)
    pissa.wrap(make("mixtral"), r=R, target_modules=["gate_up_proj", "down_proj"])
    for block in range(2):
        names = [f"layer model.layers.{block}.mlp.experts.{i}.gate_up_proj: weight" for i in range(EXPERTS)]
        assert sum(all(name in call for name in names) for call in calls) == 1
        assert sum(any(name in call for name in names) for call in calls) == 1


# ---- Where tokens go: model/test_architectures.py has the function and its gradients ---------------------------------


class Block(nn.Module):
    """The experts of one block, and where its tokens go."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def block(kind: str, dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    experts = next(module for module in make(kind, dtype).modules() if type(module).__name__.endswith("Experts"))
    both = ["gate_up_proj", "down_proj"]
    return pissa.wrap(Block(experts), **{"r": R, "target_modules": both, "quant": "nf4", **fields})


def sent_to(*experts: int, count: int = 6, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, of which each goes to k of the experts given, and the weights of these."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(count, 32, generator=generator)
    index = torch.tensor([[experts[(i + j) % len(experts)] for j in range(k)] for i in range(count)])
    return put(x), put(index), put(torch.rand(count, k, generator=generator))


@pytest.mark.parametrize("kind", ROUTED)
def test_only_experts_with_tokens_are_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = block(kind)
    experts = model.base_model.model.experts
    layers = {(i, n): experts.expert(i).get_submodule(n) for i in range(EXPERTS) for n in experts.names}
    owner = {layer.base_layer.weight.data_ptr(): key for key, layer in layers.items()}
    read = []

    def watched(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            given = [*args, *kwargs.get("weights", ())]
            read.extend(owner[arg.codes.data_ptr()] for arg in given if isinstance(arg, ops.QuantizedWeight))
            return original(*args, **kwargs)

        return call

    for name in ("linear", "grouped_linear", "dequantize"):
        monkeypatch.setattr(ops, name, watched(getattr(ops, name)))
    for chosen in ([0, 2], [3], [EXPERTS]):  # the last stands for none
        read.clear()
        y = model(*sent_to(*chosen))
        assert sorted(read) == [(i, name) for i in chosen if i < EXPERTS for name in sorted(experts.names)]
        assert y.any() == (chosen != [EXPERTS])
    model(*sent_to(0, 2)).sum().backward()
    for (i, _), layer in layers.items():
        assert [p.grad is not None for p in layer.factor_parameters("default")] == [i in (0, 2)] * 2


# ---- At once ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of `ops.grouped_linear` has had."""
    calls, original = [], ops.grouped_linear

    def counted(*args: Any, weights: Any, **kwargs: Any) -> Tensor:
        calls.append(len(weights))
        return original(*args, weights=weights, **kwargs)

    monkeypatch.setattr(ops, "grouped_linear", counted)
    return calls


def watch(model: nn.Module) -> nn.Module:
    """The same model, of which one layer's calls are watched, so that experts are computed one after the other."""
    experts = model.base_model.model.experts
    for index in range(EXPERTS):
        experts.expert(index).down_proj.register_forward_hook(lambda *_: None)
    return model


def outcome(model: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of inputs, routers' weights and factors."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weights)]
    y = model(leaves[0], index, leaves[1])
    leaves += [p for layer in pissa_layers(model).values() for p in layer.factor_parameters("default")]
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return y.detach(), [*torch.autograd.grad(y, leaves, dy, materialize_grads=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ROUTED)
@pytest.mark.parametrize("chosen", [(0, 1, 2, 3), (3, 1, EXPERTS), (2,)], ids=str)
def test_all_experts_at_once_are_one_after_the_other(
    kind: str, dtype: torch.dtype, chosen: tuple[int, ...], at_once: list[int]
) -> None:
    model = block(kind, dtype)
    change_all(model)
    # torch's silu rounds an element at the end of a tensor otherwise than in its midst, where lanes are full.
    model.base_model.model.experts.fused.act_fn = nn.ReLU()
    x, index, weights = sent_to(*chosen, count=21, k=min(3, len(chosen)))
    y, gradients = outcome(model, x.to(dtype), index, weights.to(dtype))
    assert at_once == [len(set(chosen) - {EXPERTS})] * 2
    expected, expected_gradients = outcome(watch(model), x.to(dtype), index, weights.to(dtype))
    assert len(at_once) == 2
    if y.device.type == "cpu" and kind != "gpt_oss":  # which has a sigmoid all the same
        assert torch.equal(y, expected)
    # Sums over at most three experts of each token, or over the tokens of one, in another order: of 21 terms.
    for got, wanted in zip([y, *gradients], [expected, *expected_gradients], strict=True):
        assert (got - wanted).abs().max() <= 21 * EPS[dtype] * wanted.abs().max()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_at_step_0_all_at_once_are_the_base_at_once(kind: str, at_once: list[int]) -> None:
    model, given = block(kind), sent_to(0, 1, 3)
    y = model(*given)
    with model.disable_adapter():
        assert torch.equal(model(*given), y)
        assert at_once == [3] * 4
        experts = model.base_model.model.experts
        experts.expert(0).down_proj.base_layer.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(model(*given), y)
    assert at_once == [3] * 4


def twice(model: nn.Module) -> None:
    model.add_adapter("other", pissa.PissaConfig(r=R, target_modules=["gate_up_proj", "down_proj"]))
    model.base_model.set_adapter(["default", "other"])


def rescaled(model: nn.Module) -> None:
    model.base_model.model.experts.expert(1).down_proj.set_scale("default", 3.0)


@pytest.mark.parametrize(
    ("prepare", "fields"),
    [
        (lambda model: model.merge_adapter(), {}),
        (lambda model: model.train(), {"lora_dropout": 0.5}),
        (twice, {}),
        (rescaled, {}),
        (watch, {}),
        (None, {"quant": None}),
        (None, {"quant": None, "residual": "explicit"}),
        (None, {"target_modules": ["down_proj"]}),
    ],
    ids=["merged", "dropout", "two", "rescaled", "watched", "implicit", "explicit", "some"],
)
def test_what_is_no_group_is_computed_one_after_the_other(
    prepare: Any, fields: dict[str, Any], at_once: list[int]
) -> None:
    model = block("mixtral", **fields)
    if prepare is not None:
        prepare(model)
    model(*sent_to(0, 1, 2))
    assert at_once == []


def test_several_processes_compute_them_one_after_the_other(
    at_once: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pissa.layers.experts, "world_size", lambda: 2)
    model = block("mixtral")
    model(*sent_to(0, 1))
    assert at_once == []


# ---- Targets ---------------------------------------------------------------------------------------------------------


def names(*leaves: str, blocks: tuple[int, ...] = (0, 1)) -> set[str]:
    return {f"model.layers.{b}.mlp.experts.{i}.{leaf}" for b in blocks for i in range(EXPERTS) for leaf in leaves}


ATTENTION = {f"model.layers.{b}.self_attn.{n}_proj" for b in range(2) for n in "qkvo"}
QUERIES = {name for name in ATTENTION if "q_proj" in name}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": "all-linear"}, ATTENTION | names("gate_up_proj", "down_proj")),
        ({"target_modules": ["gate_up_proj"]}, names("gate_up_proj")),
        ({"target_modules": ["w1", "w2", "w3"]}, names("gate_up_proj", "down_proj")),
        ({"target_modules": ["gate_proj", "up_proj", "q_proj"]}, QUERIES | names("gate_up_proj")),
        ({"target_modules": ["w1", "q_proj"]}, QUERIES),  # half a fused weight
        ({"target_modules": ["w2"], "layers_to_transform": [1]}, names("down_proj", blocks=(1,))),
        ({"target_modules": r".*\.0\..*experts\.\d+\.down_proj"}, names("down_proj", blocks=(0,))),
        ({"exclude_modules": ["experts"]}, ATTENTION),
        ({"target_parameters": ["experts.down_proj"], "target_modules": ["q_proj"]}, QUERIES | names("down_proj")),
        (
            {"target_parameters": ["model.layers.1.mlp.experts.gate_up_proj"], "target_modules": []},
            names("gate_up_proj", blocks=(1,)),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_targets(fields: dict[str, Any], expected: set[str]) -> None:
    model = pissa.wrap(make("mixtral"), r=R, **fields)
    assert set(pissa_layers(model.base_model.model, "default")) == expected


def test_shared_experts_and_dense_blocks_are_linear_layers_like_others() -> None:
    model = pissa.wrap(make("deepseek_v2"), r=R, target_modules=["gate_proj", "up_proj", "down_proj"])
    found = set(pissa_layers(model.base_model.model, "default"))
    linears = {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")}
    linears |= {f"model.layers.1.mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down")}
    routed = {f"model.layers.1.mlp.experts.{i}.{n}" for i in range(EXPERTS) for n in ("gate_up_proj", "down_proj")}
    assert found == linears | routed


# ---- Refusals --------------------------------------------------------------------------------------------------------


def on_meta(model: nn.Module) -> None:
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(torch.empty_like(experts.down_proj, device="meta"))


def test_a_block_that_is_called_after_its_experts_is_not_taken_for_them() -> None:
    model = make("mixtral")
    for layer in model.model.layers:
        layer.mlp.__class__ = type("MixtralExpertsBlock", (type(layer.mlp),), {})
    pissa.wrap(model, r=R)
    assert unfused_experts(model).keys() == {f"model.layers.{number}.mlp.experts" for number in range(2)}


def of_another_class(model: nn.Module) -> None:
    model.model.layers[1].mlp.experts.down_proj = type("Packed", (nn.Parameter,), {})(torch.zeros(EXPERTS, 32, 48))


def with_nan(model: nn.Module) -> None:
    model.model.layers[1].mlp.experts.down_proj.data[2, 3, 5] = torch.nan


def renamed(model: nn.Module) -> None:
    experts = model.model.layers[1].mlp.experts
    experts.__class__ = type("OpenAIPrivacyFilterExperts", (type(experts),), {})


def in_codes(model: nn.Module) -> None:
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    model.model.layers[1].mlp.experts = Mxfp4GptOssExperts(model.config)


OTHERWISE = "experts.2.down_proj is not adapted like model.layers.0.mlp.experts.0.down_proj"


@pytest.mark.parametrize(
    ("prepare", "fields", "kind", "words"),
    [
        (on_meta, {}, ValueError, "model.layers.1.mlp.experts.down_proj is on the meta device: fused experts cannot"),
        (of_another_class, {}, TypeError, "model.layers.1.mlp.experts.down_proj is a Packed, not a dense parameter"),
        (renamed, {}, TypeError, "is a OpenAIPrivacyFilterExperts, which computes its experts in a way of its own;"),
        (in_codes, {}, TypeError, r"is a Mxfp4GptOssExperts, whose kernels return no gradients: pissa.load\(folder\)"),
        (in_codes, {"target_modules": ["q_proj"]}, TypeError, "is a Mxfp4GptOssExperts"),
        (with_nan, {}, ValueError, r"layer model.layers.1.mlp.experts.2.down_proj: weight: contains NaN"),
        (with_nan, {"quant": "nf4"}, ValueError, r"layer model.layers.1.mlp.experts.2.down_proj: weight: contains NaN"),
        (None, {"use_dora": True}, TypeError, r"holds fused experts, for which PEFT's files have no magnitudes"),
        (None, {"rank_pattern": {"experts.2.down_proj": 1}}, ValueError, OTHERWISE),
        (None, {"target_modules": r".*experts\.[01]\.down_proj"}, ValueError, OTHERWISE),
        (
            None,
            {"target_modules": r".*experts\.down_proj"},
            ValueError,
            "let the pattern match model.layers.0.mlp.expe",
        ),
        (None, {"target_parameters": ["q_proj.weight"]}, ValueError, r"\['q_proj.weight'\] are not weights of fused"),
        (None, {"target_parameters": ["experts.down_proj"]}, ValueError, r"together with target_modules='all-linear'"),
        (None, {"r": 33, "target_modules": ["w2"]}, ValueError, r"rank 33 is too large for layer model.layers.0"),
    ],
)
def test_refusals_leave_the_model_as_it_was(
    prepare: Any, fields: dict[str, Any], kind: type[Exception], words: str, tokens: Tensor
) -> None:
    model = make("mixtral")
    if prepare is not None:
        prepare(model)
    before, config = snapshot(model), pissa.PissaConfig(**{"r": R, **fields})
    output = logits(model, tokens) if prepare is None else None
    with pytest.raises(kind, match=words):
        pissa.wrap(model, config)
    assert_same(model, before)
    assert output is None or torch.equal(logits(model, tokens), output)
    assert not unfused_experts(model)
