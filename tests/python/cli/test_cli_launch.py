"""`accelerate launch -m pissa finetune` in two processes, all from YAML: the losses of one, by DDP and by FSDP2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from pissa.cli import main
from processes import TIMEOUT
from runs import logged, save_sums
from tiny_model import save_tiny_model

SHARDED = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "fsdp_state_dict_type": "FULL_STATE_DICT",
}
LAUNCHES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "DDP": ({"distributed_type": "MULTI_GPU"}, ["-m", "pissa", "finetune"]),
    "FSDP2": (
        {"distributed_type": "FSDP", "fsdp_config": SHARDED},
        [str(Path(__file__).parents[1] / "support" / "fsdp_on_cpu.py"), "finetune", "--use_cpu", "false"],
    ),
}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, with its options in options.yaml beside it."""
    folder = tmp_path_factory.mktemp("one")
    base, data = save_tiny_model(folder / "base"), save_sums(folder)
    options = {"model_name_or_path": str(base), "dataset_name": str(data), "max_steps": 4, "r": 4, "seed": 0}
    options |= {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    (folder / "options.yaml").write_text(yaml.safe_dump(options))
    arguments = ["--config", str(folder / "options.yaml"), "--out", str(folder / "run"), "--batch-size", "4"]
    assert main(["finetune", *arguments]) == 0
    return folder / "run"


@pytest.mark.nightly
@pytest.mark.parametrize("kind", LAUNCHES)
def test_two_processes_train_what_one_does(kind: str, one: Path, tmp_path: Path) -> None:
    how, command = LAUNCHES[kind]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machine = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2, "mixed_precision": "no"}
    machine |= {"main_process_ip": "127.0.0.1", "main_process_port": port}
    (tmp_path / "machine.yaml").write_text(yaml.safe_dump(machine | how))
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "machine.yaml")]
    done = subprocess.run(
        [*launch, *command, "--config", str(one.parent / "options.yaml"), "--out", str(out), "--save-steps", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert done.stdout.count("\nsaved  ") == 1
    # Sums over the 4 x 4 tokens of answers are taken in another order in a loss and in the gradients of the 3 steps
    # before it; a sum of n terms has a relative error of n units roundoff in any order, and its terms one each.
    assert logged(out) == pytest.approx(logged(one), rel=4 * 17 * 2**-24)
    assert (out / "checkpoint-2" / "optimizer.bin").exists() == (kind == "FSDP2")
    alone, together = (load_file(folder / "adapter_model.safetensors") for folder in (one, out))
    assert alone.keys() == together.keys()
    assert all((alone[name] - together[name]).norm() <= 1e-4 * alone[name].norm() for name in alone)
