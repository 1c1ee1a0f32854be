"""The models that PEFT's tests fetch from the hub, made here: random, a hundredth of the size, in a cache folder of
huggingface_hub's own layout, which resolves their names offline."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import pissa

VOCABULARY = 1024
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,  # else the outputs are too small to tell adapters apart
    "bos_token_id": 3,  # the tests feed 0, 1 and 2: an embedding of padding is zero
    "pad_token_id": 4,
    "eos_token_id": 5,
}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 64}
OPT: dict[str, Any] = {"ffn_dim": 64, "word_embed_proj_dim": 32}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
T5: dict[str, Any] = {
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2, "init_std": 0.1},
}
DEBERTA: dict[str, Any] = {"pos_att_type": ["c2p", "p2c"], "relative_attention": True, "type_vocab_size": 0}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

# name on the hub -> class of transformers, its configuration beside SIZES. BertForPreTraining has all parts of a Bert.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (  # a test counts its layers
        "OPTForCausalLM",
        {**OPT, "num_hidden_layers": 5},
    ),
    "peft-internal-testing/opt-125m": (  # a test knows its width
        "OPTForCausalLM",
        {"ffn_dim": 64, "hidden_size": 768, "word_embed_proj_dim": 768},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "openai-community/gpt2": ("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**GPT2, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", {}),
    "peft-internal-testing/tiny-random-BloomForCausalLM": ("BloomForCausalLM", {"num_hidden_layers": 5, "n_head": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", {}),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", {}),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", {}),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", GROUPED),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", GROUPED),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", GROUPED),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", GROUPED),
    "Qwen/Qwen2-0.5B": ("Qwen2ForCausalLM", GROUPED),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", GROUPED),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        {**GROUPED, "query_pre_attn_scalar": 16},
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM",
        {**GROUPED, **LOCAL, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1},
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssForCausalLM", {**GROUPED, **LOCAL}),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", {**GROUPED, **EXPERTS}),
    "hf-internal-testing/tiny-qwen3-moe": ("Qwen3MoeForCausalLM", {**GROUPED, **EXPERTS}),
    "hf-internal-testing/Mixtral-tiny": ("MixtralForCausalLM", {**GROUPED, **LOCAL}),
    "tiiuae/falcon-mamba-tiny-dev": ("FalconMambaForCausalLM", {"state_size": 8, "time_step_rank": 2}),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", T5),
    "google/flan-t5-small": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", BART),
    "peft-internal-testing/tiny-random-BertModel": ("BertForPreTraining", {}),
    "hf-internal-testing/tiny-random-BertModel": ("BertForPreTraining", {}),
    "bert-base-uncased": ("BertModel", {}),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", {}),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", DEBERTA),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", {}),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", {}),
    "pissa/OPTForSequenceClassification": ("OPTForSequenceClassification", OPT),
    "pissa/OPTForQuestionAnswering": ("OPTForQuestionAnswering", OPT),
    "pissa/OPTModel": ("OPTModel", OPT),
    "pissa/GPT2ForTokenClassification": ("GPT2ForTokenClassification", GPT2),
    "pissa/Whisper": ("WhisperForConditionalGeneration", {**BART, "max_source_positions": 30, "num_mel_bins": 8}),
    "peft-internal-testing/tiny-clip-text-2": ("CLIPTextModel", {}),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 2, 1]},
    ),
}


# name on the hub -> its base, the task
ADAPTERS: dict[str, tuple[str, str | None]] = {
    "peft-internal-testing/tiny-OPTForCausalLM-lora": ("peft-internal-testing/tiny-random-OPTForCausalLM", "CAUSAL_LM"),
    "peft-internal-testing/tiny-opt-lora-revision": ("peft-internal-testing/tiny-random-OPTForCausalLM", "CAUSAL_LM"),
    "peft-internal-testing/gpt2-lora-random": ("gpt2", "CAUSAL_LM"),
    "peft-internal-testing/tiny-random-BertModel-lora": ("hf-internal-testing/tiny-random-BertModel", None),
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": ("peft-internal-testing/tiny-random-t5", "SEQ_2_SEQ_LM"),
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": ("pissa/OPTForSequenceClassification", "SEQ_CLS"),
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": ("pissa/GPT2ForTokenClassification", "TOKEN_CLS"),
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": ("pissa/OPTForQuestionAnswering", "QUESTION_ANS"),
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": ("pissa/OPTModel", "FEATURE_EXTRACTION"),
    "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora": ("pissa/Whisper", None),
    "ybelkada/test-st-lora": ("pissa/OPTModel", "FEATURE_EXTRACTION"),
}
# adapters with a vocabulary of their own: name, revision -> how many tokens more than the base has
GROWN = {
    ("peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab", "main"): 8,
    ("peft-internal-testing/opt-tokenizer-revision", "main"): 4,
    ("peft-internal-testing/opt-tokenizer-revision", "my-revision"): 8,
}
REVISIONS = ("main", "test", "v1.2.3", "v2.0.0")


def make_models(cache: Path) -> None:
    """Writes every model that `cache` lacks, with a byte-level tokenizer of fewer tokens, as Qwen. Revisions differ in
    their weights."""
    for name, (kind, fields) in MODELS.items():
        cls = getattr(transformers, kind)
        for seed, revision in enumerate(REVISIONS if "Bert" in kind else ["main"]):
            if not _refs(cache, name, revision).exists():
                with torch.random.fork_rng():
                    torch.manual_seed(seed)
                    model = cls(cls.config_class(**{**SIZES, **fields}))
                with _snapshot(cache, name, revision) as folder:
                    model.save_pretrained(folder)
                    _tokenizer(VOCABULARY - 24).save_pretrained(folder)


def make_adapters(cache: Path) -> None:
    """Writes the adapters, with the code of today."""
    for name, (base, task) in ADAPTERS.items():
        model = getattr(transformers, MODELS[base][0]).from_pretrained(base)
        wrapped = pissa.wrap(model, r=2, task_type=task, target_modules=r".*\.(q|v|q_proj|v_proj|query|value|c_attn)")
        for revision in REVISIONS:
            with _snapshot(cache, name, revision) as folder:
                wrapped.save_pretrained(folder)
    for (name, revision), more in GROWN.items():
        model = transformers.OPTForCausalLM.from_pretrained("peft-internal-testing/tiny-random-OPTForCausalLM")
        model.resize_token_embeddings(VOCABULARY + more)
        wrapped = pissa.wrap(model, r=2, task_type="CAUSAL_LM")
        with _snapshot(cache, name, revision) as folder:
            wrapped.save_pretrained(folder, save_embedding_layers=True)
            _tokenizer(VOCABULARY + more).save_pretrained(folder)


def _refs(cache: Path, name: str, revision: str) -> Path:
    return cache / f"models--{name.replace('/', '--')}" / "refs" / revision


@contextmanager
def _snapshot(cache: Path, name: str, revision: str) -> Iterator[Path]:
    """An empty folder for the files of a revision, which is known to exist when they have been written."""
    refs = _refs(cache, name, revision)
    commit = sha1(revision.encode()).hexdigest()
    folder = refs.parents[1] / "snapshots" / commit
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    refs.parent.mkdir(exist_ok=True)
    refs.write_text(commit)


def _tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer of so many tokens."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<0>", "<1>", "<2>", "<s>", "<pad>", "</s>"]
    fast.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    fast.add_tokens([f"<{i}>" for i in range(fast.get_vocab_size(), size)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", pad_token="<pad>", eos_token="</s>"
    )
