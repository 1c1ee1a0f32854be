"""Vision-language models' folders with their processors, and a data set of images, for tests of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from architectures import GEMMA3 as GEMMA3_TEXT
from architectures import GROUPED, M_ROPE, QWEN_VISION, SIGLIP, TEXT
from tiny_model import tiny_tokenizer

# As the templates of real ones: a content is a text, or parts of which each is a text or an image.
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def save_qwen2_5_vl(folder: Path) -> Path:
    """Four tokens an image. The processor needs torchvision, for videos."""
    from transformers import (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = tiny_tokenizer(
        **{"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        **{"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"},
    )
    size = {"shortest_edge": 16 * 16, "longest_edge": 16 * 16}
    patches = {"patch_size": QWEN_VISION["patch_size"], "size": size}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**patches),
        tokenizer,
        Qwen2VLVideoProcessor(**patches),
        chat_template=_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    config = Qwen2_5_VLForConditionalGeneration.config_class(
        text_config={**TEXT, **GROUPED, "vocab_size": len(tokenizer), "rope_parameters": M_ROPE},
        vision_config=QWEN_VISION,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_bos_token_id,
        vision_end_token_id=tokenizer.vision_eos_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _save(folder, Qwen2_5_VLForConditionalGeneration, config, processor)


def save_gemma3(folder: Path) -> Path:
    """Four tokens an image."""
    from transformers import Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = tiny_tokenizer(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    side = SIGLIP["image_size"]
    images = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    template = _TEMPLATE.replace("IMAGE", "<start_of_image>")
    processor = Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    config = Gemma3ForConditionalGeneration.config_class(
        text_config={**TEXT, **GEMMA3_TEXT, "vocab_size": len(tokenizer)},
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
    )

    def build(config: Any) -> Any:
        model = Gemma3ForConditionalGeneration(config)
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # 0 as transformers has it
        return model

    return _save(folder, build, config, processor)


def _save(folder: Path, build: Callable[[Any], Any], config: Any, processor: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build(config).save_pretrained(folder)
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
