"""Trains an adapter on a model as it is released, in FP8, MXFP4, NVFP4 or INT4, and merges it into the same format.

python examples/released_model.py MODEL train.jsonl OUT   # {"question": …, "answer": …} on each line
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

import pissa

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a folder, or a name of the Hub, such as openai/gpt-oss-20b")
parser.add_argument("data", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = pissa.load(options.model, r=16, init="lora").train()  # the codes stay in the mapped files
model.gradient_checkpointing_enable()

records = [json.loads(line) for line in options.data.read_text().splitlines()]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
for step in range(options.steps):
    record = records[step % len(records)]
    tokens = tokenizer(record["question"] + record["answer"], return_tensors="pt").input_ids
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == options.steps - 1:
        print(f"step {step}: loss {loss.item():.3f}")

adapter = options.out.with_name(f"{options.out.name}-adapter")
model.save_pretrained(adapter)
tokenizer.save_pretrained(adapter)
# The same files with other codes: the same format and scales.
command = [sys.executable, "-m", "pissa", "merge", adapter, options.out, "--quant", "same"]
subprocess.run([str(word) for word in command], check=True)
