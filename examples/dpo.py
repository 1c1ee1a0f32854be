"""TRL's DPOTrainer: the base is the reference, so one model is in memory.

python examples/dpo.py MODEL preferences.jsonl OUT   # {"prompt": …, "chosen": …, "rejected": …} on each line
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import pissa

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a folder, or a name of the Hub, such as HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("data")
parser.add_argument("out")
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
model = pissa.wrap(model, r=16, task_type="CAUSAL_LM")
arguments = DPOConfig(
    options.out,
    max_steps=options.steps,
    per_device_train_batch_size=2,
    learning_rate=5e-5,
    logging_steps=10,
    report_to="none",
    use_cpu=not torch.cuda.is_available(),
)
trainer = DPOTrainer(
    model,
    args=arguments,
    train_dataset=load_dataset("json", data_files=options.data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(options.model),
)
trainer.train()  # the first loss is ln 2: policy and reference start alike
trainer.save_model()
