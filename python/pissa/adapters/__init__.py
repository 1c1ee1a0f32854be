"""Adapters on disk, of ours and of anybody: what is in a folder, writing one, and reading one into a model.

- `lora_folder`: what an adapter's folder contains, whoever wrote it
- `peft_layout`: PEFT's files, which contain an adapter of ours as the plain LoRA that other programs see
- `pissa_layout`, `vocabulary`: what our own files contain
- `save`, `restore`
"""
