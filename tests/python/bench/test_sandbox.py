"""bench.experiments.evaluation.sandbox: programs that try to break out, to take all there is, and to cheat."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
MIB = 1 << 20
ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    from bench.experiments.evaluation import sandbox

    return sandbox


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder of the machine that everybody may read and write."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def named(name: str) -> list[str]:
    """The machine's processes that call themselves so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            found += [str(path)] if path.read_text().strip() == name else []
        except OSError:  # ended meanwhile
            continue
    return found


def call_itself(name: str) -> str:
    return f"import ctypes; ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)  # PR_SET_NAME\n"


def test_a_program_passes_if_it_reaches_its_end(sandbox: ModuleType) -> None:
    program = """
import dataclasses, math, os, re, sys

@dataclasses.dataclass
class Point:
    x: "int"

assert Point(1) == Point(1) and __name__ == "program" and not sys.argv[1:]
assert os.getcwd() == "/work" and os.listdir() == []
with open("file", "w") as file:
    file.write("x")
assert open("file").read() == "x"
"""
    assert sandbox.run(program) == (True, "passed", "")
    assert sandbox.run(program).passed  # and what it has written is gone


@pytest.mark.parametrize(
    ("program", "reason", "stderr"),
    [
        ("assert 1 == 2, 'no'", "failed", "AssertionError: no"),
        ("x = (", "failed", "SyntaxError"),
        ("x = '\0'", "failed", "null bytes"),
        ("import sys\nsys.exit(0)\nassert False", "left before its end", ""),
        ("import os\nos._exit(0)\nassert False", "left before its end", ""),
        ("import os, sys\nos.execv(sys.executable, ['python', '-I', '-S', '-c', ''])", "left before its end", ""),
        ("import ctypes\nctypes.string_at(0)\n", "killed by SIGSEGV", ""),
        ("def f():\n    f()\nf()", "failed", "RecursionError"),
        ("x = bytearray(1 << 30)", "out of memory", ""),
        ("x = []\nwhile True:\n    x.append(bytes(1000))", "out of memory", ""),
    ],
)
def test_what_does_not_reach_its_end_does_not_pass(program: str, reason: str, stderr: str, sandbox: ModuleType) -> None:
    outcome = sandbox.run(program)
    assert (outcome.passed, outcome.reason) == (False, reason)
    assert stderr in outcome.stderr


def test_recursion_as_deep_as_the_stack_ends(sandbox: ModuleType) -> None:
    program = "import sys\nsys.setrecursionlimit(10**9)\nf = lambda _: sorted([1], key=f)\nf(0)"
    assert sandbox.run(program).reason in ("killed by SIGSEGV", "failed", "out of memory")  # as Python's version has it


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(1000)"])
def test_time_ends(program: str, sandbox: ModuleType) -> None:
    name = "t" + os.urandom(6).hex()
    outcome = sandbox.run(call_itself(name) + program, sandbox.Limits(seconds=0.5))
    assert outcome == (False, "timed out", "")
    assert named(name) == []


def test_processor_time_ends(sandbox: ModuleType) -> None:
    outcome = sandbox.run("while True: pass", sandbox.Limits(seconds=60, cpu_seconds=1))
    assert outcome == (False, "timed out", "")


def test_limits_are_what_they_are_said_to_be(sandbox: ModuleType) -> None:
    program = """
from resource import *
assert [getrlimit(limit) for limit in (RLIMIT_CPU, RLIMIT_AS, RLIMIT_FSIZE, RLIMIT_CORE, RLIMIT_NPROC)] == [
    (2, 2), (99 << 20,) * 2, (7 << 20,) * 2, (0, 0), (6, 6)]
try:
    files = [open("/program.py") for _ in range(100)]
except OSError as error:
    assert error.errno == 24
else:
    assert False
"""
    limits = sandbox.Limits(cpu_seconds=2, memory=99 * MIB, storage=7 * MIB, processes=5)
    assert sandbox.run(program, limits) == (True, "passed", "")


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("open('file', 'wb').write(bytes(2 << 20))", "File too large"),
        ("for i in range(8):\n    open(str(i), 'wb').write(bytes(1 << 18))", "No space left"),
        ("for i in range(2000):\n    open(str(i), 'w').close()", "No space left"),
    ],
)
def test_storage_ends(program: str, error: str, sandbox: ModuleType) -> None:
    outcome = sandbox.run(program, sandbox.Limits(storage=MIB))
    assert outcome.reason == "failed"
    assert error in outcome.stderr


def test_output_costs_nothing(sandbox: ModuleType) -> None:
    assert sandbox.run("import os\nfor _ in range(1000):\n    os.write(1, bytes(1 << 20))") == (True, "passed", "")
    outcome = sandbox.run("import os\nfor _ in range(1000):\n    os.write(2, b'x' * (1 << 18))")
    assert outcome == (False, "failed", "x" * 2000)


