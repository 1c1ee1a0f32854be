"""Rows about a whole language model, SmolLM2-135M: a training step, and wrapping."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import pissa
from bench.checkpoints.generate import SHAPES
from bench.compare.gguf_blocks import random_blocks, weight_of
from bench.compare.interleave import Case, Row, agree, relative_error, require
from bench.compare.peers import lora_layers, lora_on_dense, lora_on_nf4
from bench.compare.records import missing
from bench.compare.weights import energy, language_model
from pissa.base.weights import CodedLinear
from pissa.layers.layer import pissa_layers

R = 16
BATCH, LONG = (4, 128), (1, 2048)
# Both sides round every operation to bfloat16, 2^-9, some 600 of them one after the other (30 layers of 20). As a
# random walk that is 5% of an activation or a gradient; a loss, the mean of 508 tokens' losses, moves far less. For
# both sides, twice that, and once more for bitsandbytes on a CPU with AVX512_BF16: over a random Llama of two layers
# its gradient is 14% from that in float32, ours 0.8%. A wrong gradient is off by about 1.
GRADIENT_BOUND = 0.2
LOSS_BOUND = 0.01

_ADAPTERS = {"default": ("float32", torch.float32), "tuned": ("bfloat16", torch.bfloat16)}
# The fastest on processors that multiply bfloat16 more slowly than float32.
_IN_FLOAT32 = "PEFT + bitsandbytes, float32 throughout"
_PEERS_OF_NF4 = (
    (f"PEFT + bitsandbytes, {_ADAPTERS['tuned'][0]} adapters", torch.bfloat16),
    (_IN_FLOAT32, torch.float32),
)


def model_rows(tiny: bool) -> Iterator[Row]:
    for setting, goal in (("default", 1.6), ("tuned", 1.35)):
        name, dtype = _ADAPTERS[setting]
        yield Row(
            f"training step of SmolLM2-135M, nf4, r = {R}",
            f"PEFT + bitsandbytes, {name} adapters",
            partial(_step, tiny, "nf4", dtype),
            goal,
            setting=setting,
            memory=True,
        )
    yield Row(
        f"training step of SmolLM2-135M, nf4, r = {R}",
        _IN_FLOAT32,
        partial(_step, tiny, "nf4", torch.float32, torch.float32),
        1.35,
        setting="tuned",
        memory=True,
    )
    for against, dtype in _PEERS_OF_NF4:
        yield Row(
            f"training step of SmolLM2-135M on a row of {LONG[1]:,} tokens, nf4, r = {R}",
            against,
            partial(_step, tiny, "nf4", dtype, dtype, (1, 256) if tiny else LONG),
            1.5,
            setting="tuned",
            max_pairs=5,
            memory=True,
        )
    for setting, goal in (("default", None), ("tuned", 1.25)):
        name, dtype = _ADAPTERS[setting]
        yield Row(
            f"training step of SmolLM2-135M, bfloat16, implicit residual, r = {R}",
            f"PEFT LoRA, {name} adapters",
            partial(_step, tiny, None, dtype),
            goal,
            setting=setting,
            memory=True,
        )
    for against, dtype in _PEERS_OF_NF4:
        yield Row(
            f"training step of Llama-3.2-1B's shape, nf4, r = {R}",
            against,
            partial(_step_of_shape, "tiny" if tiny else "1b", dtype),
            1.35,
            setting="tuned",
            max_pairs=5,
            memory=True,
        )
    for model, build in (
        ("SmolLM2-135M", partial(_token, partial(language_model, tiny, torch.bfloat16))),
        ("Llama-3.2-1B's shape", partial(_token, partial(_random_llama, "tiny" if tiny else "1b"))),
    ):
        against = "PEFT + bitsandbytes in eval mode"
        yield Row(f"a decoded token of {model}, nf4, r = {R}", against, build, setting="tuned")
    yield Row(
        f"a decoded token of Llama-3.2-1B's shape, q4_k, r = {R}",
        "PEFT + bitsandbytes' nf4 in eval mode",
        partial(_token_of_blocks, "100m" if tiny else "1b"),
        setting="tuned",
    )
    yield Row(
        f"wrapping SmolLM2-135M, float32, r = {R}",
        "PEFT, pissa_niter_16",
        partial(_wrapping, tiny),
        5.0,
        memory=True,
    )
    yield Row(
        f"wrapping layers of Llama-7B's shapes, bfloat16, nf4, r = {R}",
        "pissa, implicit residual",
        partial(_wrapping_in_nf4, tiny),
        round(1 / 1.4, 2),
    )


def _step(
    tiny: bool,
    quant: str | None,
    dtype: torch.dtype,
    peer_dtype: torch.dtype = torch.bfloat16,
    batch: tuple[int, int] = BATCH,
) -> Case:
    return step_case(language_model(tiny, torch.bfloat16), quant, dtype, peer_dtype, batch)


def _step_of_shape(shape: str, dtype: torch.dtype) -> Case:
    model = _random_llama(shape).train()
    model.config.use_cache = False
    return step_case(model, "nf4", dtype, dtype)


def _random_llama(shape: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).to(torch.bfloat16)


def _token(make: Callable[[], nn.Module]) -> Case:
    """A token after 64 others, whose keys and values are kept."""
    base = make()
    model = pissa.wrap(copy.deepcopy(base), r=R, quant="nf4", task_type="CAUSAL_LM", progressbar=False).eval()
    ours, theirs = _decoder(model), _decoder(same_in_nf4(model, base, torch.bfloat16).eval())
    return Case(ours, theirs, lambda: agree(GRADIENT_BOUND, logits=(ours(), theirs())))


def _token_of_blocks(shape: str) -> Case:
    """The same of a model whose linear layers are random blocks of Q4_K, beside one of the same shapes in nf4."""
    model = pissa.wrap(_random_llama(shape), r=R, init="lora", task_type="CAUSAL_LM", progressbar=False).eval()
    for layer in pissa_layers(model.base_model.model).values():
        layer.base_layer = CodedLinear(weight_of(random_blocks("q4_k", *layer.matrix_shape), "q4_k"), layer.base.bias)
    base = _random_llama(shape)
    start = pissa.wrap(copy.deepcopy(base), r=R, quant="nf4", task_type="CAUSAL_LM", progressbar=False)
    ours, theirs = _decoder(model), _decoder(same_in_nf4(start, base, torch.bfloat16).eval())

    def check() -> str:
        require(bool(ours().isfinite().all()), "logits are not finite")
        return "other weights"

    return Case(ours, theirs, check)


@torch.no_grad()
def _decoder(side: nn.Module) -> Callable[[], Tensor]:
    tokens = torch.randint(side.config.vocab_size, (1, 65), generator=torch.Generator().manual_seed(0))
    cache = side(input_ids=tokens[:, :-1], use_cache=True).past_key_values

    @torch.no_grad()
    def decode() -> Tensor:
        logits = side(input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return decode


class Trainer:
    """A model with its optimizer and one batch."""

    def __init__(self, model: nn.Module, batch: tuple[int, int]) -> None:
        self.model = model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # A small rate: dozens of steps on one batch must not take the two models apart.
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)
        vocabulary = model.get_input_embeddings().num_embeddings
        tokens = torch.randint(vocabulary, batch, generator=torch.Generator().manual_seed(0))
        self.tokens = tokens.to(self.trained[0].device)
        self.labels = self.tokens.clone()
        self.labels[:, : batch[1] // 2] = -100  # of prompts

    def loss(self) -> Tensor:
        return self.model(input_ids=self.tokens, labels=self.labels).loss

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def first(self) -> tuple[float, Tensor]:
        """The first loss, and its gradient for all adapters in one vector."""
        loss = self.loss()
        gradients = torch.autograd.grad(loss, self.trained, allow_unused=True)
        require(all(g is not None for g in gradients), "an adapter gets no gradient")
        return loss.item(), torch.cat([g.float().flatten() for g in gradients])


def training_case(
    model: nn.Module, peer: nn.Module, compared: str, same_gradient: bool, batch: tuple[int, int] = BATCH
) -> Case:
    ours, theirs = Trainer(model, batch), Trainer(peer, batch)

    def check() -> str:
        (mine, my_gradient), (other, other_gradient) = ours.first(), theirs.first()
        difference = abs(mine - other) / other
        require(difference <= LOSS_BOUND, f"first losses {mine:.4f} and {other:.4f}, allowed {LOSS_BOUND:.0%}")
        note = f"{compared}: first losses {mine:.4f} and {other:.4f}"
        if same_gradient:
            note += f", gradients {agree(GRADIENT_BOUND, gradient=(my_gradient, other_gradient))}"
        ours.step(), theirs.step()  # the optimizers allocate their state
        return note

    return Case(ours.step, theirs.step, check)


def step_case(
    base: nn.Module,
    quant: str | None,
    dtype: torch.dtype,
    peer_dtype: torch.dtype = torch.bfloat16,
    batch: tuple[int, int] = BATCH,
) -> Case:
    """Ours computes the peer's loss: both are the base, since ours changes nothing yet and LoRA has B = 0, or have the
    same residual and factors. Only then their gradients are equal. The peer has adapters in `dtype` and computes in
    `peer_dtype`."""
    model = pissa.wrap(copy.deepcopy(base), r=R, quant=quant, task_type="CAUSAL_LM", progressbar=False).train()
    if quant and (lacking := missing("bitsandbytes")):
        ours = Trainer(model, batch)
        return Case(ours.step, None, lambda: f"first loss {ours.first()[0]:.4f}", no_peer=lacking)
    if not quant:
        return training_case(
            model, lora_on_dense(base, R, dtype), "both are the base", same_gradient=False, batch=batch
        )
    peer = same_in_nf4(model, base.to(peer_dtype), dtype)
    return training_case(model, peer, "same residuals and factors", same_gradient=True, batch=batch)


def same_in_nf4(model: nn.Module, base: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The peer, made of the base: it gets our 4-bit residuals, byte for byte, and our start factors as its A and B."""
    layers = {
        name: (layer.base_layer.residual, layer.start_of("default").a0, layer.start_of("default").b0)
        for name, layer in pissa_layers(model.base_model.model, "default").items()
    }
    return lora_on_nf4(base, layers, dtype)


