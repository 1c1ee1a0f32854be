"""ops.attention and ops.rms_norm beside torch's, and layers that are fused in models of transformers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import pissa
from architecture_checks import without_dropout
from architectures import ARCHITECTURES
from daily import each
from one_layer import adapted, filled, wrap
from pissa import ops
from pissa.model import fused_layers
from torch_settings import default_dtype

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore::pissa.notices.PissaWarning")]


def wrapped_llama(**options: Any) -> Any:
    return pissa.wrap(ARCHITECTURES["llama3"].make(), r=4, task_type="CAUSAL_LM", **options).train()


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[batch, heads, length, dim], with heads beside each other in memory."""
    batch, heads, length, dim = shape
    values = torch.randn(batch, length, heads, dim, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).transpose(1, 2).requires_grad_()


def mask_of(batch: int, queries: int, keys: int) -> Tensor:
    """Causal, the first sequence padded on the left by three, the others on the right by two."""
    mask = torch.ones(batch, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    mask[0, ..., :3] = False
    mask[1:, ..., -2:] = False
    mask[0, :, :3, 0] = True
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
def test_torchs_attention_and_its_gradients(masked: bool, dtype: torch.dtype, tolerance: float) -> None:
    """In float64, of the rounded operands. bfloat16's shares and gradients are rounded to 2^-9 of their size twice."""
    q, k, v = (drawn(2, heads, 140, 24, seed=heads + i, dtype=dtype) for i, heads in enumerate((6, 2, 2)))
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    mask = mask_of(2, 140, 140) if masked else None
    found = ops.attention(q, k, v, mask=mask, scale=0.3, causal=not masked)
    assert found.transpose(1, 2).is_contiguous()
    gradients = torch.autograd.grad(found, (q, k, v), dout)
    exact = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    expected = scaled_dot_product_attention(*exact, mask, is_causal=not masked, scale=0.3, enable_gqa=True)
    right = torch.autograd.grad(expected, exact, dout.double())
    for got, wanted in zip((found, *gradients), (expected, *right), strict=True):
        assert got.dtype == dtype
        error = (got.double() - wanted).abs().max() / wanted.abs().max()
        assert error <= tolerance


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"q": torch.zeros(1, 4, 5, 0)}, ValueError, "q: got shape .* needed: a dim of 1"),
        ({"q": torch.zeros(2, 3, 4)}, ValueError, r"q: got shape \[2, 3, 4\]; needed: \[batch"),
        ({"k": torch.zeros(1, 2, 5, 8).double()}, TypeError, "k"),
        ({"k": torch.zeros(1, 2, 5, 8).bfloat16()}, TypeError, "k: got torch.bfloat16; needed: q's"),
        ({"k": torch.zeros(1, 3, 5, 8)}, ValueError, "k: got shape .* with heads that divide 4"),
        ({"k": torch.zeros(1, 2, 5, 7)}, ValueError, "k: got shape"),
        ({"v": torch.zeros(1, 2, 6, 8)}, ValueError, "v: got shape"),
        ({"scale": float("inf")}, ValueError, "scale: got inf"),
        ({"mask": torch.zeros(1, 1, 5, 5)}, TypeError, "mask: got torch.float32; needed: bool"),
        ({"mask": torch.ones(1, 1, 4, 5).bool()}, ValueError, "mask: got shape"),
    ],
)
def test_what_is_refused(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"q": torch.zeros(1, 4, 5, 8), "k": torch.zeros(1, 2, 5, 8), "v": torch.zeros(1, 2, 5, 8)}
    with pytest.raises(kind, match=message):
        ops.attention(**(given | changed))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)], ids=str)
