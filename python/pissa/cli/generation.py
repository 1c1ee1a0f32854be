"""What a model can read, and its answers to one prompt or to many, by transformers' `generate`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch

from pissa.cli.templates import end_of_answer, prompt_text
from pissa.cli.terminal import UserError
from pissa.containers.messages import quote


def context_of(model: Any) -> float:
    """The most tokens that a model reads, its answer included; infinite if its configuration says nothing of it."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def check_tokens(model: Any, tokenizer: Any, tokens: Iterable[int]) -> None:
    """Raises UserError, naming the token, if the model has no embedding of one of these."""
    embeddings = model.get_input_embeddings()
    rows = getattr(getattr(embeddings, "base_layer", embeddings), "num_embeddings", math.inf)
    if (last := max(tokens, default=0)) >= rows:
        raise UserError(
            f"the tokenizer's token {quote(tokenizer.convert_ids_to_tokens(last))} has the id {last}, and the model "
            f"has {rows} embeddings, of the ids below {rows}; remove the token from the tokenizer, or load the model "
            f"with transformers, call its resize_token_embeddings({last + 1}), and save it as the model to use [P127]"
        )


def ends_of(model: Any, tokenizer: Any) -> set[int]:
    """The tokens at which the model ends an answer: those of its configuration, and the one that ends its training's
    answers."""
    ends = model.generation_config.eos_token_id
    named = {*([ends] if isinstance(ends, int) else ends or ())}
    return named if tokenizer.chat_template is None else named.union(end_of_answer(tokenizer))


def prompt_tokens(model: Any, tokenizer: Any, messages: Sequence[dict[str, str]], instead: str) -> list[int]:
    """The tokens that the model is given before its answer. A plain text is continued, and without a chat template, so
    is the last message.

    Args:
        instead: what to do where they are too many.

    Raises:
        UserError: the model's context has no room for an answer, or a token has no embedding.
    """
    if tokenizer.chat_template is None or messages[-1]["role"] == "assistant":
        tokens = tokenizer(messages[-1]["content"]).input_ids
    else:
        tokens = tokenizer(prompt_text(messages, tokenizer), add_special_tokens=False).input_ids
    if len(tokens) >= (context := context_of(model)):
        raise UserError(
            f"the conversation has {len(tokens):,} tokens, and the model reads at most {context:,}, with the answer; "
            f"{instead}"
        )
    check_tokens(model, tokenizer, tokens)
    return list(tokens)


_TIMES, _REPEATED, _WITHOUT_WORDS = 6, 128, 256
"""How many times in a row a text must occur before an answer repeats itself, and over how many tokens; over more if it
has no letters, such as the zeros of a matrix, the rule of a table, or a drawing."""


def repeats_itself(tokens: Sequence[int], tokenizer: Any) -> bool:
    """Whether an answer ends in one text over and over, which a model that always takes the likeliest token then goes
    on with forever. Lists, tables and code are not meant: their lines differ, if only in a number."""
    for period in range(1, len(tokens) // _TIMES + 1):
        if tokens[-1] != tokens[-1 - period]:
            continue
        for needed in (_REPEATED, _WITHOUT_WORDS):
            length = max(needed, _TIMES * period)
            if length > len(tokens) or tokens[-length:-period] != tokens[period - length :]:
                break
            if needed == _WITHOUT_WORDS or any(map(str.isalpha, tokenizer.decode(tokens[-period:]))):
                return True
    return False


def generate(
    model: Any, tokenizer: Any, prompt: list[int], most: int, ends: Collection[int], **options: Any
) -> list[int]:
    """Returns the tokens of an answer: at least one, and no more than the model's context leaves room for. One that
    repeats itself ends there.

    Args:
        prompt: its tokens.
        most: the most tokens of the answer.
        ends: the tokens at which it ends.
        options: further arguments of `generate`.
    """
    return _generate(model, tokenizer, [prompt], _room(model, prompt, most), ends, options)[0]


def generate_many(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], most: int, ends: Collection[int], **options: Any
) -> Iterator[list[int]]:
    """Yields what `generate` returns for each prompt, in their order, from batches; greedy, unless options say other.
    Sums are rounded in another order than alone, so a token may differ where two are equally likely."""
    answers, following = dict[int, list[int]](), 0
    for place, answer in generate_each(model, tokenizer, prompts, most, ends, **options):
        answers[place] = answer
        while following in answers:
            yield answers.pop(following)
            following += 1


