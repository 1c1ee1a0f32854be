"""What runs in each process of a DeepSpeed ZeRO-3 training: torchrun --nproc-per-node=2 deepspeed_worker.py FOLDER.

Writes, for each form of the base, the losses to losses.json and the trained adapter to a folder of the form's name.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch

import pissa
from distributed_worker import FORMS, QUIET, llama, mean, sgd, share, tokens
from pissa.distributed import rank

CONFIG = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # else parameters as small as these are not partitioned
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_micro_batch_size_per_gpu": 3,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def main(folder: Path) -> None:
    for text, category in QUIET:
        warnings.filterwarnings("ignore", text, category)
    deepspeed.init_distributed("gloo")
    losses = {}
    for form in ("implicit", "nf4", "nf4 in float32"):
        model = pissa.wrap(llama(), r=4, **FORMS[form])
        engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=CONFIG)
        assert all(parameter.numel() == 0 for parameter in model.parameters()), "nothing is partitioned"
        losses[form] = []
        for _ in range(3):
            loss = engine(input_ids=share(tokens()), labels=share(tokens())).loss
            engine.backward(loss)
            engine.step()
            losses[form].append(mean(loss))
        state = engine._zero3_consolidated_16bit_state_dict()  # as accelerate asks for it
        model.save_pretrained(folder / form, state_dict=state, is_main_process=rank() == 0)
        if rank() == 0:
            trained = {name: value for name, value in state.items() if ".lora_A." in name or ".lora_B." in name}
            torch.save(trained, folder / f"{form}.pt")
    if rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
