"""The model card of a run, README.md: what it is, how good, and how to use it. It may be given away with the run, so
it contains no path of this machine. TRL's names no folder as the base."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

import yaml

from pissa.containers.staged import staged, write_text

_CARD = """\
---
{metadata}---

# {title}

A {method} adapter for {base}, trained on {data} by `pissa {command}` with [TRL](https://github.com/huggingface/trl).
{results}
To ask it{where}:

```sh
pissa chat {run_word}{at_base}
```

To merge it into its base, as a model of its own:

```sh
pissa merge {run_word} NEW_FOLDER{at_base}
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


def write_card(
    folder: Path, run: str, base: str, method: str, command: str, data: str, results: Iterable[str] = ()
) -> None:
    """Writes the card into the folder of a run.

    Args:
        run: the name of the run, a folder or a name on the Hub.
        base: the model that it was trained on, a folder or a name on the Hub. Only the latter is put into the metadata,
            which the Hub reads.
        method: its name, such as "LoRA".
        command: the command that trained it.
        data: the file, the folder or the name on the Hub of what it was trained on.
        results: sentences on how good it is.
    """
    metadata: dict[str, object] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    metadata |= {} if os.path.exists(base) else {"base_model": base}
    metadata["tags"] = ["lora", *(["pissa"] if "PiSSA" in method else []), "trl"]
    here = " and ".join(f"`{_name(given)}`" for given in (run, base) if os.path.exists(given))
    run, base, data = map(_name, (run, base, data))
    words = {"run_word": shlex.quote(run), "run": run, "base": base, "data": data}
    words |= {"method": method, "command": command, "title": run.rpartition("/")[2]}
    words["metadata"] = yaml.safe_dump(metadata, sort_keys=False)
    words["at_base"] = f" --base {shlex.quote(base)}" if "base_model" not in metadata else ""
    words["where"] = f", in the folder that contains {here}" if here else ""
    words["results"] = "".join(f"\n{sentence}\n" for sentence in results)
    with staged(folder) as new:
        write_text(new("README.md"), _CARD.format(**words))


def _name(given: str) -> str:
    """The name of a folder or file without its path, or a name on the Hub as it is."""
    return os.path.basename(os.path.abspath(given)) if os.path.exists(given) else given
