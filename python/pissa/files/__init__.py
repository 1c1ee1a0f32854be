"""Adapters on disk: writing them, finding them, and reading them into a model.

Anything that cannot be read or does not fit raises a ValueError that names the file, and the tensor, field or layer.

- `hub`: finding an adapter; `staged`: writing into a folder
- `messages`, `tensor_file`: files that others may have written
- `peft_layout`: PEFT's files, which contain an adapter of ours as the plain LoRA that other programs see
- `pissa_layout`, `vocabulary`: what our own files contain in addition
- `lora_folder`: what an adapter's folder contains, whoever wrote it
- `save`, `load`
"""
