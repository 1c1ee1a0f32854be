"""Fused experts: transformers 5 stores the weights of all experts of a layer in one parameter [experts, out, in].

To be adapted, they become linear layers that are views of that parameter. `fuse_experts` joins them again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from pissa import ops
from pissa.base.classes import base_of
from pissa.config import PissaConfig, is_all_linear
from pissa.distributed import world_size
from pissa.layers.modules import GroupMember, PissaLinear

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
"""The names of fused weights, in the order in which transformers registers them."""

FORMER_NAMES = {"gate_up_proj": ({"w1", "w3"}, {"gate_proj", "up_proj"}), "down_proj": ({"w2"}, {"down_proj"})}
"""The names that the weights of an expert had before they were fused. Lists of targets still use them."""

# Experts whose outputs transformers sums in float32, in whatever dtype the model computes.
_SUMMED_IN_FLOAT32 = ("Inkling2Experts", "Inkling2LoopExperts", "NemotronHExperts")
# Experts in codes. Only transformers' GPU kernels compute with them, and only forward.
_WITHOUT_GRADIENTS = ("Mxfp4GptOssExperts", "FP8Experts")
# Experts that transformers decorates like the others but that compute entirely in float32.
_OF_THEIR_OWN = ("OpenAIPrivacyFilterExperts",)


_Groups = dict[str, dict[str, Any]]
"""For each name of a weight, what `ops.grouped_linear` takes of the experts' layers with that name."""


