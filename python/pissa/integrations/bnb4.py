"""A QPiSSA adapter for use with only transformers and PEFT: its residual as a bitsandbytes checkpoint, and a LoRA on
it. Nothing is quantised again, so the two together are the trained model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pissa import ops
from pissa.adapters.lora_folder import LoraFactors, with_sizes
from pissa.adapters.peft_layout import ADAPTER_WEIGHTS, base_weight_key
from pissa.base.bitsandbytes_state import KEPT_IN_4_BITS
from pissa.base.init_methods import lacks_start
from pissa.checkpoints.merge import UnitPlanner
from pissa.checkpoints.output import Output
from pissa.checkpoints.rewrite import Layers, Plan, Result, Rewrite, Unit, add_up, relative_error, square
from pissa.checkpoints.trained import Ours, read_weight
from pissa.config import IMPLICIT
from pissa.containers.recognise import ADAPTER_CONFIG
from pissa.containers.staged import write_text
from pissa.containers.tensor_file import Scratch, write_tensors
from pissa.integrations.exported import MERGE, Exported

LORA = "adapter"
"""The folder of the LoRA, inside that of the checkpoint."""


class ResidualExport(Rewrite):
    """Writes the residuals on which an adapter was trained, and the adapter, with rank r, to the folder "adapter"
    inside. The checkpoint `adapter.source` is the adapter's base, or contains the residuals.

    bitsandbytes stores linear layers. The 4-bit residual of any other layer, of fused experts or a Conv1D, is written
    decoded, in the dtype of the checkpoint. Raises ValueError if bitsandbytes can store none.
    """

    command = "export"

    def __init__(self, adapter: Ours, target: Path) -> None:
        self.adapter, self.folder = adapter, adapter.folder
        planner = UnitPlanner(adapter.source, self.folder)
        units = [self._unit(planner, factors) for factors in self.folder.factors.values() if self._is_stored(factors)]
        layers = [layer for unit in units for layer in unit.layers]
        if not any(layer.is_packed for layer in layers):
            raise ValueError(
                f"{self.folder.path} has no linear layer in 4 bits, the only kind of layer that "
                f"bitsandbytes stores in 4 bits: run {MERGE} [P118]"
            )
        changed = {tensor for layer in layers for tensor in layer.tensors}
        super().__init__(Plan(adapter.source, units, kept=adapter.source.coded.keys() - changed), target)

    def exported(self) -> Exported:
        """The report."""
        packed = len(self.plan.packed)
        count = sum(self.adapter.ours.layers[name].form.name == KEPT_IN_4_BITS for name in self.plan.layers) - packed
        dense = f", {count} decoded, since bitsandbytes has no experts and no Conv1D in 4 bits" if count else ""
        model = f"{type(self.source.model).__name__}.from_pretrained({str(self.target)!r})"
        return Exported(
            what=self.adapter.what,
            layers=sum(len(factors.layers) for factors in self.folder.factors.values()),
            written=f"{packed} residuals in nf4{dense}, and a LoRA on them in {LORA}",
            bytes_written=self.bytes_written,
            load=f"PeftModel.from_pretrained({model}, {str(self.target / LORA)!r})",
            error=relative_error(self.results.values()),
        )

    def _unit(self, planner: UnitPlanner, factors: LoraFactors) -> Layers:
        """The layers of a target whose base was stored."""
        if factors.is_fused and factors.layers[0] in planner.source.coded_layers:
            raise ValueError(
                f"{planner.source.folder} has the experts of {factors.target} in 4 bits, which only pissa.load reads: "
                "give the checkpoint that was split (base) [P118]"
            )
        unit, form = planner.unit_of(factors), self.adapter.ours.layers[factors.layers[0]].form
        is_packed = form.name == KEPT_IN_4_BITS and not unit.layers[0].transposed
        return unit.in_forms({factors.target: form} if is_packed else {})  # no layer of fused experts has that name

    def _is_stored(self, factors: LoraFactors) -> bool:
        return self.adapter.ours.layers[factors.layers[0]].form != IMPLICIT

    @property
    def lacks_start(self) -> bool:
        return lacks_start(self.adapter.ours.config.of_base())

    def identity(self) -> dict[str, Any]:
        return {"target": str(self.target), **self.adapter.states()}

    def write(self, out: Output, unit: Unit) -> dict[str, Result]:
        if not isinstance(unit, Layers):
            self.copy(out, unit.tensor)
            return {unit.name: {}}
        sums = [{"error_squared": 0.0, "norm_squared": 0.0}]
        for layer in unit.layers:
            residual = self.adapter.residual(layer, read_weight(layer, self.source))
            if not layer.is_packed:
                exact = ops.dequantize(residual) if isinstance(residual, ops.QuantizedWeight) else residual.float()
                residual = exact.to(layer.dtype)
                if error := square(residual.float() - exact):
                    sums.append({"error_squared": error, "norm_squared": square(exact)})
            self.write_layer(out, layer, residual)
        return {unit.name: add_up(sums)}

    def end(self, out: Output) -> None:
        """Writes the LoRA and all other tensors unchanged, except a layer's own weight, because its residual is
        written."""
        kept, sizes, path = set(self.folder.weights.entries), {}, out.path(f"{LORA}/{ADAPTER_WEIGHTS}")
        with Scratch(path.parent) as tensors:
            for target, factors in self.folder.factors.items():
                rank = factors.rank
                if self._is_stored(factors):
                    pairs = [self.adapter.factors_on_residual(name) for name in factors.layers]
                    rank = len(pairs[0][0])
                    kept -= {*factors.keys, base_weight_key(target)}
                    mirrored = self.plan.layers[factors.layers[0]].mirrored
                    tensors.put(replace(factors, mirrored=mirrored).pack(pairs))
                sizes[target] = rank, factors.scaling
            for key in kept:
                tensors.put({key: self.folder.weights.read(key)})
            write_tensors(path, tensors)
        self.bytes_written += path.stat().st_size
        config = with_sizes(self.folder.config, sizes) | {"base_model_name_or_path": str(self.target)}
        write_text(path.with_name(ADAPTER_CONFIG), json.dumps(config, indent=2, sort_keys=True))
