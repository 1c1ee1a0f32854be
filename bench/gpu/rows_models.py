"""Rows about a small language model on a GPU: wrapping it, and a step of training, by the wall clock."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from bench.compare.interleave import Case, Row, require
from bench.compare.packages import missing
from bench.compare.peers import lora_on_dense

R = 16


def model_rows(device: str, quick: bool) -> Iterator[Row]:
    yield Row(
        f"wrapping a Llama of 8 layers, bfloat16, r = {R}", "PEFT, pissa_niter_16", partial(_wrapping, device, quick)
    )
    for quant in (None, "nf4"):
        yield Row(
            f"training step of a Llama of 8 layers, {quant or 'bfloat16'}, r = {R}",
            "PEFT + bitsandbytes, bfloat16 adapters" if quant else "PEFT LoRA, bfloat16 adapters",
            partial(_step, quant, device, quick),
        )


def _llama(device: str, quick: bool) -> nn.Module:
    """A random Llama of 8 layers, 0.5 billion weights, in training mode without a cache of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    hidden = 128 if quick else 2048
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=2 if quick else 8,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        vocab_size=512 if quick else 32000,
        use_cache=False,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).train()


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


def _step(quant: str | None, device: str, quick: bool) -> Case:
    """Ours computes the peer's loss: both are the base, or have the same residual and factors."""
    import pissa
    from bench.compare.rows_model import Trainer, same_in_nf4, training_case

    base = _llama(device, quick)
    model = pissa.wrap(copy.deepcopy(base), r=R, quant=quant, task_type="CAUSAL_LM", progressbar=False).train()
    if quant and (lacking := missing("bitsandbytes")):
        ours = Trainer(model)
        return Case(ours.step, None, lambda: f"first loss {ours.first()[0]:.4f}", no_peer=lacking)
    if not quant:
        return training_case(model, lora_on_dense(base, R, torch.bfloat16), "both are the base", same_gradient=False)
    peer = same_in_nf4(model, base, torch.bfloat16)
    return training_case(model, peer, "same residuals and factors", same_gradient=True)
