"""Training steps on a CPU: a causal language model's loss from its hidden states, without logits in memory."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from pissa import ops
from pissa.base.classes import evaluation_mode, frozen_product
from pissa.base.forwards import computes_steps, replace_forward
from pissa.base.lazy_tensor import LazyTensor
from pissa.distributed import is_sharded
from pissa.ops import TokenScores
from pissa.ops._scores import IGNORED


@dataclass
class ScoredOutput(CausalLMOutputWithPast):  # type: ignore[misc]
    """The output for labels in training mode. `logits` are computed when they are read. The fields between `log_probs`
    and `label_mask` are those of `ops.TokenScores` for the next tokens, [batch, length - 1], or, for shift_labels,
    [batch, length]."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    """Whether a label is counted, that is, not -100."""
    aux_loss: Tensor | None = None
    """None, as TRL's trainers require."""

    # TRL 1.14 reads these.
    num_correct_tokens = property(lambda self: self.is_top1.sum())
    entropy_sum = property(lambda self: self.entropy.sum())
    num_valid_tokens = property(lambda self: self.label_mask.sum())


def fuse_head(model: Any) -> None:
    """Makes an (unwrapped) causal language model of transformers compute its loss on a CPU, in training mode or for a
    trainer of TRL, without logits in memory, and without work for tokens whose label is -100. The loss is transformers'
    own, including `num_items_in_batch`. Its last digits differ, because logits are float32 sums and are not rounded to
    the model's dtype. `ops.token_scores` computes the loss; entropies have no gradient. `restore_forwards` undoes it.

    A call that needs more than a product with a frozen head is left to the model: if the head has an adapter, is
    trained, has hooks, is offloaded or is partitioned by DeepSpeed, or if more than loss and logits is requested. So
    are models that compute their loss or their logits in another way, for which a loss of nine tokens is computed in
    both ways at the first step, and models whose forward pass another library has replaced. TRL's head is the
    exception: `over_trls_head` puts this one over it.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or getattr(model, "loss_function", None) is not ForCausalLMLoss or model.config.is_encoder_decoder:
        return
    if "forward" in vars(model) and not _is_trls(model):
        return
    replaced: Any = model.forward
    own: Any = replaced.__func__  # a copy of the model calls it on itself
    always_asked = own.__name__ == _TRL_1_14

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        """`fused_lm_head` is the argument that TRL's trainers use."""
        find: Callable[[Tensor, Tensor], TokenScores]
        labels, shifted, items = (kwargs.get(key) for key in _OF_THE_LOSS)
        others = {key: value for key, value in kwargs.items() if key not in _OF_THE_LOSS}
        head: Any = self.get_output_embeddings()
        loss_alone = (labels is not None or shifted is not None) and not _asks_for_more(self, others)
        product = frozen_product(head) if loss_alone else None
        dense = product is not None and isinstance(product[0], Tensor)  # TRL's own reads the weight of any head as such
        shape, asked = None, fused_lm_head or always_asked
        # A trainer of TRL asks for a fused head in evaluation, too. Its own took 1.3 GiB more for batches of 8 x 400
        # tokens of SmolLM2, and 1.5 times as long; and references of DPO then round as the policy does.
        wanted = computes_steps(self) or (asked and not torch.compiler.is_compiling())
        if product is not None and head.weight.device.type == "cpu" and wanted:
            shape = _tried_shape(self, product)
        if product is not None and shape is not None:
            rows = _backbone(self)(*args, **(others | {"use_cache": False, "return_dict": True})).last_hidden_state
            logits, find = shape.logits(head, rows), functools.partial(shape.scores, product)
        elif loss_alone and asked and not dense:
            rows, logits, find = own(self, *args, **others).logits, None, _scores_of_logits
        else:
            return own(self, *args, **kwargs, **({"fused_lm_head": True} if fused_lm_head else {}))
        if shifted is None:
            rows, labels = rows[:, :-1], kwargs["labels"][:, 1:]
        else:
            labels = shifted
        labels = labels.to(rows.device)
        scores, mask = find(rows, labels), labels != IGNORED
        count = mask.sum() if items is None else torch.as_tensor(items, device=rows.device)
        return ScoredOutput(-scores.log_probs.sum() / count, logits, label_mask=mask, **scores._asdict())

    forward.__dict__[_OURS] = True
    replace_forward(model, forward, "head")