def test_torchs_norm_and_its_gradient(dtype: torch.dtype, tolerance: float, offset: float) -> None:
    """In float64, of the rounded operands: some ten roundings of float32, and one to the dtype."""
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 35, 70, generator=generator)).to(dtype).requires_grad_()
    weight, dy = (torch.randn(shape, generator=generator).to(dtype) for shape in ((70,), (2, 35, 70)))
    y = ops.rms_norm(x, weight, 1e-5, offset=offset)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = x.detach().double().requires_grad_()
    expected = nn.functional.rms_norm(exact, (70,), weight.double() + offset, 1e-5)
    (right,) = torch.autograd.grad(expected, exact, dy.double())
    for got, wanted in ((y, expected), (dx, right)):
        assert got.dtype == dtype
        assert (got.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_a_norms_rows_do_not_meet() -> None:
    x = torch.randn(40, 33)
    y = ops.rms_norm(x, torch.ones(33))
    assert torch.equal(ops.rms_norm(x[7:8], torch.ones(33)), y[7:8])
    x[3, 5] = torch.nan
    again = ops.rms_norm(x, torch.ones(33))
    assert again[3].isnan().all()
    assert torch.equal(again[4:], y[4:])
    assert ops.rms_norm(x[:0], torch.ones(33)).shape == (0, 33)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.ones(4)}, r"weight: got shape \[4\]"),
        ({"weight": torch.ones(5, requires_grad=True)}, "weight"),
        ({"eps": -1.0}, "eps: got -1.0; allowed: a finite number, at least 0"),
        ({"offset": float("nan")}, "offset: got nan; allowed: a finite number$"),
    ],
)
def test_norms_that_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(**({"x": torch.zeros(3, 5), "weight": torch.ones(5)} | changed))


F = {"silu": nn.functional.silu, "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh")}


@pytest.mark.parametrize("activation", F)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)], ids=str
)
def test_torchs_gates_and_their_gradients(activation: str, dtype: torch.dtype, tolerance: float) -> None:
    """In float64, of the rounded operands: one rounding, and in float32 2 ulp of exp and a few more. Large values of
    both signs, runs of 512 and their edges."""
    values = torch.randn(3, 5, 701, generator=torch.Generator().manual_seed(0)) * 8
    values[:, 0, :6] = torch.tensor([0.0, -0.0, 60, -60, 200, -200])
    gate, up, dy = values.to(dtype).unbind(0)
    gate.requires_grad_(), up.requires_grad_()
    y = ops.gated(gate, up, activation)
    found = (y, *torch.autograd.grad(y, (gate, up), dy))
    exact = [tensor.detach().double().requires_grad_() for tensor in (gate, up)]
    expected = F[activation](exact[0]) * exact[1]
    for got, wanted in zip(found, (expected, *torch.autograd.grad(expected, exact, dy.double())), strict=True):
        assert got.dtype == dtype
        bound = tolerance * wanted.abs() + 1e-5 * (exact[1].abs() + dy.double().abs()).clamp(min=1)
        assert bool(((got.double() - wanted).abs() <= bound).all())


def test_gates_of_any_shape_and_gates_that_are_refused() -> None:
    x = torch.randn(4, 6)
    assert torch.equal(ops.gated(x.T, x.T), ops.gated(x, x).T)
    assert ops.gated(x[:0], x[:0]).shape == (0, 6)
    x[1, 2] = torch.nan
    assert ops.gated(x, torch.ones(4, 6)).isnan().nonzero().tolist() == [[1, 2]]
    with pytest.raises(ValueError, match=r"up: got shape \[4, 5\]; needed: gate's, \[4, 6\]"):
        ops.gated(x, x[:, :5])
    with pytest.raises(TypeError, match=r"up: got torch\.bfloat16; needed: gate's torch\.float32"):
        ops.gated(x, x.bfloat16())
    with pytest.raises(ValueError, match="activation: got 'relu'; allowed: 'silu', 'gelu_tanh'"):
        ops.gated(x, x, "relu")


GATES = {"llama3": "silu", "gemma3": "gelu_tanh", "gpt_oss": None, "t5": None, "roberta": None}


@pytest.mark.parametrize(("name", "activation"), GATES.items())
def test_which_gates_are_fused(name: str, activation: str | None) -> None:
    model = pissa.wrap(ARCHITECTURES[name].make(), **ARCHITECTURES[name].config())
    found = {module._fused_gate for module in model.modules() if hasattr(module, "_fused_gate")}
    assert found == (set() if activation is None else {activation})
    assert ("gates" in model.fused) == (activation is not None)


