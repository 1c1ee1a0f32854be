"""What the tests of trainers share: short runs on the CPU, and what they log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from daily import each
from language_models import TWO_FORMS as FORMS
from language_models import assert_equal

forms = pytest.mark.parametrize("form", each(FORMS, ["implicit"]))

TERMS = 2 * 7 * 112 + 97
"""Of the sums on a path through `tiny_llama` and its loss: products of up to 112 terms, seven in each of two layers,
and 97 logits. In another order of summation the results differ by TERMS u, u = 2**-24 in float32."""

QUIET = (
    # An nf4 adapter says, when it is saved, what the plain LoRA beside it lacks.
    "ignore::pissa.notices.InexactLoraWarning",
    # transformers 5 has renamed gradient checkpointing to activation checkpointing, and calls itself by the old names.
    "ignore:`gradient_checkpointing.*is deprecated:FutureWarning",
)
quiet = pytest.mark.filterwarnings(*QUIET)

compiles = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",  # torch's own use of it
)


def options(folder: Path, **others: Any) -> dict[str, Any]:
    """Arguments of a run of 6 steps with a checkpoint after 3."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 11,
        **others,
    }


PREFERENCES = [{"prompt": f"{i}+{i}=", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1}."} for i in range(16)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "SFT": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PREFERENCES],
    "DPO": PREFERENCES,
    "KTO": [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
        for row in PREFERENCES
        for kind in ("chosen", "rejected")
    ],
    "Reward": PREFERENCES,
    "GRPO": [{"prompt": row["prompt"]} for row in PREFERENCES],
    "RLOO": [{"prompt": row["prompt"]} for row in PREFERENCES],
}
"""The data of each method of TRL."""


def digits(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward: the share of digits in what was generated."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def trl_trainer(method: str, model: nn.Module, folder: Path, tokenizer: Any, **others: Any) -> Any:
    """The trainer of a method of TRL, with `peft_config` and `ref_model` if `others`, its options, has them."""
    import trl
    from datasets import Dataset

    given = {name: others.pop(name) for name in ("peft_config", "ref_model") if name in others}
    data = Dataset.from_list(ROWS[method])
    if method in ("GRPO", "RLOO"):
        given["reward_funcs"] = digits
        others = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1} | others
    else:
        given["eval_dataset"] = data
    arguments = getattr(trl, f"{method}Config")(**options(folder, **others))
    kind = getattr(trl, f"{method}Trainer")
    return kind(model, args=arguments, train_dataset=data, processing_class=tokenizer, **given)


def logged(run: Any, key: str = "loss") -> list[float]:
    """What a trainer has logged under `key`, step by step."""
    return [entry[key] for entry in run.state.log_history if key in entry]


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def trainable(model: nn.Module) -> list[str]:
    """Names of the parameters that are trained."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The block trains what is trainable, and leaves all else: the base, start factors, other adapters."""
    before, trained = state(model), trainable(model)
    assert all(".default" in name for name in trained)  # the adapter's
    yield
    assert trainable(model) == trained
    after = state(model)
    assert before.keys() == after.keys()
    assert_equal(*({name: t for name, t in tensors.items() if name not in trained} for tensors in (before, after)))
    moved = [name for name in trained if not torch.equal(before[name], after[name])]
    assert moved