class UnfusedExperts(nn.Module):
    """An experts module of transformers whose experts are linear layers, named "0", "1", ...

    It computes the same as transformers' "eager" implementation, in the same order, whatever implementation the model
    is set to. An expert is read, or decoded from codes, only if some token is routed to it. In multi-process training
    every expert runs, so that every process has gradients for the same parameters; an expert without tokens gets an
    empty batch. `fused` is the original module without its weights: biases, activation, gate, norm.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.fused = fused
        self.names = list(_weight_names(fused))
        for index in range(fused.num_experts):
            self.add_module(str(index), nn.Module())
        for name in self.names:
            weights = getattr(fused, name)
            for index, weight in enumerate(weights.detach()):
                matrix = weight.mT if is_transposed(fused) else weight
                with torch.device("meta"):
                    linear: Any = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
                linear.weight = nn.Parameter(matrix, requires_grad=weights.requires_grad)
                linear.rows_are_tokens = True  # a router chooses them from any row of the batch
                self.expert(index).add_module(name, linear.train(fused.training))
            setattr(fused, name, None)  # keeps the parameter's slot, so fuse() restores the order

    def expert(self, index: int) -> nn.Module:
        """The linear layers of the expert with that index: gate_up_proj (up_proj if it has no gate) and down_proj."""
        return self.get_submodule(str(index))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts, for `hidden_states` [tokens, hidden]. `top_k_index` and
        `top_k_weights`, [tokens, k], are a token's experts and their weights. An index equal to the number of experts
        means no expert."""
        in_float32 = type(self.fused).__name__ in _SUMMED_IN_FLOAT32
        output = torch.zeros_like(hidden_states, dtype=torch.float32 if in_float32 else None)
        # FSDP2 adds the gradients of a block as one array, for the same parameters in every process. DDP waits for the
        # gradients of all parameters. Therefore an idle expert needs gradients too, of zeros. (Momentum then moves it,
        # as it moves a part of a fused weight.)
        together = world_size() > 1 and torch.is_grad_enabled()
        experts, counts = torch.stack(torch.unique(top_k_index, return_counts=True)).tolist()
        if experts and experts[-1] == self.fused.num_experts:
            experts, counts = experts[:-1], counts[:-1]
        if world_size() == 1 and (groups := self._groups(experts, hidden_states)):
            return self._compute_at_once(groups, counts, hidden_states, top_k_index, top_k_weights, output)
        for index in range(len(self)) if together else experts:
            position, token = torch.where(top_k_index.mT == index)
            y = self._compute(partial(self._project, index), hidden_states[token])
            chosen = y * top_k_weights[token, position, None]
            output.index_add_(0, token, chosen.to(output.dtype))
        return output.to(hidden_states.dtype)

    def _compute(self, project: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
        up, down = self.names
        x = project(up, x)
        hidden = self.fused._apply_gate(x) if self.fused.has_gate else self.fused.act_fn(x)
        y = project(down, hidden)
        # transformers before 5.20 has neither experts with a norm nor the attribute.
        return cast(Tensor, self.fused.post_expert_norm(y)) if getattr(self.fused, "has_post_expert_norm", False) else y

    def _project(self, index: int, name: str, x: Tensor) -> Tensor:
        return self._add_bias(name, index, self.expert(index).get_submodule(name)(x))

    def _add_bias(self, name: str, index: int | Tensor, y: Tensor) -> Tensor:
        # Added as transformers does it: a linear layer with a bias would round one time less.
        return y + getattr(self.fused, f"{name}_bias")[index] if self.fused.has_bias else y

    def _groups(self, experts: Sequence[int], x: Tensor) -> _Groups:
        """The groups of these experts, for inputs like `x`. Empty unless all layers are alike: codes with one adapter,
        or with none. (torch.compile would compile again for every number of tokens.)"""
        groups: _Groups = {}
        if torch.compiler.is_compiling() or not experts:
            return groups
        for name in self.names:
            members: list[GroupMember] = []
            for index in experts:
                layer = self.expert(index).get_submodule(name)
                member = layer.as_group_member(x) if isinstance(layer, PissaLinear) else None
                if member is None or (members and member.key != members[0].key):
                    return {}
                members.append(member)
            weights, scalings, int8, a, b, a0, b0 = zip(*members, strict=True)
            starts = {} if a0[0] is None else {"a0": a0, "b0": b0}
            groups[name] = {"weights": weights, "a": a, "b": b, **starts, "scaling": scalings[0], "int8": int8[0]}
        return groups

    def _compute_at_once(
        self, groups: _Groups, counts: list[int], x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, output: Tensor
    ) -> Tensor:
        """Computes what the loop over the experts adds to `output`. It is bit-identical where the bits of a row do not
        depend on the other rows. (torch's activations round the last elements of a tensor differently.)"""
        expert, pair = top_k_index.mT.flatten().sort(stable=True)
        offsets, tokens = [0, *accumulate(counts)], len(x)
        ends = offsets[-1]  # pairs without an expert come last
        position, token = pair[:ends] // tokens, pair[:ends] % tokens

        def project(name: str, inputs: Tensor) -> Tensor:
            return self._add_bias(name, expert[:ends], ops.grouped_linear(inputs, offsets=offsets, **groups[name]))

        y = self._compute(project, x[token]) * top_k_weights[token, position, None]
        y = torch.cat([y, y.new_zeros(len(pair) - ends, y.shape[1])]).to(output.dtype)
        # A token's rows in ascending order are its experts in that order. On CUDA, index_add_ has no fixed order.
        rows = pair.argsort().view(-1, tokens).sort(0).values
        for part in y.index_select(0, rows.flatten()).view(*rows.shape, -1):
            output += part
        return output.to(x.dtype)

    def fuse(self) -> nn.Module:
        """The original module, with the weights of its experts joined in one parameter each. The weights must be
        dense."""
        for name in self.names:
            setattr(self.fused, name, nn.Parameter(self.fused_weight(name), requires_grad=False))
        return cast(nn.Module, self.fused)

    def fused_weight(self, name: str) -> Tensor:
        """The weights with that name of all experts, in their current state, in one tensor of the original's shape."""
        weights = torch.stack([linear.weight.detach() for linear in self.linears(name)])
        return weights.mT.contiguous() if is_transposed(self.fused) else weights

    def linears(self, name: str) -> list[Any]:
        """The linear layers with that name, of all experts."""
        return [self.expert(index).get_submodule(name) for index in range(len(self))]

    def __len__(self) -> int:
        return cast(int, self.fused.num_experts)


class UnfusedLlama4Experts(UnfusedExperts):
    """Llama 4's experts. Each computes every token. Tokens that the router has not sent to an expert come as zeros."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """The experts' outputs [experts * tokens, hidden] for inputs of that shape, one expert after another."""
        inputs = hidden_states.view(len(self), -1, hidden_states.shape[-1])
        outputs = []
        for index, x in enumerate(inputs):
            expert: Any = self.expert(index)
            gate, up = expert.gate_up_proj(x).chunk(2, dim=-1)
            outputs.append(expert.down_proj(up * self.fused.act_fn(gate)))
        return torch.cat(outputs)


def _is_llama4(fused: nn.Module) -> bool:
    return type(fused).__name__ == "Llama4TextExperts"


def is_transposed(fused: Any) -> bool:
    """Whether the weights of fused experts are [experts, in, out]. Llama 4's are, without declaring it."""
    return _is_llama4(fused) or fused.is_transposed


def _weight_names(fused: Any) -> tuple[str, str]:
    gate_up, up, down = WEIGHTS
    return (gate_up if hasattr(fused, gate_up) else up, down)


# ---- Unfusing a model ------------------------------------------------------------------------------------------------


def unfuse_experts(model: nn.Module, config: PissaConfig) -> None:
    """Turns the fused experts that the configuration targets into linear layers, and writes their names into its
    `target_modules`, where PEFT finds them.

    Experts may be targeted by "all-linear", by the names of their weights, by the names that these had before they were
    fused (w1 and w3, or gate_proj and up_proj, for gate_up_proj), by a pattern that matches
    "...experts.0.gate_up_proj", or in `target_parameters`. Raises TypeError or ValueError for experts that cannot be
    unfused, naming them and what to do. The model may then be partly changed; see `model.inject.restored_on_error`.
    """
    for path, fused in list(model.named_modules()):
        if type(fused).__name__ in _WITHOUT_GRADIENTS:
            raise TypeError(
                f"{path} is a {type(fused).__name__}, whose kernels return no gradients: pissa.load(folder) trains "
                "over the codes in the model's files [P022]"
            )
        own = fused.named_parameters(recurse=False) if "expert" in type(fused).__name__.lower() else ()
        stacks = [name for name, parameter in own if parameter.dim() == 3]
        if not stacks or not _wanted(path, stacks, config):
            continue
        _check_experts(path, fused)
        if config.use_dora:
            raise TypeError(
                f"{path} holds fused experts, for which PEFT's files have no magnitudes: leave use_dora out, or leave "
                f"the experts out with exclude_modules, for instance [{path.rpartition('.')[2]!r}] [P016]"
            )
        model.set_submodule(path, UnfusedLlama4Experts(fused) if _is_llama4(fused) else UnfusedExperts(fused))
    _target(unfused_experts(model), config)


def _wanted(path: str, weights: list[str], config: PissaConfig) -> bool:
    """Whether the configuration targets the experts at that path, whose stacks of matrices have these names."""
    if any(f".{path}.{name}".endswith(f".{target}") for name in weights for target in config.target_parameters or ()):
        return True
    probe: Any = copy.copy(config)
    probe.target_modules = {path}
    if not check_target_module_exists(probe, path):  # excluded, or in a layer that is not to be adapted
        return False
    probe.target_modules = set(weights) if is_all_linear(config) else _add_present_names(config.target_modules)
    is_wanted = any(check_target_module_exists(probe, f"{path}.0.{name}") for name in weights)
    if not is_wanted and any(check_target_module_exists(probe, f"{path}.{name}") for name in weights):
        raise ValueError(
            f"target_modules={config.target_modules!r} matches a parameter of {path}, whose experts are adapted as "
            f"separate layers: let the pattern match {path}.0.{weights[0]} [P021]"
        )
    return is_wanted


def _add_present_names(targets: Any) -> Any:
    """Returns the targets together with their names in fused experts. A pattern stays as it is."""
    if isinstance(targets, str):
        return targets
    present = set(targets or ())
    for name, former in FORMER_NAMES.items():
        if any(names <= present for names in former):
            present.add(name)
    return present


def _check_experts(path: str, fused: Any) -> None:
    class_name = type(fused).__name__
    contract = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")
    is_known = _is_llama4(fused) or (class_name not in _OF_THEIR_OWN and all(hasattr(fused, name) for name in contract))
    advice = f"leave the experts out with exclude_modules, for instance [{path.rpartition('.')[2]!r}]"
    if not is_known:
        raise TypeError(f"{path} is a {class_name}, which computes its experts in a way of its own; {advice} [P023]")
    for name in _weight_names(fused):
        weights = fused._parameters.get(name)
        if type(weights) is not nn.Parameter or weights.dim() != 3:
            raise TypeError(
                f"{path}.{name} is a {type(weights).__name__}, not a dense parameter [experts, ...]; {advice} [P023]"
            )


def _target(unfused: dict[str, UnfusedExperts], config: PissaConfig) -> None:
    """Moves the names of the experts' weights from `target_parameters` to `target_modules`, as names of layers."""
    parameters = set(config.target_parameters or ())
    layers, known = set(), set()
    for path, experts in unfused.items():
        for name in experts.names:
            if named := {target for target in parameters if f".{path}.{name}".endswith(f".{target}")}:
                known |= named
                layers |= {f"{path}.{index}.{name}" for index in range(len(experts))}
    if parameters - known:
        raise ValueError(
            f"target_parameters: {sorted(parameters - known)} are not weights of fused experts; PiSSA adapts layers: "
            "name them in target_modules [P021]"
        )
    if layers and isinstance(config.target_modules, str):
        raise ValueError(
            f"target_parameters={sorted(parameters)} together with target_modules={config.target_modules!r}: give "
            'target_modules as a list, or leave target_parameters out ("all-linear" has the experts too) [P021]'
        )
    if unfused and not isinstance(config.target_modules, str):
        config.target_modules = _add_present_names(config.target_modules) | layers
    config.target_parameters = None


# ---- Fusing again ----------------------------------------------------------------------------------------------------


def unfused_experts(model: nn.Module) -> dict[str, UnfusedExperts]:
    """The unfused experts of a model, by their names in it."""
    return {path: module for path, module in model.named_modules() if isinstance(module, UnfusedExperts)}


def fuse_experts(model: nn.Module) -> None:
    """Restores the original experts modules, with the weights of the experts' linear layers. Experts whose weights are
    codes stay unfused, because no parameter can hold the codes of several layers."""
    for path, experts in unfused_experts(model).items():
        if not any(base_of(linear).is_quantised for name in experts.names for linear in experts.linears(name)):
            model.set_submodule(path, experts.fuse())
