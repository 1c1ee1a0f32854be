"""The training loop: transformers' Trainer with the paper's settings."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from peft import PeftModel
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from pissa.cli.encode import Collator, Example
from pissa.cli.metrics import LossBar, MetricsCallback, truncate_metrics
from pissa.cli.run_folder import checkpoint_step, last_checkpoint
from pissa.cli.terminal import say


def train(
    model: PeftModel,
    examples: Sequence[Example],
    held_out: Sequence[Example] | None,
    collate: Collator,
    args: argparse.Namespace,
) -> None:
    """Trains the adapter, with --resume from the last checkpoint on, and evaluates it before and after.

    AdamW without weight decay, cosine schedule with warm-up (arXiv 2404.02948, section 5). Writes metrics.jsonl and
    checkpoints to `args.out`.
    """
    if args.gradient_checkpointing:
        model.config.use_cache = False
        # transformers 5.24 has renamed it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    trainer = Trainer(
        model=model,
        args=_arguments(args, len(examples)),
        train_dataset=examples,
        eval_dataset=held_out,
        data_collator=collate,
        callbacks=[MetricsCallback(args.out)],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar)
    checkpoint = last_checkpoint(args.out) if args.resume else None
    done = checkpoint_step(checkpoint) if checkpoint else -1
    truncate_metrics(args.out, done)
    if checkpoint:
        say("resume", f"after step {done}")
    elif held_out:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if held_out:
        trainer.evaluate()


def _arguments(args: argparse.Namespace, examples: int) -> TrainingArguments:
    steps_per_epoch = math.ceil(math.ceil(examples / args.batch_size) / args.grad_accum)
    steps = args.steps or math.ceil(args.epochs * steps_per_epoch)
    return TrainingArguments(
        output_dir=str(args.out),
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.grad_accum,
        learning_rate=args.lr,
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(args.warmup_ratio * steps),
        logging_steps=1,
        save_steps=args.save_steps,
        save_total_limit=2,
        seed=args.seed,
        data_seed=args.seed,
        remove_unused_columns=False,  # the collator takes Examples, which have no columns
        dataloader_pin_memory=False,
        use_cpu=True,  # pissa.ops computes on the CPU
        report_to="none",
    )
