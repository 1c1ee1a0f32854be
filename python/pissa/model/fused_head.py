"""fuse_head: a causal language model's loss from its hidden states, without logits in memory."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from pissa import ops
from pissa.base.classes import evaluation_mode, frozen_product
from pissa.base.forwards import replace_forward
from pissa.distributed import is_partitioned
from pissa.ops import TokenScores
from pissa.ops._scores import IGNORED


@dataclass
class ScoredOutput(ModelOutput):  # type: ignore[misc]
    """The output for labels of a model with a fused head. The fields between `loss` and `label_mask` are those of
    `ops.TokenScores` for the next tokens, [batch, length - 1], or, for shift_labels, [batch, length]."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    """Whether a label is counted, that is, not -100."""
    logits: Tensor | None = None
    """None: no logits are computed."""
    aux_loss: Tensor | None = None
    """None, as TRL's trainers require."""


def fuse_head(model: nn.Module) -> None:
    """Makes the model compute its loss from labels without logits in memory, and without work for tokens whose label is
    -100::

        model = pissa.wrap(model, r=16)
        pissa.fuse_head(model)
        loss = model(input_ids=ids, labels=labels).loss  # model(...).logits is None then

        trainer = SFTTrainer(model, ...)  # or DPOTrainer, KTOTrainer, from TRL 1.15 on: each has a head of its own
        pissa.fuse_head(trainer.model)

    Calls without labels, generation, and evaluation without gradients work as before. The same holds, including logits,
    for a call that needs more than a product with a frozen head: if the head has an adapter, is trained, has hooks, is
    offloaded or is partitioned by DeepSpeed, or if more than the loss is requested. The loss is transformers' own,
    including `num_items_in_batch`. Its last digits differ, because logits are float32 sums and are not rounded to the
    model's dtype. `ops.token_scores` computes the loss; entropies have no gradient.

    Call this before FSDP shards the model, or in a trainer. The model computes a loss of nine tokens in both ways, to
    check that they agree. `unload` and `merge_and_unload` undo it.

    Args:
        model: a causal language model of transformers, or a PeftModel of one.

    Raises:
        TypeError: another kind of model.
        ValueError: the model computes its loss or its logits in another way, or TRL's head, which replaces its own, has
            a temperature.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    if head is None or not hasattr(inner, "loss_function") or inner.config.is_encoder_decoder:
        raise TypeError(f"model: got a {type(inner).__name__}; needed: a causal language model of transformers")
    name = type(inner).__name__
    if any(map(is_partitioned, inner.parameters())):
        raise ValueError(f"model: the weights of {name} are partitioned by DeepSpeed; needed: whole ones")
    if inner.loss_function is not ForCausalLMLoss:
        raise ValueError(f"model: {name} has a loss of its own; needed: transformers' for causal language models")
    replaced: Any = inner.forward
    own: Any = getattr(replaced, "__func__", None)  # a copy of the model calls it on itself
    own = own or (lambda _, *args, **kwargs: replaced(*args, **kwargs))
    trl = inspect.getclosurevars(own).nonlocals  # of the head of a trainer of TRL
    if trl.get("temperature", 1.0) != 1.0 or trl.get("cast_lm_head_to_fp32", False):
        raise ValueError("model: TRL's head of this trainer has a temperature, or casts to float32; needed: neither")
    shape = _LogitsShape.of(inner)

    @functools.wraps(type(inner).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        """`fused_lm_head` is the argument that TRL's trainers use."""
        labels, shifted, items = (kwargs.get(key) for key in _OF_THE_LOSS)
        others = {key: value for key, value in kwargs.items() if key not in _OF_THE_LOSS}
        loss_alone = (labels is not None or shifted is not None) and not _asks_for_more(self, others)
        head = frozen_product(self.get_output_embeddings())
        if not loss_alone or not (fused_lm_head or (head and (self.training or torch.is_grad_enabled()))):
            return own(self, *args, **kwargs, **({"fused_lm_head": True} if fused_lm_head else {}))
        if head is None:  # TRL's own way ignores an adapter of the head
            rows, find = own(self, *args, **others).logits, _scores_of_logits
        else:
            hidden = _backbone(self)(*args, **(others | {"use_cache": False, "return_dict": True})).last_hidden_state
            rows, find = hidden.to(self.get_output_embeddings().weight.device), functools.partial(shape.scores, *head)
        if shifted is None:
            rows, labels = rows[:, :-1], kwargs["labels"][:, 1:]
        else:
            labels = shifted
        labels = labels.to(rows.device)
        scores, mask = find(rows, labels), labels != IGNORED
        count = mask.sum() if items is None else torch.as_tensor(items, device=rows.device)
        return ScoredOutput(loss=-scores.log_probs.sum() / count, label_mask=mask, **scores._asdict())

    try:
        difference = max(shape.difference(inner, head), _difference(inner, forward))
    except Exception as error:  # a model that is not run as intended may raise anything
        raise ValueError(f"model: {name} cannot be tried with nine tokens: {type(error).__name__}: {error}") from error
    if not difference <= 0:
        raise ValueError(
            f"model: {name} computes its logits or its loss in a way that its configuration does not "
            f"describe: they differ by {difference:.1e}"
        )
    replace_forward(inner, forward)