class Block(nn.Module):
    """A gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn: nn.Module = nn.SiLU()
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class Clamped(Block):
    def forward(self, hidden: Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(hidden).clamp(max=12)) * self.up_proj(hidden))


class Normed(Block):
    def forward(self, hidden: Tensor) -> Any:
        return super().forward(nn.functional.rms_norm(hidden, hidden.shape[-1:]))


class Pair(Block):
    def forward(self, hidden: Tensor) -> Any:
        batch, _length, _dim = hidden.shape
        return super().forward(hidden), batch


def with_another(block: Block, act_fn: nn.Module) -> Block:
    block.act_fn = act_fn
    return block


def watched() -> Block:
    block = Block()
    block.act_fn.register_forward_hook(lambda *_: None)
    return block


@pytest.mark.parametrize(
    "make",
    [
        *(Clamped, Normed, Pair, watched),
        *(lambda kind=kind: with_another(Block(), kind()) for kind in (nn.PReLU, nn.ReLU, nn.GELU, nn.Hardswish)),
    ],
)
def test_blocks_that_compute_something_else_are_their_own(make: Any) -> None:
    assert fused_layers._gate_activation(make()) is None


@pytest.mark.parametrize("setting", [{"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}])
def test_defaults_of_torch_do_not_change_what_is_found(setting: dict[str, Any]) -> None:
    block = Block()
    with default_dtype(setting.get("dtype", torch.float32)), torch.device(setting.get("device", "cpu")):
        assert fused_layers._gate_activation(block) == "silu"


def test_a_fused_block_is_called_as_it_was() -> None:
    model = ARCHITECTURES["llama3"].make().train()
    fused_layers.fuse_layers(model)
    block = model.model.layers[0].mlp
    hidden = torch.randn(2, 3, model.config.hidden_size)
    assert torch.equal(block(x=hidden), block(hidden))
    block.act_fn = nn.ReLU()
    expected = block.down_proj(torch.relu(block.gate_proj(hidden)) * block.up_proj(hidden))
    assert torch.equal(block(hidden), expected)
    torch.testing.assert_close(block.double()(hidden.double()).float(), expected, rtol=1e-4, atol=1e-6)


NAMES = [name for name, one in ARCHITECTURES.items() if one.make().config._attn_implementation == "sdpa"]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", each(NAMES, ["llama3", "gemma3", "deepseek_v3", "roberta"]))
def test_a_models_outputs_and_gradients(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = without_dropout(pissa.wrap(ARCHITECTURES[name].make(), fuse=False, **ARCHITECTURES[name].config()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    batch = ARCHITECTURES[name].batch()
    if padded and "input_ids" in batch and "pixel_values" not in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -3:] = 0

    def run() -> list[Tensor]:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = run()
    fused_layers.fuse_layers(model.get_base_model())
    if name != "t5":  # which has a bias for each distance
        monkeypatch.setattr(fused_layers, "sdpa_attention_forward", lambda *_, **__: pytest.fail("torch's"))
    for found, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-5 * float(wanted.abs().max()) + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_layer_is_one_product_with_its_adapter(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """For more than 16 rows. Hooks of the base are called, a change of zero leaves its bits, and copies are torch's."""
    model = wrap(filled(nn.Linear(64, 48)).to(dtype), r=3, fuse=False).train()
    layer: Any = adapted(model)
    x, few = torch.randn(20, 64, dtype=dtype), torch.randn(16, 64, dtype=dtype)
    expected, of_few = layer(x), layer(few)
    calls: list[bool] = []
    linear = ops.linear
    monkeypatch.setattr(ops, "linear", lambda *args, **of: calls.append(bool(of)) or linear(*args, **of))
    monkeypatch.setattr(ops, "build_info", lambda: {"isa": "amxbf16"})  # torch multiplies by tiles, too
    layer.base.fuse_product()
    assert torch.equal(layer(x), expected)
    assert not calls
    monkeypatch.setattr(ops, "build_info", lambda: {"isa": "avx2"})
    layer.base.fuse_product()
    layer.base.fuse_product()
    found = layer(x)
    assert calls == [True]
    assert torch.equal(found, layer.base_layer(input=x))
    assert calls == [True, False]
    assert torch.equal(layer(few), of_few)
    with torch.autocast("cpu", torch.float16):
        layer(x)
    assert len(calls) == 2
    torch.testing.assert_close(found, expected)
    for watch in ("register_forward_hook", "register_full_backward_hook"):
        calls.clear()
        handle = getattr(layer.base_layer, watch)(lambda *_: None)
        assert torch.equal(layer(x), found)
        assert calls == [False]  # the base's own
        handle.remove()
    for copied in (layer.base.dense_module(layer.base_layer.weight), pickle.loads(pickle.dumps(layer.base_layer))):
        calls.clear()
        copied(x)
        assert not calls
    loaded = adapted(pickle.loads(pickle.dumps(model)))
    assert torch.equal(loaded(x), loaded.base_layer(x))
    merged = copy.deepcopy(model).merge_and_unload().proj
    assert not {name for name in vars(merged) if "fused" in name or name == "forward"}
    assert torch.equal(model.unload().proj(x), nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))


