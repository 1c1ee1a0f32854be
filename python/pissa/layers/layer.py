"""The adapted layer, for any kind of module: a base, and for each adapter a change that starts at zero. `modules`
contains the parts that depend on the kind."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from pissa import ops
from pissa.base.classes import base_of
from pissa.base.init_methods import INIT_METHODS
from pissa.base.protocol import Base, unshard
from pissa.base.remembered import ResidualFingerprint, WeightFingerprint
from pissa.base.start import Deltas, KeepsDtype, Origin, StartFactors, Starts
from pissa.base.stored import stored_linear
from pissa.config import IMPLICIT, PissaConfig
from pissa.distributed import call_whole, is_dtensor, is_sharded, partition_as, shard_as, whole_tensor


class PissaLayer(LoraLayer):  # type: ignore[misc]
    """PEFT's LoRA layer, with parameters that are the differences from the start factors::

        y = base(x) + s (B A - B0 A0) x,   A = A0 + dA,  B = B0 + dB

    The factors A [r, in] and B [out, r] belong to the base's weight as a matrix [out, in]. PEFT's parameters hold dA
    and dB and start at zero; for convolutions they have a different shape. lora_start[adapter] holds A0 and B0, frozen.
    base_layer, PEFT's name, is the base's module. While adapters are merged, it is a dense module with the merged
    weight, and the base's module is kept in lora_unmerged.
    """

    other_param_names = (*LoraLayer.other_param_names, "lora_start")  # PEFT deletes an adapter's entry in each of these

    factor_keys: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    """The names of the two factors in PEFT's files, after the layer's name."""

    int8 = False
    """Whether, in training mode, products with a base in codes may be of integers (`ops.linear`)."""

    base_layer: Any  # a module; which one depends on the kind and on what is merged

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: PissaConfig, *, model_dtype: torch.dtype, **kwargs: Any
    ) -> None:
        self.model_dtype = model_dtype
        # PEFT's embeddings and convolutions create their first adapter without passing it.
        self._target_name = kwargs["target_name"]
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self._rows_are_tokens = getattr(base_layer, "rows_are_tokens", False)  # true for fused experts
        self.weight_fingerprint, self.residual_fingerprint = WeightFingerprint(), ResidualFingerprint()

    # -- what depends on the kind of module

    def factor_parameters(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """PEFT's parameters for A and B."""
        return self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight

    @abstractmethod
    def change(self, y: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        """Adds the adapter's change to `y`, the base's output for `x`."""

    def as_parameters(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Reshapes the matrices a [r', in] and b [out, r'] to the shapes of PEFT's parameters."""
        return a, b

    def as_matrices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `as_parameters`."""
        return a, b

    # -- the base function

    @property
    def base(self) -> Base:
        """The base, whether or not adapters are merged."""
        return base_of(self.base_layer if self.lora_unmerged is None else self.lora_unmerged)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape of the weight as a matrix: (out, in)."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:
        """The weight of the base, or the merged weight: the module's parameter if it is dense, otherwise decoded. T5,
        for example, casts a layer's input to the dtype of its weight, and the dtype of codes would be wrong."""
        return base_of(self.base_layer).shown_weight(self.dense_dtype)

    @property
    def dense_dtype(self) -> torch.dtype:
        """The dtype of a dense weight that would replace the base: the model's dtype if the base is codes."""
        return self.base.dtype or self.model_dtype

    def store_base(self, residual: Tensor | ops.QuantizedWeight, start: StartFactors, config: PissaConfig) -> None:
        """Replaces the base by one that stores `residual`, which lacks `start`. It is partitioned if the weight is."""
        base = self.base
        if start.recipe is not None and start.recipe_rank:
            start.recipe = start.recipe[0].cpu(), start.recipe[1].cpu()
        stored = stored_linear(residual, start, base.bias, getattr(torch, config.quant_storage))
        stored.dense_type, stored.dtype = base.dense_type, self.dense_dtype
        stored.fingerprint = self.weight_fingerprint.of(base)
        self.base_layer = stored.train(base.module.training)
        partition_as(base.parameter, self.base_layer.parameters(recurse=False))

    # -- adapters and their start factors

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: PissaConfig, **kwargs: Any) -> None:
        """Adds an adapter whose change is zero. It cannot learn before `start_from` or `share_start` is called."""
        if not hasattr(self, "lora_start"):  # PEFT calls this while it constructs the layer
            self.lora_start = nn.ModuleDict()
            self.lora_unmerged: nn.Module | None = None
            self.merge_aware: set[str] = set()
            """The adapters that compute with the codes that a merge will write, if the base is codes."""
            if self.base.module_class is nn.Linear and is_sharded(self.base.parameter):
                # PEFT has taken the shape of one process's shard, unless the mesh has a name that it expects.
                self.in_features, self.out_features = self.base_layer.in_features, self.base_layer.out_features
        out_features, in_features = self.matrix_shape
        limit = min(in_features, out_features)
        if r > limit:
            raise ValueError(
                f"rank {r} is too large for layer {self._target_name}: its weight is {out_features} "
                f"x {in_features}, so at most {limit}. Give rank_pattern={{{self._target_name!r}: {limit}}}, "
                "lower r, or leave it out with exclude_modules [P008]"
            )
        with self.base.device:  # PEFT creates the factors on the CPU, and the host waits for each when it is moved
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        if self.base.form != IMPLICIT:  # PEFT takes the dtype of the weight, which means nothing for codes
            for factor in (self.lora_A, self.lora_B):
                factor[adapter_name].to(self.dense_dtype)
        if config.merge_aware:
            self.merge_aware.add(adapter_name)
        if config.use_dora:
            like = self.factor_parameters(adapter_name)[0]
            self.lora_magnitude_vector[adapter_name] = Magnitude(like.new_ones(out_features))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool) -> None:
        """Sets dA and dB to zero."""
        for parameter in self.factor_parameters(adapter_name):
            nn.init.zeros_(parameter)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """No variants of PEFT's own, because DoRA is computed here."""
        return {(): None, ("use_dora",): None}

    def dictionaries(self, adapter_name: str) -> list[Any]:
        """PEFT's dictionaries of trained modules, or of an embedding's parameters, that contain the adapter."""
        return [entries for name in self.adapter_layer_names if adapter_name in (entries := getattr(self, name))]

    def device_of(self, adapter_name: str) -> torch.device:
        """The device of the adapter's parameters. (An offloaded base is on the meta device.)"""
        return self.factor_parameters(adapter_name)[0].device

    def start_of(self, adapter_name: str) -> StartFactors:
        """The adapter's start factors."""
        return cast(StartFactors, self.lora_start[adapter_name])

    def magnitude(self, adapter_name: str) -> Magnitude:
        """The trained lengths of an adapter with DoRA."""
        return cast(Magnitude, self.lora_magnitude_vector[adapter_name])

    def deltas(self, adapter_name: str) -> Deltas:
        """The trained differences as matrices, which are views of the parameters."""
        return Deltas(*self.as_matrices(*self.factor_parameters(adapter_name)))

    def state_keys(self, adapter_name: str) -> list[str]:
        """The names of the parameters of `deltas` in the layer's state dict."""
        parts = (key.partition(".") for key in self.factor_keys)
        return [f"{head}.{adapter_name}{dot}{tail}" for head, dot, tail in parts]

    def deltas_in(self, state: Mapping[str, Tensor], prefix: str, adapter_name: str) -> Deltas:
        """Returns the deltas, float32 on the adapter's device, from a state dict with the layer's parameters under
        `prefix`."""
        device = self.device_of(adapter_name)
        a, b = (state[prefix + key].detach().to(device, torch.float32) for key in self.state_keys(adapter_name))
        return Deltas(*self.as_matrices(a, b))

    def starts(self, adapter_name: str) -> Starts:
        """The adapter's start, beside that of the base."""
        return Starts(self.start_of(adapter_name), float(self.scaling[adapter_name]), self.base.start)

    def origin(self, adapter_name: str, config: PissaConfig) -> Origin:
        """The settings that determine the adapter's start factors."""
        identity = INIT_METHODS[config.init].identity(config)
        r, scaling = self.r[adapter_name], float(self.scaling[adapter_name])
        return Origin(r, scaling, config.init, identity)

    def zero_start(self, adapter_name: str, origin: Origin, recipe_rank: int | None = None) -> StartFactors:
        """Start factors of zero, and a recipe of that rank, on the adapter's device."""
        out_features, in_features = self.matrix_shape
        zeros = partial(torch.zeros, dtype=torch.float32, device=self.device_of(adapter_name))

        def factors(r: int) -> tuple[Tensor, Tensor]:
            return zeros(r, in_features), zeros(out_features, r)

        return StartFactors(*factors(origin.r), origin, None if recipe_rank is None else factors(recipe_rank))

    def known_start(self, origin: Origin) -> StartFactors | None:
        """Returns the start factors of an adapter, or of the base, with the same origin."""
        return next((start for start in self._starts() if start.origin == origin), None)

    def start_from(self, adapter_name: str, start: StartFactors) -> None:
        """Starts a new adapter: sets these start factors and, with DoRA, the lengths of the base's rows."""
        self.lora_start[adapter_name] = start
        if adapter_name in self.lora_magnitude_vector:
            lengths = torch.linalg.vector_norm(self.base.matrix().detach(), dim=1, dtype=torch.float32)
            self.magnitude(adapter_name).set(lengths, lengths)

    def share_start(self, adapter_name: str, start: StartFactors) -> None:
        """Gives an adapter these start factors, or, if the layer already has the same ones, those."""
        alike = (own for own in self._starts() if own.origin == start.origin)
        same = (own for own in alike if torch.equal(own.a0, start.a0) and torch.equal(own.b0, start.b0))
        self.lora_start[adapter_name] = next(same, start)

    def _starts(self) -> list[StartFactors]:
        starts = [self.start_of(name) for name in self.lora_start]
        return starts if self.base.start is None else [*starts, self.base.start]

    # -- the forward pass

    def forward(self, input: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The layer's output. `adapter_names` gives each row of the input its own adapter, "__base__" for none."""
        if self.disable_adapters:
            return cast(Tensor, self.base.module(input, *args, **kwargs))
        if adapter_names is not None:
            return self._row_by_row(input, adapter_names)
        if self.merged:
            return cast(Tensor, call_whole(self.base_layer, input, *args, **kwargs))
        return self.compute_adapted(input, [name for name in self.active_adapters if name in self.r])

    def _row_by_row(self, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        names = set(adapter_names) & set(self.r)
        if self._rows_are_tokens:
            if names:
                raise ValueError(
                    f"adapter_names: layer {self._target_name} is an expert's, whose rows are tokens from any row of "
                    f"the batch, and is adapted by {', '.join(sorted(names))}. Call set_adapter and compute the rows "
                    "of each adapter in a separate batch, or adapt no experts (exclude_modules) [P045]"
                )
            return cast(Tensor, self.base_layer(x))
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively, in layer {self._target_name}. Give one name for each "
                "row of the batch; a layer with other rows (an expert's) cannot be adapted (exclude_modules) [P045]"
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first [P045]"
            )
        y = cast(Tensor, self.base_layer(x))
        for name in names:
            rows = [row for row, other in enumerate(adapter_names) if other == name]
            y[rows] = self.change(y[rows], x[rows], name)
        return y

    def compute_adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The base's own output, with the same bits as in the unwrapped model, plus the changes."""
        y = cast(Tensor, self.base_layer(x))
        for name in names:
            y = self.change(y, x, name)
        return y

    # -- merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's change of the weight, float32, in the shape of a dense weight, as in PEFT."""
        return self.base.as_weight(self.delta_matrix(adapter))

    def delta_matrix(self, adapter_name: str) -> Tensor:
        """The same as a matrix, s (B A - B0 A0), float32 [out, in], computed as one product without cancellation."""
        deltas = Deltas(*map(whole_tensor, self.deltas(adapter_name)))
        a, b = self.start_of(adapter_name).factors_of_change(deltas)
        scaling: float = self.scaling[adapter_name]
        return scaling * (b @ a)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replaces the base by a dense module that includes the adapters' changes. The base itself is not changed.

        The sum is computed in float32 and rounded to the base's dtype once. If FSDP2 has sharded the base, all
        processes must call this method; the weights are gathered, layer by layer, and the merged weight is sharded like
        the base's. With `safe_merge`, raises ValueError if the merged weight is not finite, and changes nothing.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.r]
        if not names:
            return
        base = self.base
        weight = unshard(base, whole_tensor(base.parameter)).matrix().float()
        for name in [*self.merged_adapters, *names]:
            weight = weight + self.delta_matrix(name)
        merged = base.dense_module(weight.to(self.dense_dtype))
        if is_dtensor(base.parameter):
            merged.weight = nn.Parameter(shard_as(base.parameter, cast(Tensor, merged.weight)), requires_grad=False)
        if safe_merge and not torch.isfinite(cast(Tensor, merged.weight)).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken [P072]"
            )
        self.lora_unmerged, self.base_layer = base.module, merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restores the base, bit for bit."""
        if self.lora_unmerged is not None:
            self.base_layer, self.lora_unmerged = self.lora_unmerged, None
            self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Returns the module that replaces this one in the model: merged, or the base."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            self.unmerge()
        return base_of(self.base_layer).restore_module()

    def _get_name(self) -> str:
        """PEFT's name for this kind of layer, used by `repr` and `get_layer_status`."""
        return f"lora.{type(self).__name__.removeprefix('Pissa')}"

    def __repr__(self) -> str:
        return nn.Module.__repr__(cast(nn.Module, self))


