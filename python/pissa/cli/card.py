"""The model card of a run, README.md: what it is, and how to use it. TRL's names no folder as the base."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import yaml

from pissa.containers.hub import absolute
from pissa.containers.staged import staged

_CARD = """\
---
{metadata}---

# {title}

A {method} adapter for {base}, trained by `pissa {command}` with [TRL](https://github.com/huggingface/trl).

To ask it:

```sh
pissa chat {run_word}
```

To merge it into its base, as a model of its own:

```sh
pissa merge {run_word} NEW_FOLDER --base {base_word}
```

In Python:

```python
import pissa
from transformers import AutoTokenizer

model = pissa.load({base!r}, adapter={run!r}, is_trainable=False)
tokenizer = AutoTokenizer.from_pretrained({run!r})
question = [{{"role": "user", "content": "How are you?"}}]
tokens = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**tokens, max_new_tokens=128)[0, tokens["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```
"""


def write_card(folder: Path, run: str, base: str, method: str, command: str) -> None:
    """Writes the card into the folder of a run.

    Args:
        run: the name of the run, a folder or a name on the Hub.
        base: the model that it was trained on, a folder or a name on the Hub. Only the latter is put into the metadata,
            which the Hub reads.
        method: its name, such as "LoRA".
        command: the command that trained it.
    """
    run, name = absolute(run), absolute(base)
    metadata: dict[str, object] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    metadata |= {} if os.path.exists(base) else {"base_model": base}
    metadata["tags"] = ["lora", "pissa", "trl"]
    words = {"run_word": shlex.quote(run), "base_word": shlex.quote(name)}
    text = yaml.safe_dump(metadata, sort_keys=False)
    with staged(folder) as new:
        words |= {"metadata": text, "title": Path(run).name, "base": name, "run": run}
        card = _CARD.format(method=method, command=command, **words)
        new("README.md").write_text(card, encoding="utf-8")
