"""The command line, where accelerate takes gloo on CPUs for what joins GPUs: it offers FSDP to those only.

accelerate launch --config_file FSDP2.yaml fsdp_on_cpu.py finetune ...
"""

from __future__ import annotations

import os
import sys
from typing import Any

from accelerate import DistributedType, PartialState

from pissa.cli import main


def gloo(self: PartialState, *_: Any, **__: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = gloo
    sys.exit(main())
