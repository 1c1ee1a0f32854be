"""The README's table of architectures: what works on each, found by running it.
`python tests/python/support/matrix.py` writes the table anew, and says what a "no" is about;
`test_matrix.py` compares it with what it finds."""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import architecture_checks as checks
import trainers
from architectures import ARCHITECTURES, VOCABULARY, Architecture
from processes import launch

README = Path(__file__).parents[3] / "README.md"
BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"

TITLES = {
    "llama2": "Llama 2",
    "llama3": "Llama 3",
    "mistral": "Mistral",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "yi": "Yi",
    "phi3": "Phi-3",
    "mixtral": "Mixtral",
    "mixtral, experts of linear layers": "Mixtral, experts as linear layers",
    "deepseek_v2": "DeepSeek-V2, MoE",
    "deepseek_v3": "DeepSeek-V3, MoE",
    "gpt_oss": "GPT-OSS",
    "falcon": "Falcon",
    "gpt2": "GPT-2",
    "llama, embeddings targeted": "Llama, embeddings targeted",
    "t5": "T5",
    "bart": "BART",
    "roberta": "RoBERTa, classifier",
    "deberta_v3": "DeBERTa-v3, classifier",
    "vit": "ViT",
    "vit, patches targeted": "ViT, patch convolution targeted",
    "resnet": "ResNet",
}
COLUMNS = ("wrap", "nf4", "train", "save, reload", "merge", "DPO", "DDP", "FSDP2")
PASS, REFUSED, NO, NONE = "pass", "refused", "no", "-"

Row = dict[str, str]
Check = Callable[[], object]


def run(what: str, *steps: Check) -> str:
    """PASS, or NO with the reason on stderr."""
    for step in steps:
        try:
            step()
        except Exception as error:
            print(f"{what}: {type(error).__name__}: {error}", file=sys.stderr)
            return NO
    return PASS


def row(name: str, folder: Path) -> Row:
    """What works in one process."""
    architecture = ARCHITECTURES[name]
    on = lambda check, form, *more: partial(check, architecture, form, *more)  # noqa: E731
    form = {"quant": "nf4"}
    starts = (checks.check_start, checks.check_step_0, checks.check_disable_and_delete)
    trains = (checks.check_gradients, checks.check_training_step)
    save = partial(checks.check_save_and_reload, folder=folder / "dense")
    save_nf4 = partial(checks.check_save_and_reload, folder=folder / "nf4")
    found = {
        "wrap": run(f"{name}, wrap", *(on(check, {}) for check in starts)),
        "train": run(f"{name}, train", *(on(check, {}) for check in trains)),
        "save, reload": run(f"{name}, save, reload", on(save, {})),
        "merge": run(f"{name}, merge", on(checks.check_merge, {})),
        "DPO": run(f"{name}, DPO", partial(check_dpo, architecture, folder)) if architecture.is_causal else NONE,
    }
    if architecture.nf4_refused is None:
        in_four_bits = (*starts, *trains, save_nf4, checks.check_merge)
        found["nf4"] = run(f"{name}, nf4", *(on(check, form) for check in in_four_bits))
    else:
        refused = run(f"{name}, nf4", partial(checks.check_nf4_is_refused, architecture))
        found["nf4"] = REFUSED if refused == PASS else NO
    return found


# ---- Preferences -----------------------------------------------------------------------------------------------------


def tokenizer() -> Any:
    """Words w0, w1, ... as many as the models' vocabulary has room for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[pad]": 0, "[bos]": 1, "[eos]": 2, **{f"w{index}": index for index in range(3, VOCABULARY)}}
    fast = Tokenizer(models.WordLevel(words, unk_token="w3"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[pad]", bos_token="[bos]", eos_token="[eos]")


def check_dpo(architecture: Architecture, folder: Path) -> None:
    """A step of TRL's DPOTrainer: it starts where policy and reference are one, so that the loss is ln 2, moves the
    policy and leaves the reference, which is the base, where it was."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = [{"prompt": f"w{i} w{i + 1} ", "chosen": f"w{i + 2} w9", "rejected": f"w{i + 3}"} for i in range(5, 9)]
    options = trainers.options(folder, max_steps=1, bf16=False, gradient_checkpointing=False, save_strategy="no")
    options["router_aux_loss_coef"] = 0.0  # else the loss of routers comes on top
    model = checks.wrapped(architecture, {})
    batch = architecture.batch()
    base = checks.output(model, batch)
    trainer = DPOTrainer(
        model, args=DPOConfig(**options), train_dataset=Dataset.from_list(pairs), processing_class=tokenizer()
    )
    trainer.train()
    (loss,) = trainers.logged(trainer)
    assert abs(loss - math.log(2)) <= 2**-24, f"the loss is {loss}, not ln 2"
    assert trainers.logged(trainer, "rewards/chosen") == [0.0]
    model.eval()
    assert not torch.equal(checks.output(model, batch), base)
    model.set_adapter("ref")
    assert torch.equal(checks.output(model, batch), base)


# ---- Several processes -----------------------------------------------------------------------------------------------


def parallel(names: list[str], folder: Path) -> dict[str, Row]:
    """Columns of two processes, all architectures in one start of them."""
    launched = launch(2, "distributed_worker.py", "architectures", folder, *names)
    if launched.returncode != 0:
        raise RuntimeError(f"the two processes failed:\n{launched.stdout[-5000:]}")
    found: dict[str, dict[str, Any]] = json.loads((folder / "architectures-2-0.json").read_text())
    return {
        name: {
            column: cell(name, [found[f"{name}, {form}, {column.lower()}"] for form in ("dense", "nf4")])
            for column in ("DDP", "FSDP2")
        }
        for name in names
    }


def cell(name: str, results: list[dict[str, Any]]) -> str:
    """PASS where both forms of the base pass, or the one that is not refused."""
    verdicts = [result.get("value", result.get("error", "")) for result in results]
    wrong = [verdict for verdict in verdicts if not verdict.startswith((PASS, REFUSED))]
    for verdict in wrong:
        print(f"{name}: {verdict}", file=sys.stderr)
    return NO if wrong else PASS if PASS in verdicts else REFUSED


# ---- The table -------------------------------------------------------------------------------------------------------


def lines(rows: dict[str, Row]) -> Iterator[str]:
    yield f"| architecture | {' | '.join(COLUMNS)} |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for name, found in rows.items():
        star = "\\*" if ARCHITECTURES[name].paper else ""
        yield f"| {TITLES[name]}{star} | {' | '.join(found[column] for column in COLUMNS)} |"


def measured() -> str:
    """The table, between its marks."""
    names = list(ARCHITECTURES)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        several = parallel(names, folder)
        rows = {name: row(name, folder / str(index)) | several[name] for index, name in enumerate(names)}
    return "\n".join([BEGIN, "", *lines(rows), "", END])


def written() -> str:
    """The table in the README, between its marks."""
    found = re.search(f"{re.escape(BEGIN)}.*{re.escape(END)}", README.read_text(), flags=re.DOTALL)
    assert found, f"README.md has no {BEGIN} ... {END}"
    return found[0]


def main() -> None:
    warnings.simplefilter("ignore")
    table = measured()
    README.write_text(README.read_text().replace(written(), table))
    print(table)


if __name__ == "__main__":
    main()
