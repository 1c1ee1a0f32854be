"""What an adapter has to be on every architecture: `LIFE` has the checks, in the order in which one model goes through
them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

import pissa
import reference
from architectures import Architecture
from language_models import assert_same, snapshot
from oracle import assert_principal, change_all
from pissa import PissaModel
from pissa.layers.layer import pissa_layers
from torch_settings import default_dtype

ADAPTER = "default"
Fields = Mapping[str, Any]
"""Fields of PissaConfig: which form the base takes."""


# ---- The adapted function by its definition --------------------------------------------------------------------------


class InDouble(TorchFunctionMode):
    """Computes in float64 what transformers computes in float32 whatever the model's dtype is: norms, softmax, rotary
    embeddings, routers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {k: torch.float64 if value is torch.float32 else value for k, value in (kwargs or {}).items()}
        return torch.Tensor.double(*args) if func is torch.Tensor.float else func(*args, **kwargs)


@contextmanager
def in_double() -> Iterator[None]:
    with default_dtype(torch.float64), InDouble():
        yield


class Evaluation(NamedTuple):
    """A loss, the logits, and the gradients of what is trained: the two factors of each layer, as matrices, under the
    layer's name, and other parameters under their names in the base."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]


def evaluation(model: PissaModel, batch: dict[str, Tensor]) -> Evaluation:
    """Of a wrapped model, by its own code."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = {}
    factors = set()
    for name, layer in pissa_layers(model.base_model.model, ADAPTER).items():
        parameters = layer.factor_parameters(ADAPTER)
        factors |= {id(parameter) for parameter in parameters}
        # An expert that no token is sent to has no gradient.
        pair = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        gradients |= dict(zip((f"{name} A", f"{name} B"), layer.as_matrices(*pair), strict=True))
    for name, parameter in model.base_model.model.named_parameters():
        if parameter.requires_grad and id(parameter) not in factors:
            gradients[in_base(name)] = parameter.grad
    return Evaluation(output.loss.detach(), output.logits.detach(), gradients)


def in_base(name: str) -> str:
    """What a parameter of an adapted module is called in the base."""
    return name.replace(".base_layer", "").replace(f".modules_to_save.{ADAPTER}", "")


