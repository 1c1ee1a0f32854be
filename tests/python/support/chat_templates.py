"""Chat templates that behave as those of well-known models do, in short: what they put around a message, the token that
ends an answer, what they do with a system message and with thoughts. Without tools, dates and default texts."""

from __future__ import annotations

from typing import Any, NamedTuple

LOOP = "{% for m in messages %}"
CHATML = LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


class Template(NamedTuple):
    """A template and how it renders a question Q and an answer A."""

    text: str
    prompt: str
    answer: str
    """What is learned."""
    eos: str
    ends: tuple[str, ...]
    """The tokens at which an answer ends."""
    special: tuple[str, ...] = ()
    system: str | None = ""
    """The prompt of a chat that begins with the system message S. None: the template refuses it."""
    turns: str = ""
    """The prompt of a chat that begins with a question H and an answer I."""


LLAMA_3 = Template(
    "{{ bos_token }}" + LOOP + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "<s><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "A<|eot_id|>",
    "<|end_of_text|>",  # as in the base model's tokenizer
    ("<|end_of_text|>", "<|eot_id|>"),
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<s><|start_header_id|>user<|end_header_id|>\n\nH<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nI<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
)
# The last answer begins with its thoughts, even if there are none; those of earlier answers are taken out.
QWEN_3 = Template(
    LOOP + "{% set c = m.content %}{% set thoughts = '' %}{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set thoughts = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}"
    "{{ c }}<|im_end|>\n{% endfor %}" + CHATML_PROMPT + "{% if add_generation_prompt and enable_thinking is "
    "defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    "<think>\n\n</think>\n\nA<|im_end|>",
    "<|im_end|>",
    ("<|im_end|>",),
    ("<|im_start|>",),
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nH<|im_end|>\n<|im_start|>assistant\nI<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    "<|im_start|>assistant\n",
)
GEMMA_3 = Template(
    "{{ bos_token }}{% set first = '' %}{% if messages[0].role == 'system' %}{% set first = messages[0].content + "
    "'\n\n' %}{% set messages = messages[1:] %}{% endif %}" + LOOP + "{% if (m.role == 'user') != (loop.index0 % 2 == "
    "0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first else '' }}"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "<s><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n",
    "A<end_of_turn>",
    "<eos>",
    ("<eos>", "<end_of_turn>"),
    ("<start_of_turn>", "<end_of_turn>"),
    "<s><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\n",
    "<s><start_of_turn>user\nH<end_of_turn>\n<start_of_turn>model\nI<end_of_turn>\n<start_of_turn>user\nQ<end_of_turn>\n"
    "<start_of_turn>model\n",
)
GEMMA_2 = GEMMA_3._replace(
    text="{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + GEMMA_3.text,
    system=None,
)
# The system message is a part of the last question, and absent once the answer follows.
MISTRAL = Template(
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    + LOOP
    + "{% if m.role == 'user' %}[INST] {{ system + '\n\n' if loop.last and system else '' }}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    "<s>[INST] Q[/INST]",
    " A</s>",
    "</s>",
    ("</s>",),
    ("[INST]", "[/INST]"),
    "<s>[INST] S\n\nQ[/INST]",
    "<s>[INST] H[/INST] I</s>[INST] Q[/INST]",
)
PHI_4 = Template(
    LOOP + "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
    "<|im_start|>user<|im_sep|>Q<|im_end|><|im_start|>assistant<|im_sep|>",
    "A<|im_end|>",
    "<|endoftext|>",
    ("<|endoftext|>", "<|im_end|>"),
    ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>Q<|im_end|><|im_start|>assistant<|im_sep|>",
    "<|im_start|>user<|im_sep|>H<|im_end|><|im_start|>assistant<|im_sep|>I<|im_end|><|im_start|>user<|im_sep|>Q<|im_end|>"
    "<|im_start|>assistant<|im_sep|>",
)
# Harmony: the last answer ends with another token than those before it.
GPT_OSS = Template(
    LOOP + "{% if m.role == 'assistant' %}{% if '<|channel|>' in m.content %}{{ raise_exception('You have passed a "
    "message containing <|channel|> tags in the content field') }}{% endif %}<|start|>assistant<|channel|>final"
    "<|message|>{{ m.content }}{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% else %}"
    "<|start|>{{ 'developer' if m.role == 'system' else m.role }}<|message|>{{ '# Instructions\n\n' if m.role == "
    "'system' else '' }}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    "<|start|>user<|message|>Q<|end|><|start|>assistant",
    "<|channel|>final<|message|>A<|return|>",
    "<|return|>",
    ("<|return|>",),
    ("<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
    "<|start|>developer<|message|># Instructions\n\nS<|end|><|start|>user<|message|>Q<|end|><|start|>assistant",
    "<|start|>user<|message|>H<|end|><|start|>assistant<|channel|>final<|message|>I<|end|><|start|>user<|message|>Q<|end|>"
    "<|start|>assistant",
)
SMOLLM2 = Template(
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are SmolLM.<|im_end|>\n{% endif %}"
    + CHATML
    + CHATML_PROMPT,
    "<|im_start|>system\nYou are SmolLM.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    "A<|im_end|>",
    "<|im_end|>",
    ("<|im_end|>",),
    ("<|im_start|>", "<|endoftext|>"),
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are SmolLM.<|im_end|>\n<|im_start|>user\nH<|im_end|>\n<|im_start|>assistant\nI<|im_end|>\n"
    "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
)
# The prompt begins the thoughts, and the text of an answer is without them.
DEEPSEEK_R1 = Template(
    "{{ bos_token }}" + LOOP + "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<|User|>{{ m.content }}{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|>{{ '<think>\n' }}{% endif %}",
    "<s><|User|>Q<|Assistant|><think>\n",
    "\n</think>\n\nA<|end_of_sentence|>",
    "<|end_of_sentence|>",
    ("<|end_of_sentence|>",),
    ("<|User|>", "<|Assistant|>"),
    "<s>S<|User|>Q<|Assistant|><think>\n",
    "<s><|User|>H<|Assistant|>I<|end_of_sentence|><|User|>Q<|Assistant|><think>\n",
)
TEMPLATES = {
    **{"Llama 3": LLAMA_3, "Qwen 3": QWEN_3, "Gemma 2": GEMMA_2, "Gemma 3": GEMMA_3, "Mistral": MISTRAL},
    **{"Phi 4": PHI_4, "gpt-oss": GPT_OSS, "SmolLM2": SMOLLM2, "DeepSeek R1": DEEPSEEK_R1},
}


def tokenizer_of(template: Template) -> Any:
    """A byte-level tokenizer with this chat template and its special tokens, most of which have no role."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast.add_special_tokens([AddedToken(text, special=True) for text in template.special])
    fast.add_tokens(["<think>", "</think>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token=template.eos)
    tokenizer.chat_template = template.text
    return tokenizer
