"""TRL's own weight sync: what its vLLM backend reads from our model makes, in an engine, the trained function. The
engine is a transformers model of the same class, which takes parameters by the names that it has itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixtures
import pissa
from daily import each
from language_models import logits
from oracle import change_all
from pissa import PissaModel
from tiny_model import save_tiny_model
from trainers import TERMS, assert_equal, logged, quiet, state, trl_trainer

pytestmark = [quiet, pytest.mark.filterwarnings("ignore::pissa.notices.AllLinearWarning")]


class Engine:
    """What TRL talks to in the place of its client for a vLLM server: weights in, completions out."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self.syncs = 0

    def __call__(self, **kwargs: Any) -> Engine:
        """In the place of VLLMClient's constructor."""
        return self

    def init_communicator(self, device: torch.device) -> None:
        pass

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    @torch.no_grad()
    def update_named_params(self, metadata: list[Any], named: Iterator[tuple[str, Tensor]]) -> None:
        self.syncs += 1
        parameters = dict(self.model.named_parameters())
        for (name, dtype, shape), (same, tensor) in zip(metadata, named, strict=True):
            assert (name, dtype, shape) == (same, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            parameters.pop(name).copy_(tensor)  # every name is known, and comes once
        assert not parameters  # nothing is missing

    def reset_prefix_cache(self) -> None:
        pass

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], n: int, max_tokens: int, **kwargs: Any) -> dict[str, Any]:
        """Samples, with the logarithm of each token's probability."""
        completions, scores = [], []
        for prompt in (prompt for prompt in prompts for _ in range(n)):
            ids, found = list(prompt), []
            for _ in range(max_tokens):
                log_p = self.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                ids.append(int(torch.multinomial(log_p.exp(), 1)))
                found.append([log_p[ids[-1]].item()])
            completions.append(ids[len(prompt) :])
            scores.append(found)
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": scores}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], Engine]:
    """Makes an engine of a model, and TRL believe that it is a server of vLLM."""
    from trl.generation import vllm_generation

    def start(model: nn.Module) -> Engine:
        engine = Engine(model)
        monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
        monkeypatch.setattr(vllm_generation, "VLLMClient", engine)
        return engine

    return start


def synced(model: PissaModel, engine: Engine) -> None:
    """One sync of TRL's, without a trainer."""
    from accelerate import Accelerator
    from trl.generation.vllm_generation import VLLMGeneration

    VLLMGeneration(model, Accelerator(cpu=True), processing_class=None, mode="server").sync_weights()
    assert engine.syncs == 1


def small_llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**sizes, num_attention_heads=4, attention_bias=True, tie_word_embeddings=tied)
        return LlamaForCausalLM(config).eval()


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "dense": (small_llama, {}),
    "explicit": (small_llama, {"residual": "explicit"}),
    "nf4": (small_llama, {"quant": "nf4"}),
    "dora": (small_llama, {"use_dora": True}),
    "embeddings and output layer": (small_llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "a head of its own": (small_llama, {"modules_to_save": ["lm_head"]}),
    "tokens": (small_llama, {"trainable_token_indices": [1, 5]}),
    "tied": (lambda: small_llama(tied=True), {}),
    "tied, tokens": (lambda: small_llama(tied=True), {"trainable_token_indices": [1, 5]}),
    **{kind: (lambda kind=kind: mixtures.make(kind), {"r": 2}) for kind in ("mixtral", "gpt_oss")},
    "mixtral, nf4": (lambda: mixtures.make("mixtral"), {"r": 2, "quant": "nf4"}),
}
DAILY = ["dense", "nf4", "dora", "embeddings and output layer", "a head of its own", "tied, tokens", "gpt_oss"]
DAILY += ["mixtral, nf4"]


@pytest.mark.parametrize("case", each(CASES, DAILY))
def test_the_engine_gets_the_trained_function(case: str, server: Callable[[nn.Module], Engine]) -> None:
    make, fields = CASES[case]
    model = pissa.wrap(make(), **{"r": 4, **fields}).eval()
    change_all(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name or "trainable_tokens_delta" in name:
                parameter.add_(0.05)
    ids = torch.arange(12).view(2, 6)
    trained, before = logits(model, ids), state(model)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    engine = server(make())
    start = logits(engine.model, ids)

    synced(model, engine)
    got = logits(engine.model, ids)
    model.merge_adapter()
    if case != "gpt_oss":  # whose weights [in, out] are multiplied in another order than ours
        assert torch.equal(got, logits(model, ids))
    model.unmerge_adapter()
    bound = TERMS * 2**-24 * trained.abs().max()  # the merged weights, and sums in another order
    assert (got - trained).abs().max() <= bound < 0.01 * (trained - start).abs().max()

    assert_equal(state(model), before)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert torch.equal(logits(model, ids), trained)


def test_rewards_are_of_what_is_trained(server: Callable[[nn.Module], Engine], tmp_path: Path) -> None:
    """In each step the engine gives the tokens that it samples the probabilities that the trainer gives them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_tiny_model(tmp_path / "model")
    engine = server(AutoModelForCausalLM.from_pretrained(folder))
    start = engine.model.state_dict()["lm_head.weight"].clone()
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = pissa.wrap(base, r=4, task_type="CAUSAL_LM", init="lora", quant="nf4")
    others = {"use_vllm": True, "vllm_mode": "server", "bf16": False, "max_steps": 3, "save_strategy": "no"}
    run = trl_trainer("GRPO", model, tmp_path, AutoTokenizer.from_pretrained(folder), beta=0.0, **others)
    before = state(model)
    run.train()
    assert engine.syncs == 3
    assert torch.equal(engine.model.state_dict()["lm_head.weight"], start)  # not adapted
    after = state(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    differences = logged(run, "sampling/sampling_logp_difference/max")
    assert len(differences) == 3
    # Logarithms of probabilities of about 1/257, each from logits below 1.
    assert max(differences) <= TERMS * 2**-24 * 8
