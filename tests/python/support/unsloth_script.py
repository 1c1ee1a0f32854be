"""What a user of Unsloth writes: python unsloth_script.py MODEL DATA OUTPUT."""

from __future__ import annotations

import sys

import unsloth  # first, as it asks  # isort: skip
import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

base, data, output = sys.argv[1:]
loaded, tokenizer = unsloth.FastLanguageModel.from_pretrained(
    base, max_seq_length=64, load_in_4bit=False, dtype=torch.float32, local_files_only=True
)
model = unsloth.FastLanguageModel.get_peft_model(
    loaded, r=4, lora_alpha=8, init_lora_weights="pissa", use_gradient_checkpointing=False
)
rows = load_dataset("json", data_files=data, split="train")
config = SFTConfig(
    output_dir=output,
    max_steps=3,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    logging_steps=1,
    save_steps=3,
    report_to="none",
    bf16=False,
    optim="adamw_torch",
    dataset_text_field="text",
    dataset_num_proc=1,
    max_length=64,
    seed=7,
)
SFTTrainer(model, args=config, processing_class=tokenizer, train_dataset=rows).train()
