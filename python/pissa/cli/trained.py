"""A trained model: its base with its adapter, whichever programs wrote them, or a model of its own."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM

from pissa.adapters.lora_folder import LoraFolder
from pissa.checkpoints.load import load
from pissa.cli.terminal import UserError
from pissa.containers.checkpoint import AS_STORED, Contents, ModelFolder
from pissa.containers.hub import Name
from pissa.containers.messages import CodeError
from pissa.containers.model_folder import class_of
from pissa.model.pissa_model import PissaModel


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