# ---- Wrapping --------------------------------------------------------------------------------------------------------


def _wrapping(tiny: bool) -> Case:
    base = language_model(tiny, torch.float32)
    peer = partial(lora_on_dense, r=R, dtype=torch.float32, init="pissa_niter_16")
    weights = {name: module.weight for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    tokens = torch.arange(64)[None]

    wrap = partial(pissa.wrap, r=R, task_type="CAUSAL_LM")

    def captured(rows_of: Callable[[str], Tensor], names: list[str]) -> float:
        return sum(energy(weights[name].detach(), rows_of(name).detach().mT) for name in names)

    torch.manual_seed(0)
    other = peer(copy.deepcopy(base))
    theirs = lora_layers(other)
    names = list(theirs)
    total = sum(weights[name].detach().double().square().sum().item() for name in names)
    lost = 1 - captured(lambda name: theirs[name].lora_A["default"].weight, names) / total

    @torch.no_grad()
    def check() -> str:
        ours, expected = wrap(copy.deepcopy(base)), base.eval()(tokens).logits
        layers = pissa_layers(ours.base_model.model, "default")
        require(layers.keys() == theirs.keys(), "the sides adapt different layers")
        found = 1 - captured(lambda name: layers[name].start_of("default").a0, names) / total
        note = f"ours leaves {found:.4f} of the weights' energy in the residuals, the peer {lost:.4f}"
        require(found <= lost + 1e-6, note)
        for side, model in (("ours", ours), ("PEFT's", other)):
            error = relative_error(model.eval()(tokens).logits, expected)
            # PEFT stores W - B A in float32, 2^-24 of W, and the layers amplify it: hundreds of times at most.
            require(error < 1e-4, f"{side} logits differ from the base's by {error:.1e} before training")
        return note

    return Case(wrap, peer, check, fresh=lambda: copy.deepcopy(base))


def _wrapping_in_nf4(tiny: bool) -> Case:
    """The cost of the residual in 4 bits. Both sides do the decomposition."""
    shapes = [(256, 256), (704, 256)] if tiny else [(4096, 4096), (11008, 4096)]
    base = nn.Sequential(*(nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16) for rows, columns in shapes))
    generator = torch.Generator().manual_seed(0)
    for layer in base:
        layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
    wrap = partial(pissa.wrap, r=R, target_modules=["0", "1"], progressbar=False)

    def check() -> str:
        model = wrap(copy.deepcopy(base), quant="nf4").base_model.model
        # Blocks of 64 normal numbers in NF4 are off by 9% of their length.
        return agree(0.12, **{f"layer {i}": (model[i].base.matrix(), base[i].weight) for i in range(len(base))})

    return Case(partial(wrap, quant="nf4"), wrap, check, fresh=lambda: copy.deepcopy(base))
