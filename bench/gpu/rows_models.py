"""Rows about a small language model on a GPU: wrapping it, and a training step, by the wall clock."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from bench.compare.interleave import Case, Row, require
from bench.compare.peers import lora_on_dense
from bench.compare.rows_model import R, step_case
from bench.compare.weights import random_llama


def model_rows(device: str, quick: bool) -> Iterator[Row]:
    yield Row(
        f"wrapping a Llama of 8 layers, bfloat16, r = {R}", "PEFT, pissa_niter_16", partial(_wrapping, device, quick)
    )
    for quant in (None, "nf4"):
        yield Row(
            f"training step of a Llama of 8 layers, {quant or 'bfloat16'}, r = {R}",
            "PEFT + bitsandbytes, bfloat16 adapters" if quant else "PEFT LoRA, bfloat16 adapters",
            lambda quant=quant: step_case(_llama(device, quick), quant, torch.bfloat16),
        )


def _llama(device: str, quick: bool) -> nn.Module:
    """A Llama with 8 layers and 0.5 billion weights."""
    return random_llama(128, 352, 2, 512, device) if quick else random_llama(2048, 5632, 8, 32000, device)


def _wrapping(device: str, quick: bool) -> Case:
    import pissa

    base = _llama(device, quick)
    ours = partial(pissa.wrap, r=R, task_type="CAUSAL_LM", progressbar=False)
    theirs = partial(lora_on_dense, r=R, dtype=torch.bfloat16, init="pissa_niter_16")

    def check() -> str:
        tokens = torch.arange(16, device=device)[None]
        with torch.no_grad():
            same = torch.equal(ours(copy.deepcopy(base)).eval()(tokens).logits, base.eval()(tokens).logits)
        require(same, "step 0 is not the base, bit for bit")
        return "step 0 is the base, bit for bit"

    return Case(ours, theirs, check, fresh=partial(copy.deepcopy, base))