def generate_each(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], most: int, ends: Collection[int], **options: Any
) -> Iterator[tuple[int, list[int]]]:
    """The same as soon as each batch is complete, with the place of the prompt: the longest prompts first, so what
    needs the most memory comes first."""
    options = {"do_sample": False} | options
    rooms = [_room(model, prompt, most) for prompt in prompts]
    for batch in _batches([*map(len, prompts)], rooms, _ignores_padding(model, tokenizer, prompts)):
        found = _generate(model, tokenizer, [prompts[place] for place in batch], rooms[batch[0]], ends, options)
        yield from zip(batch, found, strict=True)


# SmolLM2-135M, float32, one core, 32 prompts of 38 to 55 tokens, 12 tokens each: 1.4 answers a second one by one, 3.1
# in batches of 4, 3.7 of 8, 4.2 of 16 and of 32.
_ROWS, _TOKENS = 16, 8192
"""The most rows of a batch, and the most tokens, those of the answers included: its memory."""
_ROUNDED = 0.05
"""The largest relative difference of logits that rounding explains: of float32 it is 1e-6, of bfloat16 0.01. Models
that read padding differ by 0.2 and more."""


def _room(model: Any, prompt: list[int], most: int) -> int:
    return int(max(1, min(most, context_of(model) - len(prompt))))


def _batches(lengths: Sequence[int], rooms: Sequence[int], ignores_padding: bool) -> Iterator[list[int]]:
    """The places of prompts that are answered together, which differ little in length, or not at all if the model reads
    padding, and have the same room for an answer."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if batch:
            first = batch[0]
            tokens = (len(batch) + 1) * (lengths[first] + rooms[first])
            fits = rooms[place] == rooms[first] and (ignores_padding or lengths[place] == lengths[first])
            if len(batch) == _ROWS or tokens > _TOKENS or not fits:
                yield batch
                batch = []
        batch.append(place)
    if batch:
        yield batch


def _ignores_padding(model: Any, tokenizer: Any, prompts: Sequence[list[int]]) -> bool:
    """Whether the model answers the end of the longest prompt alike alone and after padding. Of the causal models of
    transformers, DeepSeek V4 does not, which compresses blocks of tokens. Nor do those with sparse attention, but only
    once there are more tokens than they attend to, which this prompt may not have."""
    if hasattr(model.config.get_text_config(), "index_topk"):
        return False
    shortest, longest = (choose(prompts, key=len, default=[]) for choose in (min, max))
    end = longest[min(len(longest) - len(shortest), 3) :]  # no multiple of a block
    if len(end) == len(longest):
        return True
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    alone, padded = (
        model.generate(**_padded(model, tokenizer, [end], length), **options).logits[0][0].float()
        for length in (len(end), len(longest))
    )
    return bool((padded - alone).norm() <= _ROUNDED * alone.norm())


def _padded(model: Any, tokenizer: Any, prompts: Sequence[list[int]], length: int) -> dict[str, Any]:
    """The arguments of `generate` that are the prompts, padded on the left to this many tokens."""
    missing = [length - len(prompt) for prompt in prompts]
    # By the first token of each, not by one of the tokenizer's, which a repetition penalty would make less likely
    # before transformers 5.23.
    ids = [prompt[:1] * count + prompt for prompt, count in zip(prompts, missing, strict=True)]
    mask = [[0] * count + [1] * (length - count) for count in missing]
    rows = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    given = {name: tensor.to(model.device) for name, tensor in rows.items()}
    return {**given, "pad_token_id": tokenizer.pad_token_id or 0}


def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], room: int, ends: Collection[int], options: dict[str, Any]
) -> list[list[int]]:
    """The answers to these prompts, each up to its first end."""
    length = max(map(len, prompts))

    def repeat(ids: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
        found = [repeats_itself(row, tokenizer) for row in ids[:, length:].tolist()]
        return torch.tensor(found, device=ids.device)

    given = _padded(model, tokenizer, prompts, length)
    criteria = [*options.get("stopping_criteria", ()), repeat]
    answered = model.generate(
        **given, **options | {"stopping_criteria": criteria}, max_new_tokens=room, eos_token_id=sorted(ends) or None
    )
    return [_until_end(row, ends, tokenizer) for row in answered[:, length:].tolist()]


def _until_end(row: list[int], ends: Collection[int], tokenizer: Any) -> list[int]:
    """An answer without what follows in its batch."""
    for end, token in enumerate(row, 1):
        if token in ends or repeats_itself(row[:end], tokenizer):
            return row[:end]
    return row
