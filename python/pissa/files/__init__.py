"""Adapters on disk: writing them, finding them, reading them into a model.

Whatever cannot be read, or does not fit, is a ValueError that names the file, and the tensor, the field or the layer.

- `hub` where an adapter is; `staged` writing into a folder
- `messages`, `tensor_file`: files that somebody else may have written
- `peft_layout`: PEFT's files, the plain LoRA that an adapter of ours is to others
- `pissa_layout`, `vocabulary`: what our files hold beside it
- `lora_folder` what an adapter's folder is, of anybody
- `save`, `load`
"""
