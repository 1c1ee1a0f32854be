"""TRL's SFTTrainer, on a 4-bit base that is calibrated on the first eight examples.

python examples/trl_sft.py MODEL train.jsonl OUT     # train.jsonl: {"question": …, "answer": …} on each line
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import pissa

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a folder, or a name of the Hub, such as HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("data")
parser.add_argument("out")
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
data = load_dataset("json", data_files=options.data, split="train")


def chat(record: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": record["question"]}],
        "completion": [{"role": "assistant", "content": record["answer"]}],
    }


data = data.map(chat, remove_columns=data.column_names)
texts = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in list(data)[:8]]
batches = [tokenizer(text, add_special_tokens=False, return_tensors="pt") for text in texts]
# A repair removes the part of the 4-bit error that changes the outputs on these examples most. On such a base, LoRA's
# initialisation learns better than PiSSA's, the default.
model = pissa.wrap(model, r=16, quant="nf4", init="lora", calibration=batches, task_type="CAUSAL_LM")

arguments = SFTConfig(
    options.out,
    max_steps=options.steps,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    lr_scheduler_type="cosine",
    warmup_steps=2,
    logging_steps=10,
    report_to="none",
    use_cpu=not torch.cuda.is_available(),
)
trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
trainer.train()  # trainer.train(resume_from_checkpoint=True) goes on where it stopped, bit for bit
trainer.save_model()
