"""Folders and files with weights: found, mapped, named, decoded, written.

Anything that cannot be read or does not fit raises a ValueError that names the file, and the tensor, field or layer.

- `hub`: finding a folder, here or on the Hub; `staged`: writing into one
- `messages`, `tensor_file`: files that others may have written
- `gguf_file`, `gguf_config`, `gguf_tokenizer`, `gguf_model`: the files of llama.cpp, and the models in them
- `model_folder`: the model that config.json describes, and which tensors make each of its parameters
- `coded_weights`: weights that are stored in codes
- `checkpoint`: what a model's folder contains, and its weights, whatever stores them
"""