def definition(
    architecture: Architecture, model: PissaModel, batch: dict[str, Tensor], dtype: torch.dtype
) -> Evaluation:
    """The same by the definition: a fresh base, run by its own code with W + s ((B0 + dB) (A0 + dA) - B0 A0) for each
    weight W, and gradients from autograd. W is Q + s B0 A0 where the base is stored."""
    base = architecture.make().to(dtype)
    values = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers(remove_duplicate=False))
    values = {name: value.detach() for name, value in values.items()}
    leaves: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, layer in pissa_layers(model.base_model.model, ADAPTER).items():
        start, scaling = layer.start_of(ADAPTER), layer.scaling[ADAPTER]
        a0, b0 = start.a0.to(dtype), start.b0.to(dtype)
        da, db = (delta.detach().to(dtype).requires_grad_() for delta in layer.deltas(ADAPTER))
        leaves |= {f"{name} A": da, f"{name} B": db}
        expert = re.fullmatch(r"(.+)\.(\d+)\.(\w+)", name)
        stack = f"{expert[1]}.{expert[3]}" if expert else ""
        key = stack if stack in values else f"{name}.weight"
        owner = base.get_submodule(expert[1] if key == stack else name)
        if layer.base.form.name == "implicit":
            old = values[key][int(expert[2])] if key == stack else values[key]
            change = scaling * ((b0 + db) @ (a0 + da) - b0 @ a0)
            weight = old + as_weight(change, owner, old.shape)
        else:
            q = layer.base.dense_residual().to(dtype)
            weight = as_weight(q + scaling * (b0 + db) @ (a0 + da), owner, q.shape)
        if key == stack:
            stacks.setdefault(stack, {})[int(expert[2])] = weight
        else:
            values[key] = weight
    for key, experts in stacks.items():
        values[key] = torch.stack([experts[index] for index in range(len(experts))])
    factors = {id(p) for layer in pissa_layers(model, ADAPTER).values() for p in layer.factor_parameters(ADAPTER)}
    for name, parameter in model.base_model.model.named_parameters():
        if parameter.requires_grad and id(parameter) not in factors:
            leaves[in_base(name)] = values[in_base(name)] = parameter.detach().to(dtype).requires_grad_()
    for name, buffer in model.base_model.model.named_buffers():
        if f".modules_to_save.{ADAPTER}." in name:
            values[in_base(name)] = buffer.to(dtype) if buffer.is_floating_point() else buffer
    arguments = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    with in_double() if dtype == torch.float64 else nullcontext():
        # Untied, since a weight that is tied to an adapted one stays the base's.
        output = functional_call(base, values, kwargs=arguments, tie_weights=False)
    gradients = torch.autograd.grad(output.loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return Evaluation(output.loss.detach(), output.logits.detach(), dict(zip(leaves, gradients, strict=True)))


def is_transposed(module: nn.Module) -> bool:
    """Whether the module's weight is [in, out], each expert's of several."""
    is_llama4 = type(module).__name__ == "Llama4TextExperts"  # which does not say so
    return isinstance(module, (Conv1D, nn.Embedding)) or is_llama4 or getattr(module, "is_transposed", False)


def as_weight(matrix: Tensor, module: nn.Module, shape: torch.Size) -> Tensor:
    """A matrix [out, in] as the module's weight, or as that of one of its experts."""
    return matrix.T if is_transposed(module) else matrix.reshape(shape)


# Ours and the definition in float32 sum the same products in another order, so their errors have one size; that of a
# single number, such as the loss, may be small by luck. A mistake is thousands of times as large.
SPREAD = 16


def assert_as_accurate(got: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """Whether `got` misses the float64 value by no more than SPREAD times what the definition in float32, `plain`,
    misses it by, or one rounding of every element."""
    norm = torch.linalg.vector_norm
    error, allowed = norm(got.double() - exact), norm(plain.double() - exact)
    allowed = SPREAD * max(allowed, reference.EPS[torch.float32] * norm(exact))
    assert error <= allowed, f"{what}: error {error:.2e} of {norm(exact):.2e}, allowed {allowed:.2e}"


# ---- What the checks do with a model ---------------------------------------------------------------------------------


def wrapped(architecture: Architecture, form: Fields) -> PissaModel:
    return pissa.wrap(architecture.make(), **architecture.config(**form)).eval()


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits, without a graph."""
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def without_dropout(model: nn.Module) -> Any:
    """The model in training mode, where it computes what it does in evaluation mode."""
    for module in model.train().modules():
        for name in ("p", "dropout", "attention_dropout", "dropout_p"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    return model


def training_loss(model: PissaModel, batch: dict[str, Tensor]) -> Tensor:
    """In training mode, dropout the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        loss: Tensor = model.train()(**batch).loss
    model.eval()
    return loss


def step(model: PissaModel, batch: dict[str, Tensor]) -> float:
    """One step of AdamW; the loss before it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0)
    loss = training_loss(model, batch)
    loss.backward()
    optimizer.step()
    model.zero_grad()
    return loss.item()


# ---- The checks ------------------------------------------------------------------------------------------------------


@dataclass
class Life:
    """A wrapped model, and what it is compared with."""

    architecture: Architecture
    form: Fields
    folder: Path

    def __post_init__(self) -> None:
        self.batch = self.architecture.batch()
        # Frozen as well: torch multiplies by a weight that asks for a gradient in another way.
        self.fresh = self.architecture.make().requires_grad_(False)
        self.model = wrapped(self.architecture, self.form)
        self.base = output(self.model, self.batch)

    def is_base(self) -> bool:
        return torch.equal(output(self.model, self.batch), self.base)

    # From when they are first asked for: of the adapter as it is changed before it is saved.
    @cached_property
    def restored(self) -> PissaModel:
        return PissaModel.from_pretrained(self.architecture.make(), self.folder)

    @cached_property
    def plain(self) -> Evaluation:
        return definition(self.architecture, self.model, self.batch, torch.float32)

    @cached_property
    def exact(self) -> Evaluation:
        return definition(self.architecture, self.model, self.batch, torch.float64)


def check_start(life: Life) -> None:
    """Every layer starts from the principal part of its weight as a matrix."""
    layers = pissa_layers(life.model.base_model.model, ADAPTER)
    assert layers
    for name, layer in layers.items():
        weight = base_matrix(life.fresh, name).double()
        assert_principal(layer.start_of(ADAPTER), layer.scaling[ADAPTER], weight, name)


def base_matrix(base: nn.Module, name: str) -> Tensor:
    """The weight of the layer of that name, an expert's too, as a matrix [out, in]."""
    modules = dict(base.named_modules())
    if name in modules:
        module = modules[name]
        weight = module.weight.detach()
    else:
        path, index, leaf = name.rsplit(".", 2)
        module = modules[path]
        weight = getattr(module, leaf).detach()[int(index)]
    return weight.T if is_transposed(module) else weight.flatten(1)


def check_step_0(life: Life) -> None:
    """Before the first step the model is its base, bit for bit; in 4 bits, the quantised base."""
    if "quant" not in life.form:
        assert torch.equal(life.base, output(life.fresh, life.batch))
    with life.model.disable_adapter():
        assert life.is_base()


def check_training_step(life: Life) -> None:
    """One step lowers the loss, and nothing changes but what is to be trained."""
    model, batch = life.model, life.batch
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = step(model, batch)
    assert training_loss(model, batch) < loss
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    statistics = {name for name in before if name.rpartition(".")[2].startswith(("running_", "num_batches"))}
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= trained | statistics
    assert changed & trained
    for layer in pissa_layers(model, ADAPTER).values():
        # dL/dB = s dL/dy (x A0^T)^T: zero only for an expert that no token was sent to.
        da, db = layer.deltas(ADAPTER)
        assert da.any() == db.any()


def check_save_and_reload(life: Life) -> None:
    """A fresh base with the saved adapter is the trained model, bit for bit."""
    change_all(life.model)
    life.model.save_pretrained(life.folder)
    assert torch.equal(output(life.restored, life.batch), output(life.model, life.batch))
    assert {path.suffix for path in life.folder.iterdir()} == {".json", ".safetensors", ".md"}


def check_gradients(life: Life) -> None:
    """Loss, logits and gradients are those of the definition."""
    ours, plain, exact = evaluation(life.model, life.batch), life.plain, life.exact
    assert_as_accurate(ours.loss, plain.loss, exact.loss, "loss")
    assert_as_accurate(ours.logits, plain.logits, exact.logits, "logits")
    assert ours.gradients.keys() == exact.gradients.keys()
    assert any(gradient.any() for gradient in exact.gradients.values())
    for name, gradient in exact.gradients.items():
        assert_as_accurate(ours.gradients[name], plain.gradients[name], gradient, name)


def check_merge(life: Life) -> None:
    """Merged into one dense weight each, the layers are the adapted function up to rounding; unmerging is exact."""
    adapted = output(life.model, life.batch)
    life.model.merge_adapter()
    assert_as_accurate(output(life.model, life.batch), life.plain.logits, life.exact.logits, "merged")
    life.model.unmerge_adapter()
    assert torch.equal(output(life.model, life.batch), adapted)
    dense = life.restored.merge_and_unload()
    assert_as_accurate(output(dense, life.batch), life.plain.logits, life.exact.logits, "merged and unloaded")
    assert_plain(dense, life)


def check_disable_and_delete(life: Life) -> None:
    """A trained adapter that is disabled, deleted or unloaded leaves the base, bit for bit."""
    assert not life.is_base()
    with life.model.disable_adapter():
        assert life.is_base()
    life.model.delete_adapter(ADAPTER)
    # PEFT's own forward asks for the active adapter's configuration, and there is none.
    assert torch.equal(output(life.model.base_model.model, life.batch), life.base)
    if "quant" not in life.form:
        unloaded = life.model.unload()
        assert torch.equal(output(unloaded, life.batch), life.base)
        assert_plain(unloaded, life)


def assert_plain(model: nn.Module, life: Life) -> None:
    """Whether the model has the modules of one that was never wrapped, and weights that lie in memory as there."""
    kinds, expected = ({name: type(module) for name, module in m.named_modules()} for m in (model, life.fresh))
    assert kinds == expected
    strides, expected = ({name: value.stride() for name, value in m.state_dict().items()} for m in (model, life.fresh))
    assert strides == expected


LIFE = (
    check_start,
    check_step_0,
    check_training_step,
    check_save_and_reload,
    check_gradients,
    check_merge,
    check_disable_and_delete,
)


def check_nf4_is_refused(architecture: Architecture) -> None:
    """The message names the layer, and the model is as it was."""
    model = architecture.make()
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match=architecture.nf4_refused):
        pissa.wrap(model, **architecture.config(quant="nf4"))
    assert_same(model, before)
