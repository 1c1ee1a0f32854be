"""bench.experiments.evaluation.lm_harness: scores of answers that are known, and of a model that has learnt them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pissa
from tiny_model import save_tiny_model, tiny_tokenizer
from trainers import quiet

ROOT = Path(__file__).parents[3]

pytestmark = quiet

TURNS = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
"""A chat template that ends a turn with another token than that which ends texts."""


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def load(folder: Path, **config: int) -> tuple[Any, Any]:
    """A tiny model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_tiny_model(folder, max_position_embeddings=2048, **config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, use_cache=False)
    return model, AutoTokenizer.from_pretrained(folder)


def scripted(model: Any, tokenizer: Any, answers: list[str]) -> list[str]:
    """Makes the model answer its next prompts, in the order of the file, whatever order they come in. The prompts that
    it gets are added to the list that is returned."""
    prompts: list[str] = []

    def generate(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompts.append(tokenizer.decode(ids[mask.bool()]))
            number = int(prompts[-1].partition("Problem ")[2].partition(":")[0])
            rows.append(torch.cat([ids, torch.tensor(tokenizer(answers[number] + "</s>").input_ids)]))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_token_id)

    model.generate = generate
    return prompts


def write(file: Path, answers: list[str], names: tuple[str, str] = ("question", "answer")) -> Path:
    """Problems, of which each says its number."""
    asked, answered = names
    rows = [
        {asked: f"Problem {i}: " + "?" * i, answered: answer, "level": "Level 1"} for i, answer in enumerate(answers)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_gsm8k_has_the_filters_of_lm_eval(tmp_path: Path) -> None:
    from bench.experiments.evaluation.lm_harness import evaluate

    model, tokenizer = load(tmp_path / "model")
    write(tmp_path / "test.jsonl", [f"It is {i}, so\n#### {1000 + i:,}" for i in range(6)])
    scripted(
        model,
        tokenizer,
        [
            "It is 1000.\n#### 1,000",  # both
            "#### 1001\n### Instruction: 7",  # both: cut at the stop sequence
            "The number is 1002.",  # flexible only
            "#### 1003, or 5",  # strict only
            "#### 1003",  # neither
            "no number",
        ],
    )
    model.train()
    before = tokenizer.pad_token
    assert evaluate(model, tokenizer, "gsm8k", tmp_path, batch_size=4) == {
        "strict-match": pytest.approx(3 / 6),
        "flexible-extract": pytest.approx(3 / 6),
    }
    assert model.training
    assert tokenizer.pad_token == before
    assert evaluate(model, tokenizer, "gsm8k", tmp_path, limit=3)["strict-match"] == pytest.approx(2 / 3)


def test_problems_are_compared_without_white_space_around_them(tmp_path: Path) -> None:
    from bench.experiments.evaluation.lm_harness import evaluate

    model, tokenizer = load(tmp_path / "model")
    file = write(tmp_path / "held_out.jsonl", ["red cat", "Blue", "7", "8"])
    scripted(model, tokenizer, [" red cat \nand more", "blue", "7", "8 or 9"])
    assert evaluate(model.eval(), tokenizer, "problems", file) == {"exact_match": pytest.approx(2 / 4)}
    assert not model.training


SOLUTIONS = [
    r"Half of $\frac{3}{2}$ is $\boxed{\frac{3}{4}}$.",
    r"Thus $x\in\boxed{[2,5)}$.",
    r"The day is $\boxed{\text{Monday}}$.",
    r"We get $\boxed{3x^2+1}$.",
    r"So $\sqrt 8 = \boxed{2\sqrt{2}}$ of them.",
    r"There are $\boxed{10,\!000}$ ways.",
    r"Hence \boxed{12}.",
]
ANSWERS = [
    (r"it is \boxed{0.75}", True),
    (r"The answer is: [2,5]", False),
    ("The answer is: Monday", True),
    ("The answer is: 1+3x^2.", True),
    (r"First 3. The answer is: $\sqrt{8}$", True),
    ("The answer is: 1000", False),
    (r"I know that 12 is not right, but \boxed{13}", False),
]


@pytest.mark.parametrize("form", ["lines", "folder tree"])
def test_math_compares_mathematics(form: str, tmp_path: Path) -> None:
    from bench.experiments.evaluation.lm_harness import evaluate

    model, tokenizer = load(tmp_path / "model")
    write(tmp_path / "test.jsonl", SOLUTIONS, names=("problem", "solution"))
    if form == "folder tree":
        for i, line in enumerate((tmp_path / "test.jsonl").read_text().splitlines()):
            folder = tmp_path / "MATH" / "test" / ("algebra" if i < 3 else "number_theory")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i + 8}.json").write_text(json.dumps(json.loads(line), indent=4))
    scripted(model, tokenizer, [answer for answer, _ in ANSWERS])
    data = tmp_path / "MATH" if form == "folder tree" else tmp_path
    assert evaluate(model, tokenizer, "math", data) == {"math_verify": pytest.approx(4 / 7)}
    assert evaluate(model, tokenizer, "math", data, limit=1) == {"math_verify": 1}