def test_generation_is_torchs() -> None:
    ids, options = torch.arange(12).view(2, 6), {"max_new_tokens": 5, "do_sample": False}
    expected = ARCHITECTURES["llama3"].make().generate(input_ids=ids, **options)
    for model in (wrapped_llama(), wrapped_llama().eval()):
        assert torch.equal(model.generate(input_ids=ids, **options), expected)


NORMS = {"llama3": 0.0, "gemma3": 1.0, "qwen3": 0.0, "olmoe": 0.0, "gpt_oss": 0.0, "t5": None, "roberta": None}


@pytest.mark.parametrize(("name", "offset"), NORMS.items())
def test_which_norms_are_fused(name: str, offset: float | None) -> None:
    model = pissa.wrap(ARCHITECTURES[name].make(), **ARCHITECTURES[name].config())
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    found = {module._fused_norm[1] for module in norms if "forward" in vars(module)}
    assert found == (set() if offset is None else {offset})
    assert offset is None or all("forward" in vars(module) for module in norms)


def test_a_norm_that_is_trained_stays_torchs() -> None:
    model = ARCHITECTURES["llama3"].make().train()
    fused_layers.fuse_layers(model)
    assert "forward" not in vars(model.model.norm)
    model.requires_grad_(False)
    fused_layers.fuse_layers(model)
    model.model.norm.requires_grad_(True)
    batch = ARCHITECTURES["llama3"].batch()
    model(**batch).loss.backward()
    assert model.model.norm.weight.grad is not None


def test_a_copy_of_a_fused_model_is_its_own() -> None:
    model = wrapped_llama()
    other, batch = copy.deepcopy(model), ARCHITECTURES["llama3"].batch()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for labelled in (True, False):
        given = batch if labelled else {key: value for key, value in batch.items() if key != "labels"}
        output = other(**given)
        assert (output.loss if labelled else output.logits).abs().sum() > 0
    assert other(**batch).loss != model(**batch).loss


@pytest.mark.parametrize("unload", ["unload", "merge_and_unload"])
@pytest.mark.parametrize("steps", [0, 1])
def test_an_unloaded_model_is_as_it_was(steps: int, unload: str) -> None:
    inner, batch = ARCHITECTURES["llama3"].make(), ARCHITECTURES["llama3"].batch()
    before = {name: (set(vars(module)), type(module)) for name, module in inner.named_modules()}
    model = pissa.wrap(inner, r=4, task_type="CAUSAL_LM")
    for _ in range(steps):
        model.train()(**batch).loss.backward()
    assert "forward" in vars(inner)
    assert getattr(model, unload)() is inner
    assert {name: (set(vars(module)), type(module)) for name, module in inner.named_modules()} == before
    inner.train()
    plain = ARCHITECTURES["llama3"].make().train()
    assert torch.equal(inner(**batch).loss, plain(**batch).loss)


ALL = {"attention", "norms", "gates", "dense layers", "head"}


def test_every_way_to_a_model_fuses_unless_told_not_to(tmp_path: Path) -> None:
    make = ARCHITECTURES["llama3"].make
    make().save_pretrained(tmp_path / "base")
    dense, config = ALL, pissa.PissaConfig(r=2)
    if ops.build_info()["isa"] == "amxbf16":
        dense = ALL - {"dense layers"}
    model = pissa.wrap(make(), config)
    assert model.fused == get_peft_model(make(), config).fused == dense
    model.save_pretrained(tmp_path / "adapter")
    assert pissa.PissaModel.from_pretrained(make(), tmp_path / "adapter").fused == dense
    assert pissa.load(tmp_path / "base", config).fused == dense
    assert pissa.wrap(make(), r=2, quant="nf4").fused == ALL - {"dense layers"}
    assert pissa.wrap(make(), config, fuse=False).fused == set()
    assert pissa.PissaModel.from_pretrained(make(), tmp_path / "adapter", fuse=False).fused == set()
    plain = pissa.load(tmp_path / "base", config, fuse=False)
    assert plain.fused == set()
    plain.add_adapter("other", pissa.PissaConfig(r=2, target_modules=["lm_head"]))
    assert plain.fused == set()