def test_files_of_the_machine_are_not_there(sandbox: ModuleType, readable: Path) -> None:
    (readable / "secret").write_text("s")
    paths = ["/etc/passwd", "/tmp", "/proc", "/sys", "/dev", str(Path.home() / ".bashrc"), str(readable / "secret")]
    program = f"import os\nfound = [path for path in {paths} if os.path.lexists(path)]\nassert found == [], found"
    assert sandbox.run(program) == (True, "passed", "")
    # nor by the way back
    back = "../" * 20 + str(readable / "secret")
    assert "FileNotFoundError" in sandbox.run(f"open({back!r})").stderr


def test_files_that_are_open_are_not_inherited(sandbox: ModuleType, readable: Path) -> None:
    program = """
import os
open_ones = []
for number in range(3, 64):
    try:
        os.fstat(number)
    except OSError:
        continue
    open_ones.append(number)
assert len(open_ones) == 2, open_ones  # the two pipes
assert os.read(0, 1) == b""
"""
    with open(readable / "secret", "w") as secret:
        os.set_inheritable(secret.fileno(), True)
        assert sandbox.run(program) == (True, "passed", "")


def test_nothing_is_left_behind(sandbox: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert sandbox.run("open('file', 'w').close()").passed
    assert not sandbox.run("open('file', 'w').close()\n1 / 0").passed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["/x", "/usr/lib/x", "{library}/x", "/../x"])
def test_files_outside_the_folder_are_read_only(path: str, sandbox: ModuleType) -> None:
    outcome = sandbox.run(f"open({path.format(library=os.path.dirname(os.__file__))!r}, 'a')")
    assert "Read-only file system" in outcome.stderr


def test_a_server_of_the_machine_is_not_reached(sandbox: ModuleType) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=1)"
        outcome = sandbox.run(connect)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert outcome.reason == "failed"
    assert "PermissionError" in outcome.stderr


def test_the_network_is_empty_and_its_loopback_down(sandbox: ModuleType) -> None:
    program = """
import fcntl, socket, struct
pair, _ = socket.socketpair()
flags = fcntl.ioctl(pair.fileno(), 0x8913, struct.pack("16sH22x", b"lo", 0))  # SIOCGIFFLAGS
assert struct.unpack_from("H", flags, 16)[0] & 1 == 0
"""
    assert sandbox.run(program) == (True, "passed", "")


def test_the_environment_and_other_processes_are_not_seen(sandbox: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "s")
    program = f"""
import os
assert not os.environ.keys() - {{"LC_CTYPE"}}, os.environ
assert (os.getpid(), os.getppid()) == (1, 0)
try:
    os.kill({os.getpid()}, 0)
except ProcessLookupError:
    pass
else:
    assert False
"""
    assert sandbox.run(program) == (True, "passed", "")


def test_a_program_is_one_process_unless_it_is_given_more(sandbox: ModuleType) -> None:
    assert "BlockingIOError" in sandbox.run("import os\nos.fork()").stderr
    assert "can't start new thread" in sandbox.run("import threading\nthreading.Thread(target=print).start()").stderr


def test_a_fork_bomb_is_bounded(sandbox: ModuleType) -> None:
    name = "b" + os.urandom(6).hex()
    bomb = "import os, time\nfor number in range(100):\n    if os.fork() == 0:\n        time.sleep(100)"
    outcome = sandbox.run(call_itself(name) + bomb, sandbox.Limits(processes=10))
    assert "BlockingIOError" in outcome.stderr
    assert named(name) == []


@pytest.mark.parametrize("then", ["", "os._exit(1)", "time.sleep(100)"])
def test_no_child_outlives_its_program(then: str, sandbox: ModuleType) -> None:
    name = "c" + os.urandom(6).hex()
    program = f"""
import os, time
ready, tell = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        {call_itself(name).strip()}
        os.write(tell, b"x")
        time.sleep(100)
    os._exit(0)
assert os.read(ready, 1) == b"x"
print("started", file=__import__("sys").stderr)
{then}
"""
    outcome = sandbox.run(program, sandbox.Limits(seconds=2, processes=30))
    assert outcome.stderr == "started\n"
    assert outcome.reason == {"": "passed", "os._exit(1)": "failed"}.get(then, "timed out")
    assert named(name) == []


def test_a_stopped_program_ends(sandbox: ModuleType) -> None:
    program = "import os\nchild = os.fork()\nif not child:\n    os.kill(os.getpid(), 19)\nos.waitpid(child, 0)"
    assert sandbox.run(program, sandbox.Limits(seconds=1, processes=30)).reason == "timed out"


