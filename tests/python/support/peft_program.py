"""A program that knows nothing of this package: it trains PEFT's PiSSA on a model, if its argument
says so, and starts itself once more."""

from __future__ import annotations

import json
import subprocess
import sys


def losses(folder: str) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_peft_available

    assert is_peft_available()  # asks where peft is, as trainers do, before anybody imports it
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights="pissa_niter_16")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)
    tokens = torch.arange(24).view(2, 12)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


if __name__ == "__main__":
    script, folder, *others = sys.argv
    found = losses(folder) if others[0] in ("both", "last") else []
    print(json.dumps({"arguments": others, "path": sys.path[:2], "losses": found}), flush=True)
    sys.exit(0 if others == ["last"] else 7 + subprocess.run([sys.executable, script, folder, "last"]).returncode)
