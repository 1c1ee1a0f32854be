"""Adapters on disk: writing them, finding them, reading them into a model.

- `hub` where an adapter is; `staged` writing into a folder
- `json_file`, `tensor_file`: files that somebody else may have written; `messages`
- `peft_layout`, `expert_layout`, `lora_config`: PEFT's files; `lora_folder` reads them without a model
- `plain_lora`: the plain LoRA that an adapter of ours is
- `pissa_layout`, `config_json`, `record`, `vocabulary`: what our files hold beside it
- `save`; `checkpoint` reading a folder, `fit` whether it fits a model, `load` putting it there
"""
