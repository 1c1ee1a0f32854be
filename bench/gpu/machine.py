"""The machine: its GPU, its CUDA toolkit, the folders of a run."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Machine:
    """What a run knows of its machine.

    `card`: the GPU's name. `cuda`: the toolkit's folder, if there is one. `prepared`: what prepare.sh collected, if
    given. `build`: holds all that is built, the logs, and how far the last run came. `results`: the folder for what a
    run leaves. `rehearsal`: nothing runs on a GPU.
    """

    card: str
    cuda: Path | None
    prepared: Path | None
    build: Path
    results: Path
    rehearsal: bool

    @property
    def name(self) -> str:
        """The card's name as a part of file names."""
        return re.sub(r"[^a-z0-9]+", "_", self.card.lower()).strip("_")

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    @property
    def kind(self) -> str:
        """The label of the C++ tests, which their names begin with: on the GPU, or on the simulated one."""
        return "cuda_sim" if self.rehearsal else "cuda"

    @property
    def cmake(self) -> Path:
        return self.build / "cmake"

    @property
    def site(self) -> Path:
        """Packages of this run, and pissa as it is built here. On PYTHONPATH, so before what is installed."""
        return self.build / "site"

    @property
    def logs(self) -> Path:
        return self.build / "logs"


def find_machine(prepared: Path | None, build: Path, results: Path, rehearsal: bool) -> Machine:
    """Looks for the GPU and for a toolkit, in CUDA_HOME and /usr/local/cuda.

    Raises:
        OSError: there is no GPU, or no folder `prepared`.
    """
    card = query("name")
    if not card:
        raise OSError("no GPU: nvidia-smi names none on this machine")
    if prepared and not prepared.is_dir():
        raise OSError(f"no folder {prepared}: make it with bench/gpu/prepare.sh")
    toolkits = [Path(path) for path in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if path]
    cuda = next((path for path in toolkits if os.access(path / "bin/nvcc", os.X_OK)), None)
    return Machine(card, cuda, prepared, build, results, rehearsal)


def query(fields: str) -> str:
    """What nvidia-smi says of the first GPU; empty without a GPU."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    lines = output(*command).splitlines()
    return lines[0].strip() if lines else ""


def output(*command: str) -> str:
    """What a command prints; empty if there is no such command or it fails."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def describe(machine: Machine) -> str:
    """Two lines: the card, and what builds for it."""
    nvcc = re.search(r"release (.*)", output("nvcc", "--version"))
    cmake = output("cmake", "--version").partition("\n")[0]
    rehearsal = " (a rehearsal: nothing ran on it)" if machine.rehearsal else ""
    return (
        f"card: {query('name,driver_version,memory.total,compute_cap')}{rehearsal}\n"
        f"nvcc: {nvcc[1] if nvcc else 'none'}, {cmake or 'no cmake'}, cores: {os.cpu_count()}"
    )


def environment(machine: Machine) -> None:
    """Sets the environment of all commands: the toolkit, our packages before those that are installed, no network."""
    if machine.cuda:
        _prepend("PATH", machine.cuda / "bin")
    _prepend("PYTHONPATH", machine.site)
    os.environ |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONDONTWRITEBYTECODE": "1", "CMAKE_GENERATOR": "Ninja"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def libraries(machine: Machine, paths: list[str]) -> None:
    """Lets programs find CUDA's libraries: torch's, which lie in `paths`, before those of the toolkit."""
    if machine.cuda:
        _prepend("LD_LIBRARY_PATH", machine.cuda / "lib64")
    for path in reversed(paths):
        _prepend("LD_LIBRARY_PATH", Path(path, "nvidia/cu13/lib"))


def _prepend(variable: str, path: Path) -> None:
    rest = os.environ.get(variable)
    os.environ[variable] = f"{path}{os.pathsep}{rest}" if rest else str(path)