def test_prompts_are_those_of_the_training(tmp_path: Path) -> None:
    from bench.experiments.evaluation.lm_harness import evaluate

    model, tokenizer = load(tmp_path / "model")
    file = write(tmp_path / "held_out.jsonl", ["a"])
    prompts = scripted(model, tokenizer, ["a"])
    evaluate(model, tokenizer, "problems", file)
    tokenizer.chat_template = None
    evaluate(model, tokenizer, "problems", file)
    chat, alpaca = prompts
    assert chat == "u:Problem 0: </s>a:"
    assert alpaca.startswith("Below is an instruction")
    assert alpaca.endswith("### Instruction:\nProblem 0: \n\n### Response:")


def test_an_adapter_that_has_learnt_the_answers(tmp_path: Path) -> None:
    """By what `pissa finetune` trains with, and an end of turns that is not the end of texts: the short answer ends
    while the others of its batch go on."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from bench.experiments.evaluation.lm_harness import evaluate
    from pissa.cli.data import read_chats
    from pissa.cli.encode import encode

    tokenizer = tiny_tokenizer(turn="<|turn|>")
    tokenizer.chat_template = TURNS
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    file = write(tmp_path / "problems.jsonl", ["b", "eleven", "a long answer"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=128)
        model = pissa.wrap(LlamaForCausalLM(config), r=64, task_type="CAUSAL_LM")
    rows, _, _ = encode(read_chats(str(file), 0), tokenizer, 128)
    batch = DataCollatorForLanguageModeling(tokenizer.eos_token_id)(rows)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(80):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = torch.get_rng_state()
    assert evaluate(model.bfloat16(), tokenizer, "problems", file, batch_size=3) == {"exact_match": 1.0}
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluate(model, tokenizer, "problems", file, max_new_tokens=1) == {"exact_match": pytest.approx(1 / 3)}


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    from bench.experiments.evaluation.lm_harness import evaluate
    from pissa.cli.terminal import UserError

    model, tokenizer = load(tmp_path / "model")
    with pytest.raises(ValueError, match="task is 'gsm9k'; allowed: gsm8k, problems, math"):
        evaluate(model, tokenizer, "gsm9k", tmp_path)
    with pytest.raises(ValueError, match="limit is 0; allowed"):
        evaluate(model, tokenizer, "gsm8k", tmp_path, limit=0)
    with pytest.raises(UserError, match=r"found no problem; allowed: a folder with test\.jsonl"):
        evaluate(model, tokenizer, "math", tmp_path)
    write(tmp_path / "test.jsonl", ["1"])
    with pytest.raises(UserError, match=r"test\.jsonl:1: found .*needed: an object with the texts problem"):
        evaluate(model, tokenizer, "math", tmp_path)
