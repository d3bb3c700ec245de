"""The processes in which answers are scored. `integration/scoring.py` runs this file; it does not import torch.

The first process imports the data sets, forks, and never receives an answer. Its child drops its privileges, reads
pickled requests of the trainer from standard input and answers each with a `REPLY`, of which nothing is unpickled. A
child that ends at its CPU limit, or because a scorer's code did something forbidden, is replaced by the next fork
within milliseconds. Both end when their input does.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import pickle
import resource
import signal
import struct
import sys
import time
from typing import Any, BinaryIO

REPLY = struct.Struct("<Bdd")  # index into KINDS, the score, CPU seconds
KINDS = ("score", "unbuildable", "cpu", "forbidden", "died")
FORBIDDEN = 77  # exit status: a scorer's code asked for a file, a process, a socket or a native library
MEMORY = 2 << 30  # bytes of address space; 200 MB are in use when the data sets are imported

_libc = ctypes.CDLL(None, use_errno=True)
_READS = {"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr"}
_FAMILIES = ("os.", "shutil.", "tempfile.", "subprocess.", "pty.", "socket.", "ctypes.", "mmap.", "fcntl.", "syslog.")


def limit(which: int, value: int) -> None:
    """Lower a limit permanently; one that is lower already stays."""
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def set_limits() -> None:
    """No bytes into files, no further processes or threads (root is exempt from that), no core, bounded memory."""
    for which in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
        limit(which, 0)
    limit(resource.RLIMIT_NOFILE, 32)
    if sys.platform != "darwin":  # refuses any limit of the address space
        limit(resource.RLIMIT_AS, MEMORY)


def leave_network() -> bool:
    """Move into a network namespace without interfaces; False where the kernel has none or does not allow it."""
    if not hasattr(_libc, "unshare"):
        return False
    new_user, new_network = 0x10000000, 0x40000000
    return _libc.unshare(new_network) == 0 or _libc.unshare(new_user | new_network) == 0


def drop_capabilities() -> None:
    """Drop all capabilities, except that root keeps the one to read files, since scorers import lazily."""
    if not hasattr(_libc, "capset"):
        return
    header = struct.pack("<Ii", 0x20080522, 0)  # version 3, this process
    read_any_file = 1 << 2 if os.geteuid() == 0 else 0
    _libc.capset(header, struct.pack("<6I", read_any_file, read_any_file, 0, 0, 0, 0))


def make_read_only() -> bool:
    """Landlock: nothing is written, created, removed or executed, no TCP, no signal to others; False without it."""
    create, restrict = 444, 446  # the numbers of both calls on every architecture
    if sys.platform != "linux" or (abi := _libc.syscall(create, None, 0, 1)) < 1:
        return False
    last = {1: 12, 2: 13, 3: 14, 4: 14}.get(abi, 15)  # the newest right over files that this kernel knows
    reads = 1 << 2 | 1 << 3  # of files, of directories
    files = (1 << (last + 1)) - 1 & ~reads
    rules = struct.pack("<QQQ", files, 0b11, 0b11)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    _libc.prctl(38, 1, 0, 0, 0)  # no new privileges: asked for by Landlock
    handle = _libc.syscall(create, rules, len(rules), 0)
    done = handle >= 0 and _libc.syscall(restrict, handle, 0) == 0
    if handle >= 0:
        os.close(handle)
    return done


def forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: no sandbox, since Python code can bypass it, but ordinary calls of this kind end the worker."""
    if event == "open":
        _, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if writes or (isinstance(mode, str) and set(mode) & set("wax+")):
            os._exit(FORBIDDEN)
    elif event.startswith(_FAMILIES) and event not in _READS:
        os._exit(FORBIDDEN)


@functools.lru_cache(maxsize=4)
def build(specification: bytes) -> Any:
    """The data set of a pickled (name, keyword arguments)."""
    import reasoning_gym

    name, options = pickle.loads(specification)
    return reasoning_gym.create_dataset(name, **options)


def score(dataset: Any, entry: dict[str, Any], text: str, seconds: float) -> float:
    """The data set's own score, 0 if it raises; the process ends after `seconds` of CPU time."""
    used = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + math.ceil(seconds) + 2, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds)  # exact where the limit counts whole seconds
    try:
        value = float(dataset.score_answer(text, entry))
    except BaseException:  # SystemExit too: the text is arbitrary, and one that makes the scorer raise is not right
        return 0.0
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return value if math.isfinite(value) else 0.0


def serve(requests: BinaryIO, replies: int) -> None:
    """The child: give up privileges, then score until the input ends."""
    _libc.prctl(1, signal.SIGKILL, 0, 0, 0) if hasattr(_libc, "prctl") else None  # if its parent ends
    make_read_only()
    drop_capabilities()
    set_limits()
    sys.addaudithook(forbid)
    while True:
        try:
            specification, entry, text, seconds = pickle.load(requests)  # the trainer's, which is trusted
        except EOFError:
            return
        try:
            dataset = build(specification)
        except Exception:
            os.write(replies, REPLY.pack(KINDS.index("unbuildable"), 0.0, 0.0))
            continue
        start = time.process_time()
        value = score(dataset, entry, text, seconds)
        os.write(replies, REPLY.pack(KINDS.index("score"), value, time.process_time() - start))


def main() -> None:
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    leave_network()  # before numpy is imported: a process with threads is not allowed to
    import reasoning_gym  # noqa: F401

    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # so that output of a scorer is not read as a reply
        os.dup2(null, standard)
    os.write(replies, b"\n")
    while child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:  # the input has ended
            return
        ends = {-signal.SIGPROF: "cpu", -signal.SIGXCPU: "cpu", FORBIDDEN: "forbidden"}
        os.write(replies, REPLY.pack(KINDS.index(ends.get(status, "died")), 0.0, 0.0))
    serve(requests, replies)


if __name__ == "__main__":
    main()
