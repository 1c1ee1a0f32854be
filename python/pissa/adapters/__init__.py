"""Adapters on disk, of ours and of anybody.

A folder, without a model:
- `lora_folder`: what an adapter's folder contains, whoever wrote it
- `pissa_layout`: what our own files contain, and which tensors a layer writes into them
- `codes_file`: the file that the folders of a run share

The layers of a model, without a folder:
- `peft_layout`: an adapter of ours as PEFT's files have it, the plain LoRA that other programs see
- `vocabulary`, `rest`: the base's embeddings, and its other tensors, which are saved or compared with an adapter

From one to the other:
- `save`: a model's adapter into a folder
- `restore`: a folder of ours into a model
- `beside_lora`: a plain LoRA of anybody into a model, beside our adapters
"""
