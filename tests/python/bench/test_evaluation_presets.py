"""bench.experiments.presets and models: a step of the paper's training on tiny models of each of its architectures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import ARCHITECTURES, VOCABULARY
from tiny_model import tiny_tokenizer
from trainers import quiet, state

ROOT = Path(__file__).parents[3]

pytestmark = quiet

PAPER = [name for name, architecture in ARCHITECTURES.items() if architecture.paper]
LANGUAGE = [name for name in PAPER if ARCHITECTURES[name].is_causal]
ENCODERS = [name for name in PAPER if not ARCHITECTURES[name].is_causal]


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def rows(count: int, label: Any) -> Any:
    """Random tokens; `label` makes the labels of a row from them."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, (count, 5), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": tokens, **label(tokens)})


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_step_of_a_language_model(name: str, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    from bench.experiments.models import adapted, load_language_model
    from bench.experiments.presets import PAPER_NLG, sft_arguments

    ARCHITECTURES[name].make().save_pretrained(tmp_path / "model")
    preset = replace(PAPER_NLG, rank=4, alpha=4)  # tiny layers have no rank of 128
    model = adapted(load_language_model(str(tmp_path / "model")), preset)
    before = state(model)
    data = rows(256, lambda tokens: {"labels": tokens})
    config = SFTConfig(**sft_arguments(preset, str(tmp_path), per_device=64, steps=2))
    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tiny_tokenizer())
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.state.epoch == 1  # 128 examples in a step
    changed = moved(before, model.state_dict())
    assert all(".lora_" in name for name in changed)
    assert any("o_proj" in name for name in changed)
    assert any("experts" in name for name in changed) == (name in ("mixtral", "deepseek_v2"))


@pytest.mark.parametrize("task", ["mnli", "stsb"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_step_of_an_encoder(name: str, task: str, tmp_path: Path) -> None:
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from bench.experiments.evaluation.glue import TASKS
    from bench.experiments.models import adapted, load_classifier
    from bench.experiments.presets import PAPER_NLU, training_arguments

    classifier: Any = ARCHITECTURES[name].make()
    classifier.base_model.save_pretrained(tmp_path / "model")  # an encoder without a head
    preset = PAPER_NLU["PiSSA"][task]
    loaded = load_classifier(str(tmp_path / "model"), TASKS[task])
    model = adapted(loaded, preset)
    before = state(model)
    values = [0.5, 4.0] if task == "stsb" else [0, 2]
    data = rows(preset.batch, lambda tokens: {"label": values * (len(tokens) // 2)})
    arguments = TrainingArguments(**training_arguments(preset, str(tmp_path), per_device=4, steps=1))
    collate = DataCollatorWithPadding(tiny_tokenizer(pad_token="<pad>"))
    Trainer(model, arguments, train_dataset=data, data_collator=collate).train()
    changed = moved(before, model.state_dict())
    attention = ("query_proj", "key_proj", "value_proj") if name == "deberta_v3" else ("query", "key", "value")
    adapters = {part for part in attention if any(f".{part}.lora_" in key for key in changed)}
    assert adapters == set(attention)
    rest = {key for key in changed if not any(f".{part}.lora_" in key for part in attention)}
    assert any("pooler" in key for key in rest) == (name == "deberta_v3")
    assert any("classifier" in key for key in rest)
    assert all("classifier" in key or "pooler" in key for key in rest)
    assert loaded.config.num_labels == (1 if task == "stsb" else 3)
    assert loaded.config.problem_type == ("regression" if task == "stsb" else "single_label_classification")


def test_full_scale_and_trial_differ_in_steps_only() -> None:
    from bench.experiments.presets import PAPER_NLG, PAPER_NLU, sft_arguments, training_arguments

    full = sft_arguments(PAPER_NLG, "out", per_device=4, processes=8)
    trial = sft_arguments(PAPER_NLG, "out", per_device=4, processes=8, steps=2)
    assert {key for key in full if full[key] != trial[key]} == {"max_steps"}
    assert full | {"use_cpu": None} == {
        "output_dir": "out",
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "num_train_epochs": 1,
        "max_steps": -1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "bf16": True,
        "use_cpu": None,
        "report_to": "none",
        "max_length": 512,
        "completion_only_loss": True,
    }
    rte = training_arguments(PAPER_NLU["LoRA, Kaiming start"]["rte"], "out", per_device=32)
    assert (rte["num_train_epochs"], rte["learning_rate"], rte["lr_scheduler_type"]) == (50, 4e-4, "linear")
    with pytest.raises(ValueError, match=r"is 24; allowed: a divisor of the preset's batch of 128"):
        sft_arguments(PAPER_NLG, "out", per_device=3, processes=8)


def test_attention_of_other_models_is_refused() -> None:
    from bench.experiments.models import adapter_fields
    from bench.experiments.presets import PAPER_NLU

    with pytest.raises(ValueError, match="the model's type is llama; allowed: deberta-v2, roberta"):
        adapter_fields(PAPER_NLU["PiSSA"]["rte"], ARCHITECTURES["llama2"].make())


def test_the_paper_s_figures_are_of_models_that_have_a_name() -> None:
    from bench.experiments.evaluation.paper_figures import FIGURE_6, TABLE_2
    from bench.experiments.models import HUB

    assert HUB.keys() >= TABLE_2.keys() | {model for figures in FIGURE_6.values() for model in figures}
