"""`pissa finetune`: load, wrap, check, train, save."""

from __future__ import annotations

import argparse
import statistics
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pissa.cli.data import read_records
from pissa.cli.errors import UserError
from pissa.cli.quiet import silence_third_parties
from pissa.cli.report import say
from pissa.cli.run_folder import PICTURE_FILE, check_new_folder, check_resumable, record_run

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from pissa.cli.encode import Encoded


def run(args: argparse.Namespace) -> int:
    """Runs one fine-tuning. Returns the exit code.

    Raises:
        UserError: for wrong arguments, files and models.
    """
    _check_arguments(args)
    if args.resume:
        check_resumable(args)
    else:
        check_new_folder(args.out)
    records = read_records(args.data, args.seed)
    eval_records = read_records(args.eval_data, args.seed) if args.eval_data else []

    silence_third_parties()
    import torch

    from pissa.cli.encode import Collator, encode
    from pissa.cli.selfcheck import step0_check
    from pissa.cli.training import train

    model, tokenizer = _load(args)
    size = f"{model.num_parameters() / 1e6:,.1f} M parameters"
    say("model", f"{args.model}, {size}, {args.dtype}, {torch.get_num_threads()} threads")
    encoded = encode(records, tokenizer, args.max_length)
    say("data", _describe(args.data, encoded, args))
    held_out = encode(eval_records, tokenizer, args.max_length) if eval_records else None
    if held_out:
        say("held out", _describe(args.eval_data, held_out, args))
    wrapped = _wrap(model, args)
    trainable, total = wrapped.get_nb_trainable_parameters()
    share = f"{trainable:,} trainable parameters ({trainable / total:.2%})"
    say("method", f"{_method_name(args)}, rank {args.rank}: {share}")

    collate = Collator(_pad_token_id(tokenizer))
    check = step0_check(wrapped, collate(encoded.examples[: args.batch_size]), getattr(torch, args.dtype))
    say("check", f"logits at step 0 differ by {check.difference:.1e} from the base's (bound {check.bound:.1e})")
    if not check.passed:
        say("check", "FAILED: the adapter changes the model before it is trained; please report this with `pissa env`")
        return 1
    if not args.resume:
        record_run(args, {"trainable_parameters": trainable, "step0_check": check._asdict()})
    with warnings.catch_warnings():
        # Said once at the end, not across the progress bar at the first checkpoint.
        warnings.filterwarnings("ignore", "The residual of the base is stored as", UserWarning)
        train(wrapped, encoded.examples, held_out.examples if held_out else None, collate, args)
        wrapped.save_pretrained(args.out)
    _finish(args)
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    for name in ("model", "data", "out"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing; needed: --model, --data and --out (or --demo)")
    if args.method == "lora" and args.quant:
        raise UserError("--quant nf4 needs --method pissa; plain LoRA is trained on the base as it is")


def _method_name(args: argparse.Namespace) -> str:
    return {"lora": "LoRA", "pissa": "QPiSSA (nf4)" if args.quant else "PiSSA"}[args.method]


def _load(args: argparse.Namespace) -> tuple[Any, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if Path(args.model).exists() and not (Path(args.model) / "config.json").is_file():
        raise UserError(f"--model {args.model}: found no config.json in it; needed: a folder of a model, or a name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    except (OSError, ValueError, KeyError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"--model {args.model}: cannot be loaded as a causal language model with its tokenizer: {reason}; "
            "needed: a folder that save_pretrained wrote, or a name on the model hub"
        ) from error
    return model, tokenizer


def _wrap(model: Any, args: argparse.Namespace) -> PeftModel:
    from transformers import set_seed

    set_seed(args.seed)  # LoRA's A is random
    try:
        if args.method == "lora":
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
            return get_peft_model(model, config)
        import pissa

        wrapped = pissa.wrap(
            model,
            r=args.rank,
            quant=args.quant,
            svd=args.svd,
            svd_passes=args.svd_passes,
            seed=args.seed,
            task_type="CAUSAL_LM",
            progressbar=True,
        )
    except ValueError as error:  # a rank above a layer's size, NaN in a weight: the message names it
        raise UserError(f"--model {args.model}: {error}") from error
    if args.quant:
        # The weights are views of the mapped model file, all of which stays in memory as long as one of them lives:
        # without copies of those that are left, the dense weights that 4-bit ones replaced would not go away.
        for parameter in wrapped.parameters():
            parameter.data = parameter.data.clone()
    return wrapped


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token does, since padding is masked."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def _describe(source: str, encoded: Encoded, args: argparse.Namespace) -> str:
    text = f"{source}, {len(encoded.examples):,} examples"
    if encoded.cut:
        text += f", {encoded.cut:,} answers cut at {args.max_length} tokens"
    if encoded.dropped:
        text += f", {encoded.dropped:,} left out (their prompt alone is longer)"
    return text


def _finish(args: argparse.Namespace) -> None:
    from pissa.cli.metrics import read_metrics
    from pissa.cli.plot import Curve, plot_losses

    rows = read_metrics(args.out)
    steps = [row for row in rows if "loss" in row]
    curve = Curve(_method_name(args), [row["step"] for row in steps], [row["loss"] for row in steps])
    plot_losses(
        [curve], args.out / PICTURE_FILE, f"{Path(args.model).name}, rank {args.rank}, learning rate {args.lr:g}"
    )
    first, last = (statistics.mean(part) for part in (curve.losses[:5], curve.losses[-5:]))
    seconds = statistics.median(row["seconds"] for row in steps)
    say("loss", f"{first:.4f} in the first 5 steps, {last:.4f} in the last 5")
    if held_out := [row["eval_loss"] for row in rows if "eval_loss" in row]:
        say("held out", f"loss {held_out[0]:.4f} before, {held_out[-1]:.4f} after")
    say("cost", f"{seconds:.2f} s per step (median), peak memory {steps[-1]['peak_memory_mib']:,.0f} MiB")
    say("saved", f"{args.out}: the adapter, metrics.jsonl, {PICTURE_FILE}, checkpoints")
    if args.quant:
        say("note", "pissa.PissaModel.from_pretrained restores this model exactly. Loaded as a plain LoRA onto the")
        say("", "dense base, the adapter lacks the error of the 4-bit residual, with which it was trained.")
