"""The adapted layer, whatever kind of module it adapts: a base function, and for each adapter a change that starts at
zero. What depends on the kind is in `linear`, `embedding` and `convolution`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from pissa import ops
from pissa.base.bitsandbytes import Nf4Base
from pissa.base.fingerprint import Remembered, fingerprint, is_fingerprint, is_sha256
from pissa.base.stored import Deltas, Origin, Replaced, StartFactors, StoredLinear, residual_tensors, stored_linear
from pissa.base.weights import as_weight, bias_of, dense_kind, weight_matrix, whole, with_matrix, with_weight
from pissa.config import IMPLICIT, Form, PissaConfig
from pissa.distributed import is_sharded
from pissa.layers.dora import Magnitude


class PissaLayer(LoraLayer):  # type: ignore[misc]
    """PEFT's LoRA layer whose parameters are the differences from the start factors.

        y = base(x) + s (B A - B0 A0) x,   A = A0 + dA,  B = B0 + dB

    The factors are matrices, A [r, in] and B [out, r], of the weight as the matrix [out, in] that `bases` makes of it;
    PEFT's parameters hold dA and dB, in a shape of their own in convolutions, and start at zero. lora_start[adapter]
    holds A0 and B0, frozen. base_layer is the original module, or a StoredLinear that computes the same function from a
    residual; while adapters are merged it is a dense module of the merged weight, and the original waits in
    lora_unmerged.
    """

    # PEFT deletes an adapter's entry in each of these.
    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_E")
    other_param_names = (*LoraLayer.other_param_names, "lora_start")

    factor_keys: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    """What PEFT's files call the two factors, behind the layer's name."""

    base_layer: Any  # a module; which one depends on the kind and on what is merged

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: PissaConfig, *, model_dtype: torch.dtype, **kwargs: Any
    ) -> None:
        self.model_dtype = model_dtype
        # PEFT's embeddings and convolutions make their first adapter without it.
        self._target_name = kwargs["target_name"]
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self._rows_are_tokens = getattr(base_layer, "rows_are_tokens", False)  # of fused experts
        self._known_fingerprint, self._known_residual = Remembered(), Remembered()

    # -- what depends on the kind of module

    @abstractmethod
    def factor_parameters(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """PEFT's parameters for A and B."""

    @abstractmethod
    def change(self, y: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        """`y`, the base's output for `x`, plus what the adapter changes."""

    def as_parameters(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices a [r', in] and b [out, r'] in the shapes of PEFT's parameters."""
        return a, b

    def as_matrices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The way back from `as_parameters`."""
        return a, b

    # -- the base function

    @property
    def unmerged_base(self) -> Any:
        """The module that computes the base function, merged or not."""
        return self.base_layer if self.lora_unmerged is None else self.lora_unmerged

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Of the weight as a matrix: out, in."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:
        """The weight of the base, or of what is merged: the parameter where it is dense, else decoded. T5, for one,
        casts what a layer is given to the dtype of its weight, which is not that of 4-bit codes."""
        base = self.base_layer
        if isinstance(base, (StoredLinear, Nf4Base)):
            return self.dense_base().to(self.dense_dtype)
        return cast(Tensor, base.weight)

    @property
    def dense_dtype(self) -> torch.dtype:
        """Of a dense weight in the base's place: the base's own, or the model's where bitsandbytes has quantised it."""
        base = self.unmerged_base
        if isinstance(base, StoredLinear):
            return base.dtype
        weight: Tensor = base.weight
        quantised = isinstance(base, Nf4Base) or not weight.is_floating_point()
        return self.model_dtype if quantised else weight.dtype

    @property
    def form(self) -> Form:
        """How the base is kept."""
        base = self.unmerged_base
        return base.form if isinstance(base, StoredLinear) else IMPLICIT

    def base_fingerprint(self, gathered: Tensor | None = None) -> str:
        """Fingerprint of the base's weight, as a matrix, as it was given to us.

        Args:
            gathered: the whole weight of the base, read where its own is sharded and was when this was first asked for.

        Raises:
            ValueError: a sharded weight of which nothing is known.
        """
        base = self.unmerged_base
        if isinstance(base, StoredLinear):
            return base.fingerprint
        return self._known_fingerprint.of(base.weight, lambda: fingerprint(weight_matrix(whole(base, gathered))))

    def residual_fingerprint(self, gathered: Tensor | None = None) -> str:
        """Fingerprint of what a stored base keeps; `gathered` and errors are those of `base_fingerprint`."""
        base = self.unmerged_base
        return self._known_residual.of(
            base.weight, lambda: fingerprint(*residual_tensors(whole(base, gathered).residual).values())
        )

    def base_is(self, recorded: str) -> bool:
        """Whether the base's weight has this fingerprint, XXH3 or SHA-256. The SHA-256 of a weight that a stored base
        has replaced is not known: the answer is yes then, and `residual_is` decides.

        Raises:
            ValueError: a SHA-256 is asked of a sharded weight.
        """
        base = self.unmerged_base
        if not is_sha256(recorded):
            return self.base_fingerprint() == recorded
        _check_whole(base.weight)
        return isinstance(base, StoredLinear) or is_fingerprint(recorded, weight_matrix(base))

    def residual_is(self, recorded: str | None) -> bool:
        """Whether what a stored base keeps has this fingerprint, XXH3 or SHA-256; errors are those of `base_is`."""
        if recorded is None or not is_sha256(recorded):
            return self.residual_fingerprint() == recorded
        base = self.unmerged_base
        _check_whole(base.weight)
        return is_fingerprint(recorded, *residual_tensors(base.residual).values())

    def weight_is(self, weight: Tensor, recorded: str) -> bool:
        """What `base_is` says once the base, which is dense, has this weight."""
        base = self.unmerged_base
        return is_fingerprint(recorded, weight_matrix(with_weight(base, weight.to(base.weight.dtype))))

    def learn_base_fingerprint(self, value: str) -> None:
        """Takes what `base_fingerprint` is in another process."""
        self._known_fingerprint.learn(self.unmerged_base.weight, value)

    def learn_residual_fingerprint(self, value: str) -> None:
        """Takes what `residual_fingerprint` is in another process."""
        self._known_residual.learn(self.unmerged_base.weight, value)

    def store_base(self, residual: Tensor | ops.QuantizedWeight, start: StartFactors, config: PissaConfig) -> None:
        """Replaces a base by one that keeps `residual`, of which `start` holds the rest."""
        base = self.base_layer
        replaced = Replaced(dense_kind(base), self.dense_dtype, bias_of(base), self.base_fingerprint())
        storage: torch.dtype = getattr(torch, config.quant_storage)
        self.base_layer = stored_linear(replaced, residual, start, storage).train(base.training)

    # -- adapters and their start factors

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: PissaConfig, **kwargs: Any) -> None:
        """Adds an adapter whose change is zero. It cannot learn before `start_from` or `share_start`."""
        out_features, in_features = self.matrix_shape
        limit = min(in_features, out_features)
        if r > limit:
            raise ValueError(
                f"rank {r} is too large for layer {self._target_name}: its weight is {out_features} "
                f"x {in_features}, so at most {limit}. Give rank_pattern={{{self._target_name!r}: {limit}}}, "
                "lower r, or leave it out with exclude_modules"
            )
        if not hasattr(self, "lora_start"):  # PEFT comes here while it makes the layer
            self.lora_start = nn.ModuleDict()
            self.lora_E = nn.ModuleDict()
            self.lora_unmerged: nn.Module | None = None
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        if isinstance(self.unmerged_base, StoredLinear):  # whose codes have no dtype that PEFT could take
            for factor in (self.lora_A, self.lora_B):
                factor[adapter_name].to(self.dense_dtype)
        like = self.factor_parameters(adapter_name)[0]
        if config.use_adalora:
            # A module, as PEFT's factors are: TRL makes its reference by copying what is called *.default.* to *.ref.*
            singular_values = nn.Linear(1, r, bias=False, device=like.device, dtype=like.dtype)
            nn.init.zeros_(singular_values.weight)
            self.lora_E[adapter_name] = singular_values
        if config.use_dora:
            self.lora_magnitude_vector[adapter_name] = Magnitude(like.new_ones(out_features))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool) -> None:
        """Sets dA and dB to zero."""
        for parameter in self.factor_parameters(adapter_name):
            nn.init.zeros_(parameter)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """None of PEFT's own classes: DoRA is computed here."""
        return {(): None, ("use_dora",): None}

    def device_of(self, adapter_name: str) -> torch.device:
        """Where the adapter is; an offloaded base has no place of its own."""
        return self.factor_parameters(adapter_name)[0].device

    def start_of(self, adapter_name: str) -> StartFactors:
        """The adapter's start factors."""
        return cast(StartFactors, self.lora_start[adapter_name])

    def magnitude(self, adapter_name: str) -> Magnitude:
        """The trained lengths of an adapter with DoRA."""
        return cast(Magnitude, self.lora_magnitude_vector[adapter_name])

    def deltas(self, adapter_name: str) -> Deltas:
        """What is trained, as matrices: views of the parameters."""
        e = cast(Tensor, self.lora_E[adapter_name].weight) if adapter_name in self.lora_E else None
        return Deltas(*self.as_matrices(*self.factor_parameters(adapter_name)), e)

    def state_keys(self, adapter_name: str) -> list[str]:
        """What the layer's state dict calls the parameters of `deltas`."""
        names = [*self.factor_keys, *(["lora_E.weight"] if adapter_name in self.lora_E else [])]
        parts = (name.partition(".") for name in names)
        return [f"{head}.{adapter_name}{dot}{tail}" for head, dot, tail in parts]

    def deltas_in(self, state: Mapping[str, Tensor], prefix: str, adapter_name: str) -> Deltas:
        """The same, float32 on the adapter's device, out of a state dict that has the layer's parameters under
        `prefix`."""
        device = self.device_of(adapter_name)
        keys = self.state_keys(adapter_name)
        a, b, *e = (state[prefix + key].detach().to(device, torch.float32) for key in keys)
        return Deltas(*self.as_matrices(a, b), *e)

    def changed_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The differences dA [r, in] and dB [out, r] of the factors from those of the start."""
        return self.start_of(adapter_name).change(self.deltas(adapter_name))

    def origin(self, adapter_name: str, config: PissaConfig) -> Origin:
        """What the adapter's start factors are determined by."""
        scaling = float(self.scaling[adapter_name])
        rank: int = self.r[adapter_name]
        return Origin(rank, scaling, config.svd, config.svd_passes, config.seed, config.init, config.use_adalora)

    def empty_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Memory for the adapter's start factors a0 [r, in] and b0 [out, r], float32, where the adapter is."""
        out_features, in_features = self.matrix_shape
        r, device = self.r[adapter_name], self.device_of(adapter_name)
        return torch.empty(r, in_features, device=device), torch.empty(out_features, r, device=device)

    def known_start(self, origin: Origin) -> StartFactors | None:
        """The start factors of an adapter, or of the base, that agrees on the origin."""
        return next((start for start in self._starts() if start.origin == origin), None)

    def dense_base(self) -> Tensor:
        """The weight of the base function as a matrix [out, in]; see `bases.weight_matrix`."""
        return weight_matrix(self.unmerged_base)

    def start_from(self, adapter_name: str, start: StartFactors) -> None:
        """Gives an adapter its start factors, the principal part of the base."""
        self.lora_start[adapter_name] = start
        if adapter_name in self.lora_magnitude_vector:
            lengths = torch.linalg.vector_norm(self.dense_base().detach(), dim=1, dtype=torch.float32)
            self.magnitude(adapter_name).set(lengths, lengths)

    def start_at_zero(self, adapter_name: str, config: PissaConfig) -> None:
        """Gives an adapter start factors of zero: its A and B are dA and dB then, as in a plain LoRA."""
        origin = self.origin(adapter_name, config)._replace(init="given")
        a0, b0 = (factor.zero_() for factor in self.empty_factors(adapter_name))
        self.lora_start[adapter_name] = StartFactors(a0, b0, origin)

    def residual(self, start: StartFactors, form: Form) -> Tensor | ops.QuantizedWeight:
        """What a stored base keeps of a dense one: the weight without its principal part; with LoftQ all of it."""
        a0 = torch.zeros_like(start.a0) if start.origin.init == "loftq" else start.a0
        return ops.residual(self.dense_base(), a0, start.b0, scaling=start.origin.scaling, **form.options())

    def share_start(self, adapter_name: str, start: StartFactors) -> None:
        """Gives an adapter these start factors: the layer's own where it has the same already."""
        for own in self._starts():
            if own.origin == start.origin and torch.equal(own.a0, start.a0) and torch.equal(own.b0, start.b0):
                start = own
                break
        self.lora_start[adapter_name] = start

    def _starts(self) -> list[StartFactors]:
        base = self.unmerged_base
        starts = [self.start_of(name) for name in self.lora_start]
        return [*starts, base.start] if isinstance(base, StoredLinear) else starts

    # -- the forward pass

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The layer's output. `adapter_names` gives each row of x its own adapter, "__base__" for none."""
        if self.disable_adapters:
            return cast(Tensor, self.unmerged_base(x, *args, **kwargs))
        if adapter_names is not None:
            return self._row_by_row(x, adapter_names)
        if self.merged:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        return self.adapted(x, [name for name in self.active_adapters if name in self.r])

    def _row_by_row(self, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        names = set(adapter_names) & set(self.r)
        if self._rows_are_tokens:
            if names:
                raise ValueError(
                    f"adapter_names: layer {self._target_name} is an expert's, whose rows are tokens from any row of "
                    f"the batch, and is adapted by {', '.join(sorted(names))}. Call set_adapter and compute the rows "
                    "of each adapter in a batch of their own, or adapt no experts (exclude_modules)"
                )
            return cast(Tensor, self.base_layer(x))
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively, in layer {self._target_name}. Give one name for each "
                "row of the batch; a layer whose rows are others (an expert's) cannot be adapted then (exclude_modules)"
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        y = cast(Tensor, self.base_layer(x))
        for name in names:
            rows = [row for row, other in enumerate(adapter_names) if other == name]
            y[rows] = self.adapted(x[rows], [name])
        return y

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The base's own output, whose bits are those of the unwrapped model, and the changes on top of it."""
        y = cast(Tensor, self.base_layer(x))
        for name in names:
            y = self.change(y, x, name)
        return y

    # -- merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter has learnt, float32, in the shape of the base's dense weight, as in PEFT."""
        return as_weight(self.unmerged_base, self.delta_matrix(adapter))

    def delta_matrix(self, adapter_name: str) -> Tensor:
        """What the adapter has learnt, s (B A - B0 A0), float32 [out, in]: one product without cancellation."""
        a, b = self.start_of(adapter_name).factors_of_change(self.deltas(adapter_name))
        scaling: float = self.scaling[adapter_name]
        return scaling * (b @ a)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts a dense module with the adapters' changes in the base's place. The base is kept untouched.

        The sum is taken in float32 and rounded to the base's dtype once.

        Raises:
            ValueError: with `safe_merge`, when the merged weight is not finite; nothing is changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.r]
        if not names:
            return
        base = self.unmerged_base
        weight = self.dense_base().float()
        for name in [*self.merged_adapters, *names]:
            weight = weight + self.delta_matrix(name)
        merged = with_matrix(base, weight.to(self.dense_dtype))
        if safe_merge and not torch.isfinite(cast(Tensor, merged.weight)).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        self.lora_unmerged, self.base_layer = base, merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Puts the base back, bit for bit."""
        if self.lora_unmerged is not None:
            self.base_layer, self.lora_unmerged = self.lora_unmerged, None
            self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that takes this one's place in the model: merged, or the base."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            self.unmerge()
        base = self.base_layer
        if isinstance(base, Nf4Base):
            return base.original()
        if isinstance(base, StoredLinear):
            return with_matrix(base, base.dense().to(base.dtype))
        return cast(nn.Module, base)

    def _get_name(self) -> str:
        """What `repr` and PEFT's `get_layer_status` call the kind of layer: PEFT's name for it."""
        return f"lora.{type(self).__name__.removeprefix('Pissa')}"

    def __repr__(self) -> str:
        return nn.Module.__repr__(cast(nn.Module, self))


def _check_whole(weight: Tensor) -> None:
    if is_sharded(weight):
        raise ValueError(
            "the base weight is sharded, and the folder knows it by its SHA-256 (format 1), of all its values: "
            "load the folder before the model is sharded; saved again, it has format 2"
        )


def pissa_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, PissaLayer]:
    """The layers of an (unwrapped) model that carry the adapter, or any, by their name in the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PissaLayer) and (adapter_name is None or adapter_name in module.r)
    }