def test_a_program_ends_with_the_process_that_waits_for_it(sandbox: ModuleType) -> None:
    name = "d" + os.urandom(6).hex()
    program = call_itself(name) + "import time\ntime.sleep(100)"
    code = f"from bench.experiments.evaluation.sandbox import *\nrun({program!r}, Limits(seconds=100))"
    waiting = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT)
    try:
        while not named(name):
            assert waiting.poll() is None
        waiting.send_signal(signal.SIGINT)
        waiting.wait()
        gone = time.monotonic() + 20
        while named(name):
            assert time.monotonic() < gone
    finally:
        waiting.kill()


def test_no_rights_are_left_or_gained(sandbox: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        monkeypatch.setattr(subprocess, "run", functools.partial(subprocess.run, extra_groups=[4]))
    program = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert 0 not in (*os.getresuid(), *os.getresgid())
assert os.getgroups() == {[] if os.geteuid() == 0 else os.getgroups()}
assert libc.prctl(39, 0, 0, 0, 0) == 1  # PR_GET_NO_NEW_PRIVS
header, data = (ctypes.c_uint * 2)(0x20080522, 0), (ctypes.c_uint * 6)(*[1] * 6)
assert libc.capget(header, data) == 0 and not any(data[i] for i in (0, 1, 3, 4))
calls = {{"unshare": (0x10000000,), "shmget": (0, 4096, 0o600), "memfd_create": (b"x", 0), "ptrace": (0, 0, 0, 0)}}
for name, arguments in calls.items():
    assert (getattr(libc, name)(*arguments), ctypes.get_errno()) == (-1, 1), name
"""
    assert sandbox.run(program) == (True, "passed", "")


def test_a_child_has_no_namespace_of_its_own(sandbox: ModuleType) -> None:
    from bench.experiments.evaluation.confine import CLONE, CLONE3, MACHINES, USER_NAMESPACE

    column = MACHINES[os.uname().machine][0]
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert (libc.syscall({CLONE[column]}, {USER_NAMESPACE | signal.SIGCHLD}, 0, 0, 0, 0), ctypes.get_errno()) == (-1, 1)
assert (libc.syscall({CLONE3[column]}, 0, 0), ctypes.get_errno()) == (-1, 38)
"""
    assert sandbox.run(program, sandbox.Limits(processes=30)) == (True, "passed", "")


@pytest.mark.parametrize(
    ("forbidden", "said"),
    [
        ("unshare", "no mount namespace: unshare failed" if os.geteuid() == 0 else "no user namespace: unshare failed"),
        ("mount", "mounts are shared: mount failed"),
    ],
)
def test_a_machine_that_cannot_keep_a_promise_runs_nothing(forbidden: str, said: str, sandbox: ModuleType) -> None:
    code = f"""
from bench.experiments.evaluation import confine, sandbox
confine.forbid([{forbidden!r}])
try:
    print(sandbox.run(""))
except sandbox.NoSandboxError as error:
    print("refused:", error)
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"refused: no sandbox on this machine, so no code was run: {said}")


def test_an_unknown_processor_has_no_filter(sandbox: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.experiments.evaluation import confine

    monkeypatch.setattr(confine.platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="no filter of system calls for riscv64, only for x86_64, aarch64"):
        confine.forbid(["mount"])


def test_a_machine_whose_python_does_not_run_inside_is_refused(
    sandbox: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.require()
    monkeypatch.setattr(sandbox, "run", lambda program: sandbox.Outcome(False, "failed", "no libpython"))
    with pytest.raises(sandbox.NoSandboxError, match=r"an empty program does not pass .*: failed: no libpython"):
        sandbox.require()


@pytest.mark.skipif(os.geteuid() != 0, reason="all tests here are of an ordinary user, then")
def test_an_ordinary_user_has_the_same_walls(sandbox: ModuleType, readable: Path) -> None:
    """In a user namespace, by a Python that everybody may start. What the two ways share is tested above."""
    for name in ("sandbox.py", "confine.py"):
        shutil.copy(Path(sandbox.__file__).with_name(name), readable / name)
    program = f"""
import ctypes, os
assert os.getuid() == 12345 and os.getpid() == 1
assert not os.path.exists("/etc/passwd") and not os.path.exists({str(readable)!r})
data = (ctypes.c_uint * 6)(*[1] * 6)
assert ctypes.CDLL(None).capget((ctypes.c_uint * 2)(0x20080522, 0), data) == 0 and not any(data[:2] + data[3:5])
open("file", "w").close()
for path in ("/x", "/usr/lib/x"):
    try:
        open(path, "w")
    except OSError as error:
        assert error.errno == 30, error
    else:
        assert False
try:
    os.fork()
except BlockingIOError:
    pass
else:
    assert False
"""
    code = f"import sys\nsys.path.insert(0, {str(readable)!r})\nimport sandbox\nprint(sandbox.run({program!r}))"
    run = subprocess.run(
        [shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable, "-c", code],
        user=12345,
        group=12345,
        extra_groups=[],
        env={"PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "Outcome(passed=True, reason='passed', stderr='')\n", run.stderr
