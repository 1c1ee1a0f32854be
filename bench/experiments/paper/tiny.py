"""Random models of two layers, and a few rows of each data set in its published format: whether everything runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from bench.experiments.evaluation import glue

Row = dict[str, Any]

ROWS = 14
"""Of the training data."""
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def language_model(folder: Path) -> Path:
    """Writes a Llama and its tokenizer of bytes, without a chat template, as the paper's models have none."""
    config = LlamaConfig(**_SIZES, vocab_size=len(_tokenizer()), max_position_embeddings=4096, eos_token_id=0)
    return _saved(LlamaForCausalLM, config, folder / "llama")


def encoder(folder: Path) -> Path:
    """Writes a DeBERTa-v3 without a head, and a tokenizer of bytes."""
    config = DebertaV2Config(
        **_SIZES,
        vocab_size=len(_tokenizer()),
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        type_vocab_size=0,
        position_biased_input=False,
        pooler_hidden_size=_SIZES["hidden_size"],
    )
    return _saved(DebertaV2Model, config, folder / "deberta")


def _saved(kind: Any, config: Any, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["</s>", "<pad>"]
    fast.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", pad_token="<pad>")


def data(folder: Path) -> dict[str, Path]:
    """Writes the data of both experiments, and says where each is."""
    sums = [(f"What is {i} + 1?", i + 1) for i in range(ROWS)]
    rows: dict[str, list[Row]] = {
        "metamath": [{"query": q, "response": f"#### {a}\nThe answer is: {a}"} for q, a in sums],
        "codefeedback": [{"query": q, "answer": f"```python\nprint({a})\n```"} for q, a in sums],
        "evol-instruct": [{"conversations": [_said("human", q), _said("gpt", f"{a}.")]} for q, a in sums],
        "gsm8k/test": [{"question": q, "answer": f"#### {a}"} for q, a in sums],
        "math/test": [{"problem": q, "solution": rf"\boxed{{{a}}}"} for q, a in sums],
        "mbpp": [_mbpp(i) for i in (11, 12)],
        "mt-bench/judge_prompts": [_judge_prompt(name) for name in ("single-v1", "single-v1-multi-turn")],
        "mt-bench/mt_bench/question": [
            {"question_id": i, "category": "writing", "turns": ["Name a tree.", "And another."]} for i in (81, 82)
        ],
        "mt-bench/mt_bench/reference_answer/gpt-4": [],
    }
    for name, lines in rows.items():
        _write(folder / f"{name}.jsonl", map(json.dumps, lines))
    for task in glue.TASKS.values():
        _write_glue(task, folder / "glue")
    files = {name: folder / f"{name}.jsonl" for name in ("metamath", "codefeedback", "evol-instruct", "mbpp")}
    return files | {name: folder / name for name in ("gsm8k", "math", "mt-bench", "glue")}


def _said(role: str, text: str) -> Row:
    return {"from": role, "value": text}


def _mbpp(number: int) -> Row:
    tests = [f"assert plus{number}(1) == {number + 1}"]
    return {"task_id": number, "text": f"Add {number}.", "code": "", "test_list": tests, "test_setup_code": ""}


def _judge_prompt(name: str) -> Row:
    turns = "{question_1} {answer_1} {question_2} {answer_2}" if name.endswith("turn") else "{question} {answer}"
    return {"name": name, "system_prompt": "Judge.", "prompt_template": f"Rate as [[1]] to [[10]]: {turns}"}


def _write_glue(task: glue.GlueTask, folder: Path) -> None:
    """A header, which CoLA's files have not, and rows whose labels take turns. CoLA has four columns."""
    columns = ("source", "label", "mark", "sentence") if task.folder == "CoLA" else (*task.texts, task.label)
    labels = task.labels or ("0.5", "2.0", "4.5")
    lines = [
        "\t".join(labels[i % len(labels)] if name == task.label else f"{name} {i}" for name in columns)
        for i in range(ROWS)
    ]
    header = [] if task.folder == "CoLA" else ["\t".join(columns)]
    for part in ("train", *task.evaluated):
        _write(folder / task.folder / f"{part}.tsv", [*header, *lines])


def _write(file: Path, lines: Iterable[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
