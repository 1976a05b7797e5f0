"""Workers as child processes on this machine, each in a session of its own, so that they outlive the server.

launch.lock in the run folder holds who was started (pid, creation time). The worker inherits the lock on it from the
moment of the fork, so there is no instant at which a started worker could be overlooked. The kernel frees it.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal as signals
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tunewright.core import outbound
from tunewright.core.durable import disk_full_is_clear, is_locked
from tunewright.core.errors import Busy, ModelNotFound
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.jobs.launchers import Launcher
from tunewright.models.catalogue import resolve

WORKER = (sys.executable, "-m", "tunewright.train.worker")
# what a worker may know of the server's environment: no keys, no tokens
PASSED_ON = (
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV",
    "LD_LIBRARY_PATH", "LD_PRELOAD", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_HOME",
    "CUDA_PATH", "NVIDIA_VISIBLE_DEVICES", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE", "TORCHINDUCTOR_CACHE_DIR", "TUNEWRIGHT_PYTHON_GRADERS",
)  # fmt: skip
# glibc gives blocks above 32 MiB back to the kernel at every free; fetching them again costs a page fault per 4 KiB
# Large pages where the kernel has some: rows of a matrix lie pages apart, and the table of small pages runs over. One
# arena: those of other threads (weights are read by several) have small pages only.
_KEEP_MEMORY = (
    "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=17179869184:"
    "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
)
_SAME_START_S = 2.0


def worker_env(home: Home, threads: int | None = None, online: bool = False) -> dict[str, str]:
    """The environment of a worker. threads: CPU threads, None leaves it to the worker. online: may use the hub."""
    env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    fixed = {
        "TUNEWRIGHT_HOME": str(home.root),
        "HF_HUB_OFFLINE": "0" if online else "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", _KEEP_MEMORY),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return {**env, **fixed, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}


def start_worker(
    run: Run, home: Home, threads: int | None = None, command: Sequence[str] = WORKER
) -> subprocess.Popen[bytes]:
    """Start the worker of `run` and return its process. Its output goes to worker.log in the run folder.

    Raises Busy while an earlier worker of the run, or anything it started, still lives.
    """
    spec = run.job().spec
    threads = threads or (None if spec.threads == "auto" else spec.threads)
    env = worker_env(home, threads, _needs_network(run, home))
    env |= outbound.environment(outbound.named_endpoints(spec.objective.options))
    lock = _take_launch_lock(run)
    try:
        with disk_full_is_clear("the worker's log"), open(run.folder / "worker.log", "ab") as log:
            process = subprocess.Popen(
                [*command, str(run.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                pass_fds=(lock,),
            )
        _note(lock, process)
    finally:
        os.close(lock)
    return process


def leader_alive(run: Run) -> bool:
    """Whether the worker process itself lives. A process that merely got its pid is not taken for it."""
    who = _started(run)
    return who is not None and _is(who["pid"], who["create_time"])


def worker_alive(run: Run) -> bool:
    """Whether the worker of `run`, or anything it started, still lives, whoever started it."""
    return is_locked(_launch_lock(run)) or run.is_active() or bool(_group(run))


def signal_group(run: Run, number: int) -> None:
    """Send a signal to the worker and everything in its process group."""
    for process in _group(run):
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue  # it ended by itself


def stop(run: Run, timeout: float = 30.0) -> bool:
    """Ask the worker to save and end; kill its whole group after `timeout` seconds. Whether it ended by itself."""
    signal_group(run, signals.SIGTERM)
    if _wait_gone(run, timeout):
        return True
    signal_group(run, signals.SIGKILL)
    _wait_gone(run, 10.0)
    return False


LAUNCHER = Launcher(start_worker, leader_alive, worker_alive, signal_group)


def _needs_network(run: Run, home: Home) -> bool:
    """Whether the base model must still be downloaded. A base that is unknown is the worker's to report."""
    try:
        return resolve(run.job().base, home).needs_network
    except ModelNotFound:
        return False


def _launch_lock(run: Run) -> Path:
    return run.folder / "launch.lock"


def _take_launch_lock(run: Run) -> int:
    fd = os.open(_launch_lock(run), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(fd)
        raise Busy(f"The job {run.id} is being trained by another process.") from e
    if run.is_active() or _group(run):
        os.close(fd)
        raise Busy(f"The job {run.id} is being trained by another process.")
    return fd


def _note(lock: int, process: subprocess.Popen[bytes]) -> None:
    """Write down who was started. If that fails, nobody was."""
    who = {"pid": process.pid, "create_time": _create_time(process.pid)}
    try:
        with disk_full_is_clear("the run folder"):
            os.ftruncate(lock, 0)
            os.pwrite(lock, json.dumps(who).encode(), 0)
    except BaseException:
        process.kill()
        process.wait()
        raise


def _create_time(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return time.time()


def _started(run: Run) -> dict[str, float] | None:
    """{"pid", "create_time"} of the last worker, or None."""
    try:
        who = json.loads(_launch_lock(run).read_bytes())
        return {"pid": int(who["pid"]), "create_time": float(who["create_time"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # never started, or the power went in the middle of noting it: then nothing lives


def _is(pid: float, create_time: float) -> bool:
    try:
        process = psutil.Process(int(pid))
        same = abs(process.create_time() - create_time) < _SAME_START_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _group(run: Run) -> list[psutil.Process]:
    """The living processes of the worker's group: its leader has the recorded start, or is gone already."""
    who = _started(run)
    if who is None or not _group_exists(int(who["pid"])) or not _same_start(who):
        return []
    return [p for p in psutil.process_iter() if _in_group(p, int(who["pid"]))]


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _same_start(who: dict[str, float]) -> bool:
    """Whether the group's leader is the process that was started, or gone (its number is not given out meanwhile)."""
    try:
        return abs(psutil.Process(int(who["pid"])).create_time() - who["create_time"]) < _SAME_START_S
    except psutil.NoSuchProcess:
        return True


def _in_group(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def _wait_gone(run: Run, timeout: float) -> bool:
    end = time.monotonic() + timeout
    while worker_alive(run):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
