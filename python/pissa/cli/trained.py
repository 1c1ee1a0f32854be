"""A trained model: its base with its adapter, whichever programs wrote them, or a model of its own."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM

from pissa.adapters.lora_folder import LoraFolder, open_adapter
from pissa.adapters.pissa_layout import ADAPTER_FILES
from pissa.checkpoints.load import load
from pissa.cli.terminal import UserError, print_row, user_errors
from pissa.containers.checkpoint import AS_STORED, Contents, ModelFolder
from pissa.containers.hub import Name, adapter_folder
from pissa.containers.messages import CodeError
from pissa.containers.model_folder import class_of
from pissa.containers.recognise import has_adapter
from pissa.model.pissa_model import PissaModel


def open_trained(args: Namespace, is_compared: bool = False) -> tuple[Any, Any]:
    """Loads the model that `args.source` is, or its adapter on its base, and the tokenizer. Prints which.

    Args:
        args: with what `add_arguments` of `pissa chat` adds for a model.
        is_compared: the adapter must be one that can be disabled to get its base.
    """
    with user_errors(OSError, ValueError):
        folder = adapter_folder(args.source, ADAPTER_FILES)
        lora = open_adapter(folder) if has_adapter(folder) else None
    if lora is None and (is_compared or args.base):
        option = "--compare" if is_compared else "--base"
        raise UserError(f"{option}: {args.source} has no adapter; give a run or an adapter, or leave {option} out")
    base = args.source if lora is None else base_of(lora, args.source, args.base)
    hint = "; give the model that the adapter was trained on: --base DIR_OR_NAME [P112]"
    if lora is None:
        hint = "; there is no adapter either: a run that has not ended has it in its last checkpoint-N [P113]"
    with user_errors(OSError, ValueError, after=hint):
        opened = ModelFolder.open(base, config_from=args.config_from)
    if is_compared and lora is not None:
        check_has_base("--compare", lora, opened)
    with user_errors(OSError, ValueError, KeyError, TypeError, RuntimeError, before=f"{args.source}: "):
        if lora is None:
            opened.require(*(contents for contents in Contents if contents is not Contents.PEFT_RESIDUAL))
        trusted = {"trust_remote_code": args.trust_remote_code}
        model = load_trained(base, opened, lora, args.config_from, **trusted)
        tokenizer = opened.tokenizer(None if lora is None else args.source, **trusted)
    print_row("model", f"{base}, {model.dtype}".replace("torch.", "") + (f", with {args.source}" if lora else ""))
    return model, tokenizer


def base_of(lora: LoraFolder, source: Name, given: str | None) -> str:
    """The model of an adapter that was given as `source`: the one given by --base, or the one that it names."""
    if (base := given or lora.named_base) is None:
        raise UserError(f"{source} names no base; give the model it was trained on: --base DIR_OR_NAME [P112]")
    return base


def check_has_base(option: str, lora: LoraFolder, base: ModelFolder) -> None:
    """Refuses to compare with the base where disabling the adapter leaves a residual."""
    is_residual = base.contents in (Contents.RESIDUAL, Contents.PEFT_RESIDUAL)
    if lora.ours is None and (is_residual or not lora.leaves_base):
        raise UserError(
            f"{option}: {lora.path} was trained on a residual, which is not the base; run pissa convert first [P114]"
        )


def _is_code(opened: ModelFolder) -> bool:
    try:
        opened.check_no_code()
    except CodeError:
        return True
    return False


def load_trained(
    base: Name,
    opened: ModelFolder,
    lora: LoraFolder | None,
    config_from: Name | None = None,
    *,
    trust_remote_code: bool = False,
) -> Any:
    """The model called `base`, which has been opened, with an adapter on it or alone; to be asked, not trained. Code
    that comes with the model is only run if it is trusted."""
    if trust_remote_code and _is_code(opened):
        own: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto", trust_remote_code=True)
        if lora is None:
            return own
        return (PeftModel if lora.ours is None else PissaModel).from_pretrained(own, lora.path)
    if lora is not None and lora.ours is not None:
        return load(base, adapter=lora.path, is_trainable=False, config_from=config_from)
    if opened.contents in AS_STORED:  # which transformers would expand
        model: Any = load(base, init="lora", r=1, is_trainable=False, config_from=config_from)
        if lora is not None:
            model.load_adapter(lora.path, "trained")
            model.set_adapter("trained")
        return model
    if opened.contents is Contents.RESIDUAL and lora is None:
        return load(base, is_trainable=False)
    model = class_of(opened.built_config()).from_pretrained(base, dtype="auto")
    return model if lora is None else PeftModel.from_pretrained(model, lora.path)
