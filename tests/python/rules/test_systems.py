"""Other systems than Linux: no module needs what they lack when it is imported, and only system.py calls it at all."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pissa.system import run_instead, shell

ROOT = Path(__file__).parents[3]

IMPORT_ALL = """
import ast, importlib, mmap, os, pkgutil, signal, sys
from pathlib import Path

import torch  # and all other packages that ours import, with what these need of this system
package = Path(sys.argv[1], "python/pissa")
for path in package.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
        named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in [*named, getattr(node, "module", None) or ""]:
            optional = ("llama_cpp", "deepspeed", "fcntl", "msvcrt", "resource", "readline")
            if name and not name.startswith(("pissa", *optional)):
                importlib.import_module(name)

for name in ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "readline", "curses", "syslog"):
    sys.modules[name] = None
lacking = {
    os: "posix_fallocate posix_fadvise fdatasync O_DIRECTORY O_NOFOLLOW pread pwrite preadv pwritev sendfile "
        "copy_file_range fork forkpty getuid geteuid getgid getegid getgroups getpgid setsid killpg mkfifo mknod "
        "sched_getaffinity sched_setaffinity sched_yield sysconf getloadavg uname statvfs fstatvfs wait3 wait4 nice",
    mmap: "MAP_PRIVATE MAP_SHARED MAP_ANONYMOUS PROT_READ PROT_WRITE MADV_DONTNEED MADV_WILLNEED MADV_SEQUENTIAL",
    signal: "SIGKILL SIGHUP SIGALRM SIGUSR1 SIGPIPE alarm setitimer pause",
}
for module, names in lacking.items():
    for name in names.split():
        delattr(module, name)

import pissa
found = ["pissa", *(module.name for module in pkgutil.walk_packages(pissa.__path__, "pissa."))]
for name in found:
    if name not in ("pissa.__main__", "pissa.cli.startup.peft"):  # which run
        importlib.import_module(name)
print(len(found))
"""


def test_every_module_can_be_imported_without_what_windows_lacks() -> None:
    command = [sys.executable, "-c", IMPORT_ALL, ROOT]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) > 120


@pytest.mark.nightly
@pytest.mark.parametrize(("system", "calls"), [("darwin", set()), ("win32", {"python/pissa/system.py"})])
def test_only_one_module_calls_what_other_systems_lack(system: str, calls: set[str], tmp_path: Path) -> None:
    """As mypy knows it, from typeshed. `make quick` on macOS asks the same of mypy there."""
    options = ["--config-file", "pyproject.toml", "--platform", system, "--cache-dir", str(tmp_path)]
    command = [sys.executable, "-m", "mypy", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert set(re.findall(r"^(.+?):\d+: error", run.stdout, flags=re.MULTILINE)) == calls, run


@pytest.mark.parametrize(("system", "typed"), [("linux", "pissa chat 'my run'"), ("win32", 'pissa chat "my run"')])
def test_a_command_is_quoted_as_its_shell_reads_it(system: str, typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    assert shell("pissa", "chat", "my run") == typed


def test_without_an_exec_the_status_is_that_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    program = ["-c", "import os, sys; sys.exit(int(os.environ['STATUS']))"]
    assert run_instead(sys.executable, program, os.environ | {"STATUS": "7"}) == 7


def test_texts_are_the_same_bytes_on_every_system() -> None:
    """Windows' Python would write the line break of Windows, and read and write a locale's characters: files that are
    read elsewhere come from staged.write_text, and what is opened as text says both."""
    for path in (ROOT / "python/pissa").rglob("*.py"):
        for call in filter(lambda node: isinstance(node, ast.Call), ast.walk(ast.parse(path.read_text("utf-8")))):
            name, given = ast.unparse(call.func).rpartition(".")[2], {option.arg for option in call.keywords}
            where = f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"
            if name == "write_text":
                assert isinstance(call.func, ast.Name), f"{where}; allowed: staged.write_text"
            if name == "read_text":
                assert "encoding" in given, f"{where}; needed: encoding"
            if name == "open" and (modes := [a.value for a in call.args if isinstance(getattr(a, "value", None), str)]):
                assert "b" in modes[-1] or {"encoding", "newline"} <= given, f"{where}; needed: encoding, newline"
