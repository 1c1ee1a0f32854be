"""What runs in each process of a DeepSpeed ZeRO-3 training: torchrun --nproc-per-node=2 deepspeed_worker.py FOLDER.

Writes, for each form of the base and each WAY, the losses to losses.json, the trained adapter to a folder of the form's
and the way's name, and to most.json the whole weights that were alive at once, at most, in a wrap.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

import pissa
from distributed_checks import message
from distributed_worker import FORMS, QUIET, counted, llama, mean, sgd, share, tokens
from pissa import PissaModel, distributed
from pissa.base import weights
from pissa.distributed import rank
from pissa.model import decompose

CONFIG = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # else parameters as small as these are not partitioned
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_clipping": 0.0,  # its own default is a norm of 1, which a trained head's gradient exceeds
    "train_micro_batch_size_per_gpu": 3,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


FORMS_TRIED = ("implicit", "explicit", "nf4", "nf4 in float32", "dora", "head")
WAYS = ("wrapped", "partitioned", "loaded")
"""What is wrapped: a whole model, one that zero.Init has partitioned, and one that from_pretrained has so loaded."""


def fields_of(form: str) -> dict[str, Any]:
    """Of PissaConfig, beside r = 4."""
    return {"modules_to_save": ["lm_head"]} if form == "head" else FORMS[form]


@contextmanager
def loading_partitioned(way: str) -> Iterator[None]:
    """Has transformers load partitioned models; in the block, for it knows it of the whole process."""
    config = HfDeepSpeedConfig(CONFIG) if way == "loaded" else None
    yield
    if config is not None:
        unset_hf_deepspeed_config()


def base(way: str, folder: Path) -> nn.Module:
    """The model, in that way, from files in the folder."""
    if way == "loaded":
        return LlamaForCausalLM.from_pretrained(folder)
    model = llama()
    if way == "partitioned":
        deepspeed.zero.Init(module=model, config_dict_or_path=CONFIG)
    return model


def train(model: nn.Module) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three steps, and the state dict that is saved then, of rank 0, as accelerate asks for it."""
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=CONFIG)
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "nothing is partitioned"
    losses = []
    for _ in range(3):
        loss = engine(input_ids=share(tokens()), labels=share(tokens())).loss
        engine.backward(loss)
        engine.step()
        losses.append(mean(loss))
    return losses, engine._zero3_consolidated_16bit_state_dict()


def main(folder: Path) -> None:
    for text, category in QUIET:
        warnings.filterwarnings("ignore", text, category)
    deepspeed.init_distributed("gloo")
    if rank() == 0:
        llama().save_pretrained(folder / "base")
    torch.distributed.barrier()
    decompose._GROUP = 1  # a group is a layer
    losses, most = {}, []
    distributed.whole_tensor = weights.whole_tensor = counted([], most)
    for way in WAYS:
        for form in FORMS_TRIED:
            with loading_partitioned(way):
                model = base(way, folder / "base")
                assert all(parameter.numel() == 0 for parameter in model.parameters()) == (way != "wrapped")
                model = pissa.wrap(model, r=4, **fields_of(form))
                target = folder / way / form
                losses[f"{form}, {way}"], state = train(model)
                model.save_pretrained(target, state_dict=state, is_main_process=rank() == 0)
            if rank() == 0:
                trained = {name: value for name, value in state.items() if ".lora_A." in name or ".lora_B." in name}
                torch.save(trained, folder / way / f"{form}.pt")
            torch.distributed.barrier()
            if way == "partitioned":
                again = PissaModel.from_pretrained(base(way, folder / "base"), target, is_trainable=True).train()
                losses[f"{form}, again"], _ = train(again)
    target = folder / "wrapped" / "implicit"
    fresh, adapted = llama(), pissa.wrap(llama(), r=4)
    for model in (fresh, adapted):
        deepspeed.initialize(model=model, optimizer=sgd(model), config=CONFIG)
    refused = {
        "wrap": message(lambda: pissa.wrap(fresh, r=4)),
        "add_adapter": message(lambda: adapted.add_adapter("second", pissa.PissaConfig(r=4))),
        "load_adapter": message(lambda: adapted.load_adapter(target, "default")),
    }
    if rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
        (folder / "most.json").write_text(json.dumps(max(most)))
        (folder / "refused.json").write_text(json.dumps(refused))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
