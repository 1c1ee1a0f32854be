"""The adapted linear layer: a base function, and for each adapter a change that starts at zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from pissa import ops
from pissa.config import IMPLICIT, Form, PissaConfig
from pissa.fingerprint import fingerprint
from pissa.stored import Origin, StartFactors, StoredLinear, stored_linear


class PissaLinear(LoraLinear):  # type: ignore[misc]
    """PEFT's LoRA layer for nn.Linear whose parameters are the differences from the start factors.

        y = base(x) + s (B A - B0 A0) x,   A = A0 + dA,  B = B0 + dB

    lora_A[adapter].weight is dA [r, in], lora_B[adapter].weight is dB [out, r]; both start at zero.
    lora_start[adapter] holds A0 and B0, frozen. base_layer is the original nn.Linear, or a StoredLinear that
    computes the same function from a residual; while adapters are merged it is a dense nn.Linear of the
    merged weight, and the original waits in lora_unmerged.
    """

    # PEFT deletes an adapter's entry in each of these.
    other_param_names = (*LoraLinear.other_param_names, "lora_start")

    base_layer: nn.Linear | StoredLinear
    lora_unmerged: nn.Linear | StoredLinear | None

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: PissaConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.lora_start = nn.ModuleDict()
        self.lora_unmerged = None
        self._known_fingerprint: tuple[tuple[int, int, torch.dtype], str] | None = None

    # -- the base function

    @property
    def unmerged_base(self) -> nn.Linear | StoredLinear:
        """The module that computes the base function, merged or not."""
        return self.base_layer if self.lora_unmerged is None else self.lora_unmerged

    @property
    def form(self) -> Form:
        """How the base is kept."""
        base = self.unmerged_base
        return base.form if isinstance(base, StoredLinear) else IMPLICIT

    def base_fingerprint(self) -> str:
        """Fingerprint of the base's dense weight as it was given to us."""
        base = self.unmerged_base
        if isinstance(base, StoredLinear):
            return base.fingerprint
        weight = base.weight
        # Hashing a large model takes seconds, and a run saves many checkpoints of one frozen base.
        key = (weight.data_ptr(), weight._version, weight.dtype)
        if self._known_fingerprint is None or self._known_fingerprint[0] != key:
            self._known_fingerprint = (key, fingerprint(weight))
        return self._known_fingerprint[1]

    def store_base(self, residual: Tensor | ops.Nf4Weight, start: StartFactors) -> None:
        """Replaces a dense base by one that keeps `residual`, of which `start` holds the rest."""
        assert isinstance(self.base_layer, nn.Linear)
        self.base_layer = stored_linear(self.base_layer, residual, start, self.base_fingerprint())

    # -- adapters and their start factors

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: PissaConfig, **kwargs: Any) -> None:
        """Adds an adapter whose change is zero. It cannot learn before `start_from` or `share_start`."""
        limit = min(self.in_features, self.out_features)
        if r > limit:
            raise ValueError(
                f"rank {r} is too large for layer {kwargs['target_name']}: its weight is {self.out_features} "
                f"x {self.in_features}, so at most {limit}. Lower r, give this layer a rank of its own in "
                "rank_pattern, or leave it out with exclude_modules"
            )
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool) -> None:
        """Sets dA and dB to zero."""
        nn.init.zeros_(self.lora_A[adapter_name].weight)
        nn.init.zeros_(self.lora_B[adapter_name].weight)

    def start_of(self, adapter_name: str) -> StartFactors:
        """The adapter's start factors."""
        return cast(StartFactors, self.lora_start[adapter_name])

    def origin(self, adapter_name: str, config: PissaConfig) -> Origin:
        """What the adapter's start factors are determined by."""
        scaling = float(self.scaling[adapter_name])
        return Origin(self.r[adapter_name], scaling, config.svd, config.svd_passes, config.seed)

    def known_start(self, origin: Origin) -> StartFactors | None:
        """The start factors of an adapter, or of the base, that agrees on the origin."""
        return next((start for start in self._starts() if start.origin == origin), None)

    def dense_base(self) -> Tensor:
        """The weight [out, in] of the base function: the dense base's own, or a stored one's in float32."""
        base = self.unmerged_base
        return base.dense() if isinstance(base, StoredLinear) else base.weight

    def start_from(self, adapter_name: str, start: StartFactors, config: PissaConfig) -> None:
        """Gives an adapter its start factors, the principal part of the base.

        A dense base is stored as the configuration says; a base that is stored already stays as it is.
        """
        if config.form not in (IMPLICIT, self.form):
            residual = ops.residual(
                self.dense_base(), start.a0, start.b0, scaling=start.origin.scaling, **config.form.options()
            )
            self.store_base(residual, start)
        self.lora_start[adapter_name] = start

    def share_start(self, adapter_name: str, a0: Tensor, b0: Tensor, origin: Origin) -> None:
        """Gives an adapter the start factors a0, b0: the layer's own tensors where it has them already."""
        for start in self._starts():
            if start.origin == origin and torch.equal(start.a0, a0) and torch.equal(start.b0, b0):
                break
        else:
            start = StartFactors(a0, b0, origin)
        self.lora_start[adapter_name] = start

    def _starts(self) -> list[StartFactors]:
        base = self.unmerged_base
        starts = [self.start_of(name) for name in self.lora_start]
        return [*starts, base.start] if isinstance(base, StoredLinear) else starts

    # -- the forward pass

    def forward(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
        """The layer's output. `adapter_names` gives each row of x its own adapter, "__base__" for none."""
        if self.disable_adapters:
            return cast(Tensor, self.unmerged_base(x))
        if adapter_names is not None:
            return self._row_by_row(x, adapter_names)
        if self.merged:
            return cast(Tensor, self.base_layer(x))
        return self._adapted(x, [name for name in self.active_adapters if name in self.lora_A])

    def _row_by_row(self, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        y = cast(Tensor, self.base_layer(x))
        for name in set(adapter_names) & set(self.lora_A):
            rows = [row for row, other in enumerate(adapter_names) if other == name]
            y[rows] = self._adapted(x[rows], [name])
        return y

    def _adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        base = self.base_layer
        if isinstance(base, StoredLinear) and len(names) == 1 and self._completes_residual(names[0]):
            (name,) = names
            return ops.linear(
                x,
                base.residual,
                base.bias,
                delta_a=self.lora_A[name].weight,
                delta_b=self.lora_B[name].weight,
                a0=base.start.a0,
                b0=base.start.b0,
                scaling=base.scaling,
            )
        # The base's own product, whose bits are those of the unwrapped model, and the changes on top of it.
        y = cast(Tensor, base(x))
        for name in names:
            start = self.start_of(name)
            y = ops.add_low_rank(
                y,
                self.lora_dropout[name](x),
                self.lora_A[name].weight,
                self.lora_B[name].weight,
                a0=start.a0,
                b0=start.b0,
                scaling=self.scaling[name],
            )
        return y

    def _completes_residual(self, name: str) -> bool:
        """Whether the residual lacks just what the adapter starts from, so that one product with A and B is all."""
        base, dropout = self.base_layer, self.lora_dropout[name]
        return (
            isinstance(base, StoredLinear)
            and self.start_of(name) is base.start
            and self.scaling[name] == base.scaling
            and not (isinstance(dropout, nn.Dropout) and dropout.training)
        )

    # -- merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter has learnt, s (B A - B0 A0), float32 [out, in]: one product without cancellation."""
        start = self.start_of(adapter)
        da, db = self.lora_A[adapter].weight.float(), self.lora_B[adapter].weight.float()
        scaling: float = self.scaling[adapter]
        return scaling * (torch.cat([db, start.b0], dim=1) @ torch.cat([start.a0 + da, da]))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts a dense layer with the adapters' changes in the base's place. The base is kept untouched.

        The sum is taken in float32 and rounded to the base's dtype once.

        Raises:
            ValueError: with `safe_merge`, when the merged weight is not finite; nothing is changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base = self.unmerged_base
        weight = self.dense_base().float()
        for name in [*self.merged_adapters, *names]:
            weight = weight + self.get_delta_weight(name)
        merged = _dense_linear(base, weight)
        if safe_merge and not torch.isfinite(merged.weight).all():
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
    ) -> nn.Linear:
        """The dense layer that takes this one's place in the model: merged, or the base."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            self.unmerge()
        base = self.base_layer
        return _dense_linear(base, base.dense()) if isinstance(base, StoredLinear) else base

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)


def _dense_linear(base: nn.Linear | StoredLinear, weight: Tensor) -> nn.Linear:
    """An nn.Linear in the base's place: `weight` [out, in] in the base's dtype, and the base's own bias."""
    dtype = base.dtype if isinstance(base, StoredLinear) else base.weight.dtype
    dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    dense.bias = cast(nn.Parameter, base.bias)
    dense.train(base.training)
    return dense