_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch")


def _asks_for_more(model: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a call with these arguments, and labels, should return more than a loss."""
    routed = arguments.get("output_router_logits")
    if routed is None:
        configs = (model.config, model.config.get_text_config())
        routed = any(getattr(config, "output_router_logits", False) for config in configs)
    dicts = arguments.get("return_dict")
    tuples = not (getattr(model.config, "return_dict", True) if dicts is None else dicts)
    names = ("output_hidden_states", "output_attentions", "use_cache", "logits_to_keep", "ignore_index")
    states = any(getattr(model.config, name, False) for name in names[:2])
    return bool(routed or tuples or states or any(arguments.get(name) for name in names))


def _backbone(model: Any) -> nn.Module:
    """The model without its head. Llama 4's text model names itself as its base model."""
    backbone: nn.Module = model.base_model
    if backbone is model:
        backbone = next(child for child in model.children() if isinstance(child, PreTrainedModel))
    return backbone


def _difference(model: Any, fused: Callable[..., Any]) -> float:
    """The difference of the two losses of nine tokens beyond the rounding of logits."""
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(1, 10, device=device)[None] % model.get_input_embeddings().weight.shape[0]
    labels = ids.clone()
    labels[0, 4] = IGNORED
    with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng():
        expected = model(input_ids=ids, labels=labels)
        with torch.enable_grad():
            loss = fused(model, input_ids=ids, labels=labels).loss.detach()
    if frozen_product(model.get_output_embeddings()) is None:
        return 0.0  # the model's own way
    size = 1 + float(expected.logits.abs().max())
    rounding = 2 * torch.finfo(expected.logits.dtype).eps + 1e-5  # of logits; and of sums, which have different orders
    return float((loss - expected.loss).abs()) - size * rounding


def _scores_of_logits(logits: Tensor, labels: Tensor) -> TokenScores:
    counted = labels != IGNORED
    logits = logits.float()
    all_log_probs = torch.log_softmax(logits, -1)
    log_probs = all_log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    with torch.no_grad():
        entropy = -(all_log_probs.exp() * all_log_probs).sum(-1)
        is_top1 = log_probs >= all_log_probs.amax(-1)
        others = (entropy, (2 * all_log_probs).logsumexp(-1), logits.mean(-1), is_top1)
    return TokenScores(*(score.masked_fill(~counted, 0) for score in (log_probs, *others)))


class _LogitsShape(NamedTuple):
    """How a model computes logits from its head's output: `scale` times it, bounded by `softcap`."""

    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any) -> _LogitsShape:
        """According to the configuration, where each family uses its own names."""
        config = model.config.get_text_config()
        divisor = getattr(config, "logits_scaling", None)
        if divisor is not None and config.model_type != "hyperclovax":
            divisor = 1 / divisor
        names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
        scales = [getattr(config, name, None) for name in names]
        scale = next((value for value in (*scales, divisor) if value is not None), 1.0)
        return cls(float(scale), getattr(config, "final_logit_softcapping", None))

    def difference(self, model: Any, head: nn.Module) -> float:
        """The difference between the model's logits and this, beyond rounding, for numbers from -60 to 60 instead of
        its head's output."""
        outputs: list[Tensor] = []

        def replace_output(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            outputs.append(torch.linspace(-60, 60, output.shape[-1], device=output.device).to(output.dtype))
            return outputs[0].expand_as(output)

        device = model.get_input_embeddings().weight.device
        handle = head.register_forward_hook(replace_output)
        try:
            with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng():
                ids = torch.zeros(1, 1, dtype=torch.long, device=device)
                logits = model(input_ids=ids, use_cache=False, return_dict=True).logits
        finally:
            handle.remove()
        numbers = outputs[0].double() * self.scale
        expected = numbers if self.softcap is None else self.softcap * torch.tanh(numbers / self.softcap)
        rounding = 4 * torch.finfo(outputs[0].dtype).eps * expected.abs().clamp(min=1)
        return max(0.0, float(((logits[0, -1].double() - expected).abs() - rounding).max()))

    def scores(
        self, weight: Tensor | ops.QuantizedWeight, bias: Tensor | None, hidden: Tensor, labels: Tensor
    ) -> TokenScores:
        return ops.token_scores(hidden, weight, labels, bias=bias, scale=self.scale, softcap=self.softcap)
