"""Writes the paper's training data as `pissa finetune` reads it: the first examples, each a question and an answer.

python bench/recipes/data.py metamath metamath.jsonl            # from the Hugging Face hub
python bench/recipes/data.py evol-instruct out.jsonl --rows 100000 --source FILE_OR_FOLDER
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Source(NamedTuple):
    hub: str
    pair: Callable[[dict[str, Any]], tuple[str, str]]


SOURCES = {
    "metamath": Source("meta-math/MetaMathQA", lambda row: (row["query"], row["response"])),
    "codefeedback": Source("m-a-p/CodeFeedback-Filtered-Instruction", lambda row: (row["query"], row["answer"])),
    "evol-instruct": Source(
        "WizardLMTeam/WizardLM_evol_instruct_V2_196k",
        lambda row: (row["conversations"][0]["value"], row["conversations"][1]["value"]),
    ),
}


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=100_000, help="the first so many (100,000); 0: all")
    parser.add_argument("--source", help="a JSON file, or a data set of the hub under another name")
    options = parser.parse_args(given)

    from datasets import load_dataset

    source = options.source or SOURCES[options.name].hub
    files = {"data_files": source} if Path(source).is_file() else {}
    rows = load_dataset("json" if files else source, split="train", **files)
    with options.out.open("w", encoding="utf-8") as out:
        for row in rows.take(min(options.rows or len(rows), len(rows))):
            question, answer = SOURCES[options.name].pair(row)
            print(json.dumps({"question": question, "answer": answer}, ensure_ascii=False), file=out)


if __name__ == "__main__":
    main()
