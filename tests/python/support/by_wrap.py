"""Runs a fine-tuning program with `pissa.wrap` in the place of `peft.get_peft_model`, told by hand what to adapt. What
`pissa run` does is compared with this.

    python by_wrap.py '{"r": 4}' MODULE_OR_FILE ARGUMENTS
"""

from __future__ import annotations

import json
import runpy
import sys
from typing import Any

import peft

import pissa


def by_wrap(model: Any, config: Any, *_: Any, **__: Any) -> pissa.PissaModel:
    """The program's configuration is of no account."""
    return pissa.wrap(model, **json.loads(FIELDS))


_, FIELDS, program, *arguments = sys.argv
peft.get_peft_model = by_wrap
sys.argv = [program, *arguments]
if program.endswith(".py"):
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
