"""Writes bench/situations.md: what PEFT's PiSSA and pissa do in twenty-one situations. Both are run here.

    python docs/situations.py            # writes the page
    python docs/situations.py --check    # only runs both sides

Exit status 1: PEFT's side has been fixed, or ours is wrong. The situation is named.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import gguf
import peft
import torch
import transformers
from accelerate import cpu_offload  # noqa: F401  used in the code that is run, like the next two
from safetensors.torch import load_file  # noqa: F401
from torch import Tensor, nn

import pissa  # noqa: F401

PAGE = Path(__file__).parents[1] / "bench" / "situations.md"
TOKENS = torch.arange(24).reshape(2, 12)


def base(dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    """A Llama with two layers, the same at each call."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **heads, **fields})).to(dtype).eval()


def mixture() -> nn.Module:
    """A Mixtral with four experts, which transformers keeps in one parameter."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).eval()


def convolution() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3))


def in_4_bits(storage: torch.dtype = torch.uint8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(bnb.nn.Linear4bit(64, 32, quant_type="nf4", quant_storage=storage)).to("cpu")


def from_gguf() -> nn.Module:
    """A Llama as transformers loads it from a .gguf file: dense, and marked as quantised."""
    model = base()
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter("model.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, value in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight",)), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return transformers.AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", dtype=torch.float32)


def trainer(model: nn.Module) -> transformers.Trainer:
    data = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}]
    options = transformers.TrainingArguments("out", max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    return transformers.Trainer(model, options, train_dataset=data)


def lora(**fields: Any) -> peft.LoraConfig:
    """PEFT's configuration of PiSSA."""
    more = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": "pissa"}
    return peft.LoraConfig(**{**more, **fields})


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits.float()


def error(found: Tensor, expected: Tensor) -> float:
    """The relative error, in the Frobenius norm."""
    return ((found - expected).norm() / expected.norm()).item()


