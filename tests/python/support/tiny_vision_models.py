"""A vision-language model's folder with its processor, and a data set of images, for tests of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from architectures import GEMMA3 as GEMMA3_TEXT
from architectures import SIGLIP, TEXT
from tiny_model import tiny_tokenizer

# As the templates of real ones: a content is a text, or parts of which each is a text or an image.
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def save_gemma3(folder: Path) -> Path:
    """Four tokens an image."""
    from transformers import Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = tiny_tokenizer(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    side = SIGLIP["image_size"]
    images = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    processor = Gemma3Processor(images, tokenizer, chat_template=_TEMPLATE, image_seq_length=4)
    config = Gemma3ForConditionalGeneration.config_class(
        text_config={**TEXT, **GEMMA3_TEXT, "vocab_size": len(tokenizer)},
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma3ForConditionalGeneration(config)
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # 0 as transformers has it
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


COLOURS = ("red", "blue")


def save_images(folder: Path, rows: int = 8, **answers: tuple[str, str]) -> Path:
    """A data set in TRL's format for images with text, the same rows to train on and held out: the columns "prompt",
    "images", and those of `answers`, which say something of a red square and of a blue one."""
    import datasets
    from PIL import Image

    table: dict[str, list[Any]] = {"prompt": [[{"role": "user", "content": "colour?"}]] * rows}
    for name, texts in answers.items():
        table[name] = [[{"role": "assistant", "content": texts[i % 2]}] for i in range(rows)]
    features = datasets.Dataset.from_dict(table).features
    features["images"] = datasets.List(datasets.Image())
    table["images"] = [[Image.new("RGB", (16, 16), COLOURS[i % 2])] for i in range(rows)]
    data = datasets.Dataset.from_dict(table, features=datasets.Features(features))
    for split in ("train", "test"):
        data.to_parquet(folder / f"{split}.parquet")
    return folder
