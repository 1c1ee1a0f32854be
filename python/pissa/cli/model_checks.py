"""A small model, wrapped with its base in every form, for `pissa selftest`: that it starts as its base, learns, comes
back from disk and is merged."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import pissa
from pissa import ops
from pissa.cli.findings import Check, Finding, same
from pissa.cli.step0 import rounding_bound, step0_check
from pissa.layers.layer import pissa_layers

_FORMS: dict[str, dict[str, Any]] = {"implicit": {}, "explicit": {"residual": "explicit"}}
_FORMS |= {format: {"quant": format} for format in ops.formats.FORMATS}
"""Fields of PissaConfig for each way to keep the base."""


def model_checks(device: torch.device) -> dict[str, Check]:
    """All checks of models on a device, by name."""
    kinds = {form: partial(_Case, form, torch.float32, device) for form in _FORMS}
    kinds |= {f"{form}, bfloat16": partial(_Case, form, torch.bfloat16, device) for form in ("implicit", "nf4")}
    properties: dict[str, Callable[[_Case], Iterator[Finding]]] = {
        "starts as its base": _starts,
        "learns": _learns,
        "comes back from disk": _comes_back,
        "is merged and unloaded": _merges,
    }

    def check(make: Callable[[], _Case], find: Callable[[_Case], Iterator[Finding]]) -> Iterator[Finding]:
        return find(make())

    return {
        f"{kind}: {name}": partial(check, make, find)
        for kind, make in kinds.items()
        for name, find in properties.items()
    }


class _Case:
    """A wrapped model, and what its base was."""

    def __init__(self, form: str, dtype: torch.dtype, device: torch.device) -> None:
        self.form, self._dtype, self._device = form, dtype, device
        self.tokens = (20 * torch.arange(4)[:, None] + torch.arange(24) % 3).to(device)  # easily learnt
        base = self.base()
        self.given = self.logits(base)
        self.model = pissa.wrap(base, r=8, **_FORMS[form])
        self.rounding = rounding_bound(self.model)

    @property
    def is_quantised(self) -> bool:
        return self.form in ops.formats.FORMATS

    def base(self) -> Any:
        """A random Llama of two layers, always the same one."""
        sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
        return model.to(self._device, self._dtype)

    def logits(self, model: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model.eval()(input_ids=self.tokens).logits
        return logits.double()

    def logits_of_base(self) -> Tensor:
        with self.model.disable_adapter():
            return self.logits(self.model)

    def train(self, steps: int) -> list[float]:
        """A few steps of AdamW on one batch; their losses."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)
        self.model.train()
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def lost(self) -> float:
        """The relative difference of logits that the format explains: the errors of plainly quantised weights, which
        add up from layer to layer as roundings do. PiSSA's are smaller."""
        names = pissa_layers(self.model.base_model.model, "default")
        weights = [weight for name, weight in self.base().named_parameters() if name.removesuffix(".weight") in names]
        rests = [weight - ops.dequantize(ops.quantize(weight.detach(), self.form), weight.dtype) for weight in weights]
        squares = [(rest.norm() / weight.norm()) ** 2 for rest, weight in zip(rests, weights, strict=True)]
        return float(torch.stack(squares).sum().sqrt().item())


def _difference(what: str, got: Tensor, expected: Tensor, allowed: float) -> Finding:
    return Finding(f"difference of {what}", ((got - expected).norm() / expected.norm()).item(), allowed)


def _starts(case: _Case) -> Iterator[Finding]:
    found = step0_check(case.model, {"input_ids": case.tokens})
    yield Finding("difference of the logits with and without the adapter", found.difference, found.bound)
    what, got = "the logits of the wrapped model and the given one", case.logits(case.model)
    if case.form == "implicit":
        yield same(what, got, case.given)
    else:
        yield _difference(what, got, case.given, case.rounding + (case.lost() if case.is_quantised else 0.0))


def _learns(case: _Case) -> Iterator[Finding]:
    before = case.logits_of_base()
    first, *_, last = case.train(steps=8)
    yield Finding("loss of the last step", last, 0.9 * first)  # it falls to 0.8 of the first
    yield same("the logits of the base before and after", case.logits_of_base(), before)


def _comes_back(case: _Case) -> Iterator[Finding]:
    case.train(steps=3)
    trained = case.logits(case.model)
    with tempfile.TemporaryDirectory(prefix="pissa-selftest-") as folder:
        case.model.save_pretrained(folder)
        loaded = pissa.PissaModel.from_pretrained(case.base(), folder)
        yield same("the logits of the saved and the loaded model", case.logits(loaded), trained)
        if not case.is_quantised:  # whose rounding error a plain LoRA lacks
            plain = PeftModel.from_pretrained(case.base(), folder)
            yield _difference("the logits by PEFT's LoRA of the same files", case.logits(plain), trained, case.rounding)


def _merges(case: _Case) -> Iterator[Finding]:
    case.train(steps=3)
    trained, base = case.logits(case.model), case.logits_of_base()
    case.model.merge_adapter()
    yield _difference("the logits before and after merging", case.logits(case.model), trained, case.rounding)
    case.model.unmerge_adapter()
    yield same("the logits before and after unmerging", case.logits(case.model), trained)
    yield _difference(
        "the logits of the base and the unloaded model", case.logits(case.model.unload()), base, case.rounding
    )
