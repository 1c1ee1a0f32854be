"""TRL's trainers on a small Llama: they train our model as any PeftModel, and its reference is what it started from."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

import pissa
from daily import each
from language_models import logits
from pissa import PissaModel
from trainers import FORMS, assert_equal, forms, logged, options, quiet, state, trainable, unchanged

pytestmark = quiet
# It resumes TRL's "ref", which has a folder of its own; "default", beside it, starts again. So does plain PEFT's.
resumes_both = pytest.mark.skipif(Version(version("transformers")) < Version("5.23"), reason="transformers before 5.23")

Base = Callable[[], nn.Module]

SUMS = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}"} for i in range(16)]
PREFERENCES = [{"prompt": f"{i}+{i}=", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1}."} for i in range(16)]


def wrapped(model: nn.Module, form: str, **fields: Any) -> PissaModel:
    return pissa.wrap(model, r=4, task_type="CAUSAL_LM", **FORMS[form], **fields)


def without_autocast(run: Any) -> nn.Module:
    """The trained model. A run in bfloat16 leaves it with accelerate's autocast around its forward."""
    return run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False).eval()


# -- supervised fine-tuning


def sft(model: nn.Module, folder: Path, tokenizer: Any, **others: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list(SUMS)
    arguments = SFTConfig(**options(folder, max_length=32, **others))
    return SFTTrainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


def loss_of(run: Any) -> float:
    return run.evaluate()["eval_loss"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packing", each([False, True], [False]))
def test_supervised_fine_tuning(form: str, packing: bool, base: Base, tokenizer: Any, tmp_path: Path) -> None:
    """It starts at the base's loss, leaves the base alone, and its folder holds what was trained."""
    run = sft(wrapped(base(), form), tmp_path, tokenizer, packing=packing)
    assert (len(run.train_dataset) < len(SUMS)) == packing
    assert run.args.bf16  # TRL's default: autocast
    assert run.args.gradient_checkpointing
    start = loss_of(run)
    if form == "implicit":
        assert start == loss_of(sft(base(), tmp_path, tokenizer, packing=packing))
    with unchanged(run.model):
        run.train()
    assert loss_of(run) < start
    with run.model.disable_adapter():
        assert loss_of(run) == start

    run.save_model(tmp_path / "end")
    again = PissaModel.from_pretrained(base(), tmp_path / "end", is_trainable=True)
    assert loss_of(sft(again, tmp_path, tokenizer, packing=packing)) == loss_of(run)


def test_tokens_that_a_chat_template_adds(base: Base, tokenizer: Any, tmp_path: Path) -> None:
    """TRL grows the vocabulary, and trains the new rows and the output layer: with these fields of a configuration."""
    from transformers import AutoTokenizer
    from trl import clone_chat_template

    tokenizer.add_tokens(["<|turn|>", "<|end|>"])
    tokenizer.chat_template = "{% for m in messages %}<|turn|>{{ m['role'] }}:{{ m['content'] }}<|end|>{% endfor %}"
    tokenizer.eos_token = "<|end|>"
    tokenizer.save_pretrained(tmp_path / "chat")
    size = base().config.vocab_size

    def cloned(seed: int) -> tuple[nn.Module, Any, list[int]]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            plain = AutoTokenizer.from_pretrained(base().name_or_path)
            return clone_chat_template(base(), plain, str(tmp_path / "chat"), resize_to_multiple_of=8)

    model, chat, added = cloned(1)
    assert added == list(range(size, model.config.vocab_size))
    fields = {"trainable_token_indices": {"embed_tokens": added}, "modules_to_save": ["lm_head"]}
    run = sft(wrapped(model, "implicit", **fields), tmp_path, chat)
    start = loss_of(run)
    with unchanged(run.model):
        run.train()
    assert loss_of(run) < start
    assert any("trainable_tokens_delta" in name for name in trainable(run.model))
    run.save_model(tmp_path / "end")
    again = PissaModel.from_pretrained(cloned(2)[0], tmp_path / "end", is_trainable=True)
    assert loss_of(sft(again, tmp_path, chat)) == loss_of(run)


# -- preferences


def dpo(model: nn.Module, folder: Path, tokenizer: Any, **others: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    reference = others.pop("ref_model", None)
    # Without autocast: before 1.16 TRL asks for a reference with it or without, as the model then is.
    arguments = DPOConfig(**options(folder, bf16=False, **others))
    data = Dataset.from_list(PREFERENCES)
    return DPOTrainer(model, reference, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


def batch_of(run: Any) -> dict[str, Tensor]:
    return next(iter(run.get_eval_dataloader()))


def reference_of(run: Any) -> Tensor:
    """Log-probabilities of the chosen and the rejected answers, under the reference that TRL finds in the model."""
    return torch.stack(run.compute_ref_log_probs(run.model, batch_of(run)))


@forms
@pytest.mark.parametrize("route", ["a copy of the adapter", "the adapter switched off"])
def test_preferences_start_from_the_base(form: str, route: str, base: Base, tokenizer: Any, tmp_path: Path) -> None:
    """Both ways in which TRL finds a reference: for a model that comes with an adapter it adds a copy, "ref"; with
    `peft_config=` there is none, and it switches the adapter off."""
    run = dpo(wrapped(base(), form), tmp_path, tokenizer)
    if route == "a copy of the adapter":
        assert list(run.model.peft_config) == ["default", "ref"]
        assert not any(".ref." in name for name in trainable(run.model))
    else:
        run.model.delete_adapter("ref")

    reference = reference_of(run)
    with run.model.disable_adapter():
        assert torch.equal(reference, reference_of(run))
    if form == "implicit":
        alone = dpo(base(), tmp_path, tokenizer, ref_model=base())
        assert torch.equal(reference, torch.stack(alone.compute_ref_log_probs(alone.ref_model, batch_of(alone))))

    with unchanged(run.model):
        run.train()
    assert logged(run)[0] == torch.tensor(2.0).log().item()  # exactly: log-probabilities of equal bits
    assert logged(run)[0] == pytest.approx(math.log(2), rel=2**-24)
    assert logged(run, "rewards/margins")[0] == 0
    assert logged(run)[-1] < math.log(2)
    assert torch.equal(reference_of(run), reference)

    run.save_model(tmp_path / "end")
    again = PissaModel.from_pretrained(base(), tmp_path / "end")
    ids = batch_of(run)["input_ids"]
    assert torch.equal(logits(again, ids), logits(without_autocast(run), ids))


KINDS: dict[str, dict[str, Any]] = {
    **FORMS,
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True},
    "adalora": {"use_adalora": True},
}
EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"]}
NOT_COPIED = pytest.mark.xfail(reason="TRL copies parameters named *.default.*; embeddings' have none, PEFT's neither")


@pytest.mark.parametrize(
    "kind", [*each(KINDS, ["a head of its own"]), pytest.param("embedding", marks=[NOT_COPIED, pytest.mark.nightly])]
)
@pytest.mark.parametrize("from_folder", each([False, True], [True]))
def test_the_reference_of_a_trained_adapter_is_that_adapter(
    kind: str, from_folder: bool, base: Base, tokenizer: Any, tmp_path: Path
) -> None:
    model = pissa.wrap(base(), r=4, task_type="CAUSAL_LM", **KINDS.get(kind, EMBEDDING))
    sft(model, tmp_path, tokenizer, save_strategy="no").train()
    if from_folder:
        model.save_pretrained(tmp_path / "sft")
        model = PissaModel.from_pretrained(base(), tmp_path / "sft", is_trainable=True)
    run = dpo(model, tmp_path, tokenizer)
    start = reference_of(run)
    with run.model.disable_adapter():
        assert not torch.equal(start, reference_of(run))
    policy = dpo(base(), tmp_path, tokenizer, ref_model=base())  # to ask for the policy's own log-probabilities
    assert torch.equal(start, torch.stack(policy.compute_ref_log_probs(run.model, batch_of(run))))
    for layer in (module for module in run.model.modules() if isinstance(module, pissa.layers.PissaLinear)):
        assert layer.start_of("ref") is layer.start_of("default")

    with unchanged(run.model):
        run.train()
    assert logged(run)[0] == torch.tensor(2.0).log().item()
    assert torch.equal(reference_of(run), start)


@resumes_both
@forms
def test_interrupted_preferences_go_on(form: str, base: Base, tokenizer: Any, tmp_path: Path) -> None:
    whole = dpo(wrapped(base(), form), tmp_path / "whole", tokenizer)
    whole.train()
    resumed = dpo(wrapped(base(), form), tmp_path / "resumed", tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert logged(resumed) == logged(whole)
    assert_equal(state(resumed.model), state(whole.model))
    assert trainable(resumed.model) == trainable(whole.model)


@forms
def test_preferences_without_pairs(form: str, base: Base, tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    data = Dataset.from_list(
        [{"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"} for row in PREFERENCES
         for kind in ("chosen", "rejected")]
    )  # fmt: skip
    arguments = KTOConfig(**options(tmp_path))
    run = KTOTrainer(wrapped(base(), form), args=arguments, train_dataset=data, processing_class=tokenizer)
    with unchanged(run.model):
        run.train()
    assert logged(run)[0] == 0.5  # 1 - sigmoid(0)
    assert logged(run, "kl")[0] == 0
    assert logged(run)[-1] < 0.5


@forms
def test_a_reward_model(form: str, folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    def base() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the head is new
            return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)

    def trainer(model: nn.Module) -> Any:
        data = Dataset.from_list(PREFERENCES)
        arguments = RewardConfig(**options(tmp_path))
        return RewardTrainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)

    run = trainer(pissa.wrap(base(), r=4, task_type="SEQ_CLS", **FORMS[form]))
    start = loss_of(run)
    if form == "implicit":
        assert start == loss_of(trainer(base()))
    with unchanged(run.model):
        run.train()
    assert loss_of(run) < start
    again = PissaModel.from_pretrained(base(), tmp_path / "checkpoint-6", is_trainable=True)
    assert loss_of(trainer(again)) == loss_of(run)


# -- rewards


def digits(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward: the share of digits in what was generated."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def rewarded(method: str, model: nn.Module, folder: Path, tokenizer: Any, beta: float) -> Any:
    import trl
    from datasets import Dataset

    sampling = {"num_generations": 4, "max_completion_length": 6, "beta": beta}
    arguments = getattr(trl, f"{method}Config")(**options(folder, **sampling))
    data = Dataset.from_list([{"prompt": row["prompt"]} for row in SUMS])
    trainer = getattr(trl, f"{method}Trainer")
    return trainer(model, digits, arguments, train_dataset=data, processing_class=tokenizer)


@forms
@pytest.mark.filterwarnings("ignore::pissa.notices.RewardsWarning")
@pytest.mark.parametrize(
    ("method", "beta"),
    [
        pytest.param("GRPO", 0.0, marks=pytest.mark.nightly),
        pytest.param("GRPO", 0.1, marks=resumes_both),
        pytest.param("RLOO", 0.1, marks=[resumes_both, pytest.mark.nightly]),
    ],
)
def test_rewards(form: str, method: str, beta: float, base: Base, tokenizer: Any, tmp_path: Path) -> None:
    run = rewarded(method, wrapped(base(), form), tmp_path / "whole", tokenizer, beta)
    with unchanged(run.model):
        run.train()
    if beta:
        assert list(run.model.peft_config) == ["default", "ref"]
        assert logged(run, "kl")[0] == 0
        assert logged(run, "kl")[-1] != 0

    resumed = rewarded(method, wrapped(base(), form), tmp_path / "resumed", tokenizer, beta)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert logged(resumed, "reward") == logged(run, "reward")
    assert_equal(state(resumed.model), state(run.model))

    again = PissaModel.from_pretrained(base(), tmp_path / "whole" / "checkpoint-6")
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(logits(again, ids), logits(without_autocast(run), ids))


REWARDS_WARNING = r'Reinforcement learning with init="pissa".*2512\.23165.*pissa\.wrap\(model, preset="rl", r=16\)'


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_rewards_from_pissas_start_are_warned_of_once(method: str, base: Base, tokenizer: Any, tmp_path: Path) -> None:
    model = wrapped(base(), "implicit")
    with pytest.warns(pissa.notices.RewardsWarning, match=REWARDS_WARNING) as caught:
        rewarded(method, model, tmp_path, tokenizer, 0.0)
    (warning,) = (found for found in caught if found.category is pissa.notices.RewardsWarning)
    assert warning.filename == __file__  # the line that makes the trainer
    model.add_model_tags(["trl", method.lower()])  # again, it would be an error
    assert model.base_model.model.model_tags == ["trl", method.lower()]


@pytest.mark.parametrize("fields", [{"init": "lora"}, {"preset": "rl"}, {"preset": "rl", "repair": "pissa"}])
def test_rewards_from_loras_start_are_not(fields: dict[str, Any], base: Base, tokenizer: Any, tmp_path: Path) -> None:
    form = "nf4" if "repair" in fields else "implicit"
    rewarded("GRPO", wrapped(base(), form, **fields), tmp_path, tokenizer, 0.0)  # a warning would be an error
    sft(wrapped(base(), form, **fields), tmp_path, tokenizer)


def test_other_trainers_are_not_warned(base: Base, tokenizer: Any, tmp_path: Path) -> None:
    sft(wrapped(base(), "implicit"), tmp_path, tokenizer)
    dpo(wrapped(base(), "implicit"), tmp_path, tokenizer)
