"""A training loop in plain PyTorch.

python examples/loop.py MODEL train.jsonl OUT        # train.jsonl: {"question": …, "answer": …} on each line
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pissa

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a folder, or a name of the Hub, such as HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("data", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--rate", type=float, default=2e-4)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
model = pissa.wrap(dense, r=16, task_type="CAUSAL_LM").train()  # quant="nf4" for a base in 4 bits


def encoded(record: dict[str, str]) -> tuple[list[int], int]:
    """The tokens of a question with its answer, and how many of them the model is given."""
    question = [{"role": "user", "content": record["question"]}]
    answered = [*question, {"role": "assistant", "content": record["answer"]}]
    given = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    ids, start = (tokenizer(text, add_special_tokens=False).input_ids for text in (whole, given))
    return ids, len(start)


rows = [encoded(json.loads(line)) for line in options.data.read_text().splitlines()]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.rate, weight_decay=0.0)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
for step in range(options.steps):
    ids, given = rows[step % len(rows)]
    tokens = torch.tensor([ids])
    labels = tokens.clone()
    labels[:, :given] = -100  # the answer is learned, not the question
    loss = model(input_ids=tokens, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if step % 10 == 0 or step == options.steps - 1:
        print(f"step {step}: loss {loss.item():.3f}")

model.save_pretrained(options.out)  # a plain LoRA for the unmodified model, too
tokenizer.save_pretrained(options.out)
print(f"ask it: pissa chat {options.out}")
