"""Trains an adapter on a GGUF file as it is, on a CPU, and merges it into a new file of the same types.

python examples/gguf_file.py model.gguf train.jsonl OUT.gguf   # {"question": …, "answer": …} on each line
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

import pissa

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("file", type=Path)
parser.add_argument("data", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.file.parent, gguf_file=options.file.name)
# merge_aware: layers compute with the codes that the new file will have.
model = pissa.load(options.file, r=16, init="lora", target_modules="all-linear", merge_aware=True).train()

records = [json.loads(line) for line in options.data.read_text().splitlines()]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
for step in range(options.steps):
    record = records[step % len(records)]
    question, answer = (tokenizer(record[name], add_special_tokens=False).input_ids for name in ("question", "answer"))
    tokens = torch.tensor([question + answer + [tokenizer.eos_token_id]])
    labels = tokens.clone()
    labels[:, : len(question)] = -100
    loss = model(input_ids=tokens, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == options.steps - 1:
        print(f"step {step}: loss {loss.item():.3f}")

adapter = options.out.with_suffix("")
model.save_pretrained(adapter)
tokenizer.save_pretrained(adapter)
written = pissa.export(adapter, options.out, to="gguf-model", base=options.file)
print(f"{written.written}; {written.load}")