def over_trls_head(peft_model: Any, _: Any) -> None:
    """A hook of a PissaModel: puts its head over one that a trainer of TRL has put over it."""
    if torch.compiler.is_compiling():
        return
    model = peft_model.get_base_model()
    if _is_trls(model):
        fuse_head(model)


_OURS = "_pissas_head"
_TRL_1_14 = "_chunked_ce_forward"
"""The name of the forward pass of TRL 1.14, the last for Python 3.10, which no argument asks for."""


def _is_trls(model: Any) -> bool:
    """Whether a model's forward pass is TRL's, without a temperature, over ours or the model's own."""
    trls = getattr(model.forward, "__func__", None)
    if trls is None or hasattr(trls, _OURS):
        return False
    names = inspect.getclosurevars(trls).nonlocals
    former = getattr(names.get("original_forward"), "__func__", None)
    plain = names.get("temperature") == 1.0 and not names.get("cast_lm_head_to_fp32", False)
    return (plain or trls.__name__ == _TRL_1_14) and (hasattr(former, _OURS) or former is type(model).forward)


_Product = tuple[Tensor | ops.QuantizedWeight, Tensor | None]
"""Weight and bias of a head."""
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


def _tried_shape(model: Any, product: _Product) -> _LogitsShape | None:
    """How a model computes logits; None if it computes them, or its loss, as its configuration does not describe, or
    holds only parts of its weights. It is tried once."""
    if "_fused_shape" not in vars(model):
        model._fused_shape = None
        with contextlib.suppress(Exception):  # a model that is not run as intended may raise anything
            if not any(map(is_sharded, model.parameters())):
                model._fused_shape = _try_shape(model, product)
    shape: _LogitsShape | None = model._fused_shape
    return shape


def _try_shape(model: Any, product: _Product) -> _LogitsShape | None:
    shape, (weight, _) = _LogitsShape.of(model), product
    ids = torch.arange(1, 10, device=weight.device)[None] % weight.shape[0]
    labels = ids.clone()
    labels[0, 4] = IGNORED
    with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng():
        expected = type(model).forward(model, input_ids=ids, labels=labels)  # without a head of TRL's or of ours
        hidden = _backbone(model)(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state[:, :-1]
        loss = -shape.scores(product, hidden, labels[:, 1:]).log_probs.sum() / 7
        size = 1 + float(expected.logits.abs().max())
        rounding = 2 * torch.finfo(expected.logits.dtype).eps + 1e-5  # of logits; and of sums, in different orders
        agrees = float((loss - expected.loss).abs()) <= size * rounding and shape.difference(model) <= 0
    return shape if agrees else None


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

    def difference(self, model: Any) -> float:
        """The difference between the model's logits and this, beyond rounding, for numbers from -60 to 60 instead of
        its head's output."""
        outputs: list[Tensor] = []

        def replace_output(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            outputs.append(torch.linspace(-60, 60, output.shape[-1], device=output.device).to(output.dtype))
            return outputs[0].expand_as(output)

        device = model.get_input_embeddings().weight.device
        handle = model.get_output_embeddings().register_forward_hook(replace_output)
        try:
            ids = torch.zeros(1, 1, dtype=torch.long, device=device)
            logits = model(input_ids=ids, use_cache=False, return_dict=True).logits
        finally:
            handle.remove()
        numbers = outputs[0].double() * self.scale
        expected = numbers if self.softcap is None else self.softcap * torch.tanh(numbers / self.softcap)
        rounding = 4 * torch.finfo(outputs[0].dtype).eps * expected.abs().clamp(min=1)
        return max(0.0, float(((logits[0, -1].double() - expected).abs() - rounding).max()))

    def logits(self, head: Any, hidden: Tensor) -> Tensor:
        """The logits of hidden states, which are computed when they are read, for a gradient or without one."""
        autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        @functools.cache
        def compute(with_gradient: bool) -> Tensor:
            with torch.set_grad_enabled(with_gradient), torch.autocast("cpu", dtype, autocast):
                logits: Tensor = self.scale * head(hidden)
                return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

        # accelerate's autocast casts a model's outputs to float32, which would read the logits.
        shown = torch.float32 if autocast else hidden.dtype
        shape = (*hidden.shape[:-1], head.weight.shape[0])
        return LazyTensor.of(shape, shown, hidden.device, lambda: compute(torch.is_grad_enabled()))

    def scores(self, product: _Product, hidden: Tensor, labels: Tensor) -> TokenScores:
        weight, bias = product
        return ops.token_scores(hidden, weight, labels, bias=bias, scale=self.scale, softcap=self.softcap)