def train(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# Both sides end with an expression: a numerical error, whether something holds, or a text for the page.
Outcome = float | bool | str | Exception


def is_wrong(outcome: Outcome) -> bool:
    if isinstance(outcome, Exception):
        return True
    return not outcome if isinstance(outcome, bool) else isinstance(outcome, float) and outcome > 1e-3


def is_right(outcome: Outcome) -> bool:
    if isinstance(outcome, Exception):
        return False
    return outcome if isinstance(outcome, bool) else isinstance(outcome, str) or outcome < 1e-5


@dataclass(frozen=True)
class Situation:
    title: str
    what: str
    """What the last line of both sides shows."""
    theirs: str
    ours: str
    wrong: Callable[[Outcome], bool] = is_wrong
    right: Callable[[Outcome], bool] = is_right


def _refused(outcome: Outcome) -> bool:
    """Whether an error that names the layer was raised."""
    return isinstance(outcome, (ValueError, TypeError)) and "model.layers" in str(outcome)


SITUATIONS = (
    Situation(
        "An adapter is loaded after another seed",
        "is the relative error of the logits after reloading",
        """
        model = peft.get_peft_model(base(), lora(init_lora_weights="pissa_niter_4"))
        train(model)
        model.save_pretrained("saved")
        other = base()
        torch.manual_seed(1)
        error(logits(peft.PeftModel.from_pretrained(other, "saved")), logits(model))
        """,
        """
        model = pissa.wrap(base(), r=4)
        train(model)
        model.save_pretrained("saved")
        other = base()
        torch.manual_seed(1)
        error(logits(pissa.PissaModel.from_pretrained(other, "saved")), logits(model))
        """,
    ),
    Situation(
        "The adapter is disabled, or unloaded",
        "is the error of the logits against the base's",
        """
        model = peft.get_peft_model(base(), lora())
        error(logits(model.unload()), logits(base()))
        """,
        """
        model = pissa.wrap(base(), r=4)
        error(logits(model.unload()), logits(base()))
        """,
    ),
    Situation(
        "A second adapter is added",
        "is the error of the first adapter's logits",
        """
        model = peft.get_peft_model(base(), lora())
        first = logits(model)
        model.add_adapter("second", lora())
        error(logits(model), first)
        """,
        """
        model = pissa.wrap(base(), r=4)
        first = logits(model)
        model.add_adapter("second", pissa.PissaConfig(r=4))
        error(logits(model), first)
        """,
    ),
    Situation(
        "The model without its adapter is the reference of DPO, GRPO or KTO",
        "is the error of the reference against the policy, which are equal before the first step",
        """
        model = peft.get_peft_model(base(), lora())
        with model.disable_adapter():
            reference = logits(model)
        error(reference, logits(model))
        """,
        """
        model = pissa.wrap(base(), r=4)
        with model.disable_adapter():
            reference = logits(model)
        error(reference, logits(model))
        """,
    ),
    Situation(
        "The output layer is tied to the embeddings",
        "is the error of the embeddings",
        """
        model = peft.get_peft_model(base(tie_word_embeddings=True), lora(target_modules=["lm_head"]))
        error(model.get_input_embeddings().weight, base(tie_word_embeddings=True).get_input_embeddings().weight)
        """,
        """
        model = pissa.wrap(base(tie_word_embeddings=True), r=4, target_modules=["lm_head"])
        error(model.get_input_embeddings().weight, base(tie_word_embeddings=True).get_input_embeddings().weight)
        """,
    ),
    Situation(
        "The output layer is trained whole, and the adapter is converted to a plain LoRA",
        "is the error of the logits of the LoRA on the unmodified base",
        """
        model = peft.get_peft_model(base(), lora(modules_to_save=["lm_head"]))
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained("start")
        model.peft_config["default"].init_lora_weights = "pissa"
        train(model)
        model.save_pretrained("lora", path_initial_model_for_weight_conversion="start")
        error(logits(peft.PeftModel.from_pretrained(base(), "lora")), logits(model))
        """,
        """
        model = pissa.wrap(base(), r=4, modules_to_save=["lm_head"])
        train(model)
        model.save_pretrained("lora")
        error(logits(peft.PeftModel.from_pretrained(base(), "lora")), logits(model))
        """,
    ),
    Situation(
        "DoRA is converted to a plain LoRA",
        "says whether the folder has the trained magnitudes",
        """
        model = peft.get_peft_model(base(), lora(use_dora=True))
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained("start")
        model.peft_config["default"].init_lora_weights = "pissa"
        train(model)
        model.save_pretrained("lora", path_initial_model_for_weight_conversion="start")
        any("magnitude" in name for name in load_file("lora/adapter_model.safetensors"))
        """,
        """
        model = pissa.wrap(base(), r=4, use_dora=True)
        train(model)
        model.save_pretrained("lora")
        any("magnitude" in name for name in load_file("lora/adapter_model.safetensors"))
        """,
    ),
    Situation(
        "A mixture keeps its experts in one parameter",
        "is the error of the logits before the first step",
        """
        config = lora(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
        model = peft.get_peft_model(mixture(), config)
        error(logits(model), logits(mixture()))
        """,
        """
        model = pissa.wrap(mixture(), r=4)
        error(logits(model), logits(mixture()))
        """,
    ),
    Situation(
        "An embedding is adapted",
        "says whether it starts from principal components, and not from 0",
        """
        model = peft.get_peft_model(base(), lora(target_modules=["embed_tokens"]))
        bool(model.get_input_embeddings().lora_embedding_A["default"].any())
        """,
        """
        model = pissa.wrap(base(), r=4, target_modules=["embed_tokens"])
        bool(model.get_input_embeddings().start_of("default").a0.any())
        """,
    ),
    Situation(
        "A convolution is adapted",
        "says whether it is",
        """
        model = peft.get_peft_model(convolution(), lora(target_modules=["0"]))
        "0.lora_A.default.weight" in dict(model.base_model.model.named_parameters())
        """,
        """
        model = pissa.wrap(convolution(), r=4, target_modules=["0"])
        "0.lora_A.default.weight" in dict(model.base_model.model.named_parameters())
        """,
    ),
    Situation(
        "bitsandbytes has loaded the model in 4 bits",
        "says whether the layer is adapted",
        """
        model = peft.get_peft_model(in_4_bits(), lora(target_modules=["0"]))
        "0.lora_A.default.weight" in dict(model.base_model.model.named_parameters())
        """,
        """
        model = pissa.wrap(in_4_bits(), r=4, target_modules=["0"])
        "0.lora_A.default.weight" in dict(model.base_model.model.named_parameters())
        """,
    ),
    Situation(
        "The same, in the dtype that FSDP asks for",
        "says whether its start is finite",
        """
        model = peft.get_peft_model(in_4_bits(storage=torch.bfloat16), lora(target_modules=["0"]))
        model.base_model.model[0].lora_A["default"].weight.isfinite().all().item()
        """,
        """
        model = pissa.wrap(in_4_bits(storage=torch.bfloat16), r=4, target_modules=["0"])
        model.base_model.model[0].lora_A["default"].weight.isfinite().all().item()
        """,
    ),
    Situation(
        "A weight is on the meta device",
        "says what is printed",
        """
        peft.get_peft_model(base().to("meta"), lora())
        """,
        """
        pissa.wrap(base().to("meta"), r=4)
        """,
        wrong=lambda outcome: isinstance(outcome, Exception) and "model.layers" not in str(outcome),
        right=_refused,
    ),
    Situation(
        "accelerate has offloaded the model",
        "is the error of the logits before the first step",
        """
        model = peft.get_peft_model(cpu_offload(base()), lora())
        error(logits(model), logits(base()))
        """,
        """
        model = pissa.wrap(cpu_offload(base()), r=4)
        error(logits(model), logits(base()))
        """,
    ),
    Situation(
        "The model is in bfloat16",
        "is the error of the logits before the first step",
        """
        model = peft.get_peft_model(base(torch.bfloat16), lora())
        error(logits(model), logits(base(torch.bfloat16)))
        """,
        """
        model = pissa.wrap(base(torch.bfloat16), r=4)
        error(logits(model), logits(base(torch.bfloat16)))
        """,
    ),
    Situation(
        "Dropout is asked for",
        "is the error of the logits before the first step, in training mode",
        """
        model = peft.get_peft_model(base(), lora(lora_dropout=0.1)).train()
        error(logits(model), logits(base()))
        """,
        """
        model = pissa.wrap(base(), r=4, lora_dropout=0.1, fuse=False).train()
        error(logits(model), logits(base()))
        """,
    ),
    Situation(
        "The rank is larger than a layer",
        "says whether the factors have that rank",
        """
        model = peft.get_peft_model(base(), lora(r=33, target_modules=["k_proj"]))
        all(len(weight) == 33 for name, weight in model.named_parameters() if "lora_A" in name)
        """,
        """
        model = pissa.wrap(base(), r=33, target_modules=["k_proj"])
        all(len(weight) == 33 for name, weight in model.named_parameters() if "lora_A" in name)
        """,
        right=_refused,
    ),
    Situation(
        "A path ends with a slash",
        "is the error of the logits of the converted LoRA",
        """
        model = peft.get_peft_model(base(), lora())
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained("start/")
        model.peft_config["default"].init_lora_weights = "pissa"
        train(model)
        model.save_pretrained("lora/", path_initial_model_for_weight_conversion="start/")
        error(logits(peft.PeftModel.from_pretrained(base(), "lora/")), logits(model))
        """,
        """
        model = pissa.wrap(base(), r=4)
        train(model)
        model.save_pretrained("lora/")
        error(logits(peft.PeftModel.from_pretrained(base(), "lora/")), logits(model))
        """,
    ),
    Situation(
        "rsLoRA with ranks by layer is converted to a plain LoRA",
        "is the error of the logits of the LoRA on the unmodified base",
        """
        model = peft.get_peft_model(base(), lora(use_rslora=True, rank_pattern={"q_proj": 2}))
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained("start")
        model.peft_config["default"].init_lora_weights = "pissa"
        train(model)
        model.save_pretrained("lora", path_initial_model_for_weight_conversion="start")
        error(logits(peft.PeftModel.from_pretrained(base(), "lora")), logits(model))
        """,
        """
        model = pissa.wrap(base(), r=4, use_rslora=True, rank_pattern={"q_proj": 2})
        train(model)
        model.save_pretrained("lora")
        error(logits(peft.PeftModel.from_pretrained(base(), "lora")), logits(model))
        """,
    ),
    Situation(
        "An untrained adapter is merged in bfloat16",
        "says whether each weight is the base's",
        """
        model = peft.get_peft_model(base(torch.bfloat16), lora()).merge_and_unload()
        all(torch.equal(a, b) for a, b in zip(model.parameters(), base(torch.bfloat16).parameters()))
        """,
        """
        model = pissa.wrap(base(torch.bfloat16), r=4).merge_and_unload()
        all(torch.equal(a, b) for a, b in zip(model.parameters(), base(torch.bfloat16).parameters()))
        """,
    ),
    Situation(
        "The model comes from a GGUF file",
        "says whether Trainer has taken a step",
        """
        trainer(peft.get_peft_model(from_gguf(), lora())).train().global_step == 1
        """,
        """
        trainer(pissa.wrap(from_gguf(), r=4)).train().global_step == 1
        """,
    ),
)


@contextmanager
def _empty_folder() -> Iterator[None]:
    """Makes an empty folder the working directory."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def outcome_of(code: str) -> Outcome:
    """The value of the last line, or the exception that a line raises."""
    tree = ast.parse(textwrap.dedent(code))
    last = tree.body.pop()
    assert isinstance(last, ast.Expr)
    names = dict(globals())
    with _empty_folder():
        try:
            exec(compile(tree, "situation", "exec"), names)
            value = eval(compile(ast.Expression(last.value), "situation", "eval"), names)
        except Exception as raised:  # the page shows it
            return raised
    return value if isinstance(value, (float, bool, str)) else "no error"


def shown(outcome: Outcome) -> str:
    if isinstance(outcome, bool):
        return "yes" if outcome else "no"
    if isinstance(outcome, float):
        return "0, bit for bit" if outcome == 0 else f"{outcome:.2g}"
    if isinstance(outcome, Exception):
        text = " ".join(str(outcome).split())
        return f"{type(outcome).__name__}: {text if len(text) < 160 else text[:157] + '...'}"
    return outcome


def side(name: str, code: str, outcome: Outcome) -> list[str]:
    return [f"{name}:", "", "```py", textwrap.dedent(code).strip(), "```", "", "```text", shown(outcome), "```", ""]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = [
        "# Twenty-one situations",
        "",
        f"What PiSSA does in PEFT {peft.__version__}, and in pissa. `python docs/situations.py` runs both sides and",
        "writes this page; it fails once PEFT has fixed one of them. `base()` is a Llama of two layers, `mixture()` a",
        "Mixtral of four experts, `lora()` PEFT's `LoraConfig` with r = 4 and PiSSA as its start. `train` takes three",
        "steps. Errors are relative, in the Frobenius norm.",
        "",
        "In nineteen situations, pissa computes the right result. The other two, 13 and 17, ask for something",
        "impossible, and pissa raises an error that names the layer and what is allowed. Not all are serious: in 18,",
        "PEFT only refuses a path that ends with a slash.",
        "",
    ]
    failed = 0
    for number, situation in enumerate(SITUATIONS, 1):
        theirs, ours = outcome_of(situation.theirs), outcome_of(situation.ours)
        for name, holds, outcome in (
            ("PEFT has fixed it", situation.wrong(theirs), theirs),
            ("pissa is wrong", situation.right(ours), ours),
        ):
            if not holds:
                print(f"{number}. {situation.title}: {name}: {shown(outcome)}", file=sys.stderr)
                failed = 1
        lines += [f"## {number}. {situation.title}", "", f"The last line {situation.what}.", ""]
        lines += side(f"PEFT {peft.__version__}", situation.theirs, theirs) + side("pissa", situation.ours, ours)
    if not options.check and not failed:
        PAGE.write_text("\n".join(lines).rstrip() + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