class Magnitude(KeepsDtype):
    """The lengths m to which DoRA (arXiv 2402.09353) scales the rows of W + dW: trained, float32 [out]. They start at
    the lengths of the base's rows.

        y = (m / ‖W + dW‖) (W + dW) x + b

    The lengths ‖W + dW‖ carry no gradient (section 4.3 there). For a low-rank dW = s L R they are computed from
    products with L and R, without a dense matrix of W's size. At the start, m / ‖W + dW‖ is exactly 1.
    """

    base_lengths: Tensor

    def __init__(self, lengths: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(lengths)
        self.register_buffer("base_lengths", lengths.detach().float().clone())

    @torch.no_grad()
    def set(self, lengths: Tensor, base_lengths: Tensor) -> None:
        """Sets these values, float32 [out]."""
        self.base_lengths.copy_(base_lengths)
        if self.weight.dtype != torch.float32:
            lengths = self._rounded_base(self.weight.dtype) + (lengths - base_lengths)
        self.weight.copy_(shard_as(self.weight, lengths))

    def lengths(self, weight: Tensor) -> Tensor:
        """Returns m, float32 [out], for the parameter `weight` in any dtype. A 16-bit parameter rounds its start.
        Therefore m is the base's exact length plus the distance that the parameter has moved, so that step 0 equals the
        base."""
        if weight.dtype == torch.float32:
            return weight
        return self.base_lengths + (weight.float() - self._rounded_base(weight.dtype))

    def _rounded_base(self, dtype: torch.dtype) -> Tensor:
        return self.base_lengths.to(dtype).float()

    def scale(self, left: Tensor, right: Tensor, product: Tensor, scaling: float) -> Tensor:
        """Returns m / ‖W + s L R‖ [out], differentiable in m, for L [out, k], R [k, in] and their product R Wᵀ [k, out]
        with the weight, all float32 and detached."""
        # ‖w + s l R‖² = ‖w‖² + 2 s l (R wᵀ) + s² l (R Rᵀ) lᵀ for each row w of W and l of L
        grown = 2 * scaling * (left * product.mT).sum(1) + scaling**2 * ((left @ (right @ right.mT)) * left).sum(1)
        square = self.base_lengths.square()
        lengths = self.base_lengths * (1 + grown / square.where(square > 0, 1)).clamp(min=0).sqrt()
        lengths = lengths.where(square > 0, grown.clamp(min=0).sqrt())
        return (self.lengths(self.weight) / lengths.where(lengths > 0, 1)).where(lengths > 0, 1.0)


def pissa_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, PissaLayer]:
    """The layers of an (unwrapped) model that carry the adapter, or any adapter, by their names in the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PissaLayer) and (adapter_name is None or adapter_name in module.r)
    }