def test_evaluation_and_disabled_adapters_are_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation mode bit for bit transformers' own, with a gradient or without one; in training mode, what the
    adapted model computes before its first step."""
    own, batch = ARCHITECTURES["llama3"].make(), ARCHITECTURES["llama3"].batch()
    expected, model = own(**batch), wrapped_llama()
    for parameter in (trained := [p for p in model.parameters() if p.requires_grad]):
        parameter.data += 0.01
    with model.disable_adapter():
        of_steps = model(**batch).loss
        assert torch.equal(model.eval()(**batch).loss, expected.loss)
    for parameter in trained:
        parameter.data -= 0.01
    assert torch.equal(model(**batch).logits, expected.logits)
    assert torch.equal(model.train()(**batch).loss, of_steps)
    monkeypatch.setattr(ops, "attention", lambda *_, **__: pytest.fail("ours"))
    model.eval()(**batch)


def test_another_adapters_layers_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "build_info", lambda: {"isa": "avx2"})  # with AMX, dense layers keep torch's product
    model = wrapped_llama(target_modules=["q_proj"])
    model.add_adapter("other", pissa.PissaConfig(r=2, target_modules=["k_proj"]))
    projection: Any = model.base_model.model.model.layers[0].self_attn.k_proj
    assert "forward" in vars(projection.base_layer)


def test_torch_compile_traces_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = wrapped_llama(), ARCHITECTURES["llama3"].batch()
    expected = wrapped_llama(fuse=False)(**batch).loss
    monkeypatch.setattr(ops, "attention", lambda *_, **__: pytest.fail("ours"))
    monkeypatch.setattr(ops, "token_scores", lambda *_, **__: pytest.fail("ours"))
    torch.testing.assert_close(torch.compile(model, backend="eager")(**batch).loss, expected)


def test_a_model_on_another_device_is_left_to_itself() -> None:
    model = wrapped_llama().to("meta").get_base_model()
    hidden = torch.empty(2, 20, model.config.hidden_size, device="meta")
    for module in (model.model.norm, model.model.layers[0].mlp, model.model.layers[0].self_attn.q_proj):
        assert module(hidden).is_meta


def test_another_attention_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES["llama3"].make().requires_grad_(False).train()
    model.set_attn_implementation("eager")
    batch = ARCHITECTURES["llama3"].batch()
    own = model(**batch).logits
    fused_layers.fuse_layers(model)
    monkeypatch.setattr(ops, "attention", lambda *_, **__: pytest.fail("ours"))
    torch.testing.assert_close(model(**batch).logits, own)
    other = ARCHITECTURES["llama3"].make().train()
    torch.testing.assert_close(other(**batch).logits, own)  # torch's, as before


def test_autocast() -> None:
    """RoPE leaves q and k in float32 beside a v of bfloat16, as torch's attention takes them."""
    model, batch = wrapped_llama(), ARCHITECTURES["llama3"].batch()
    with torch.autocast("cpu", torch.bfloat16):
        own = wrapped_llama(fuse=False)(**batch).loss
        found = model(**batch).loss
    found.backward()
    torch.testing.assert_close(found, own, rtol=2e-2, atol=2e-2)
    q, k, v = (drawn(1, 2, 9, 8, seed=seed) for seed in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.attention(q, k, v.bfloat16()).dtype == torch.bfloat16


def test_masks_that_follow_the_attentions_name() -> None:
    """Gemma 4 cuts its queries for logits_to_keep, where it knows the attention."""
    model, batch = ARCHITECTURES["gemma4"].make(), ARCHITECTURES["gemma4"].batch()
    expected = model(input_ids=batch["input_ids"], logits_to_keep=4).logits
    fused_layers.fuse_layers(model.train())
    torch.testing.assert_close(model(input_ids=batch["input_ids"], logits_to_keep=4).logits, expected)


def test_an_empty_batch() -> None:
    q, k, v = (torch.zeros(0, 2, 3, 4, requires_grad=True) for _ in range(3))
    ops.attention(q, k, v).sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape
