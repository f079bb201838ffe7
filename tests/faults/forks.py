"""Runs a function in a forked process, which shares what this one has imported and loaded, and can be killed."""

import os
import random
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # the default lock is shared by processes, and a killed one keeps it


def start(work: Callable[[], object], log: Path, largest_file: int | None = None) -> int:
    """Start `work` in a process of its own.

    Args:
        work: What the process runs.
        log: The file that gets its output, and the traceback of an exception.
        largest_file: The limit of the size of its files in bytes, the stand-in for a full disk.

    Returns:
        `int`: The id of the process. Its exit status is 0 if `work` returned.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        output = descriptor if largest_file is None else os.open(os.devnull, os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        work()
        status = 0
    except BaseException:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.write(descriptor, traceback.format_exc().encode())
    finally:
        os._exit(status)


def end(pid: int) -> int:
    """Wait for a process. Returns its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(work: Callable[[], object], log: Path, largest_file: int | None = None) -> float:
    """Run `work` to its end. Returns the seconds that it took."""
    begin = time.monotonic()
    assert end(start(work, log, largest_file)) == 0, log.read_text()[-3000:]
    return time.monotonic() - begin


def kill(work: Callable[[], object], log: Path, seconds: float, source: random.Random) -> float:
    """Kill `work` at a random moment of the `seconds` that it takes. Returns the moment, or -1 if it ended before."""
    moment = source.uniform(0.02, 1) * seconds
    pid = start(work, log)
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)
    return moment if end(pid) == -signal.SIGKILL else -1
