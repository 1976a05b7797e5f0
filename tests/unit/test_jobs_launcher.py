"""Starting, finding and ending real processes; and the describe file."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from jobs_kit import FAKE, make_run, wait_for

from tunewright.core.errors import Busy, TunewrightError
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.jobs import describe
from tunewright.jobs.launchers import LAUNCHERS, local


@pytest.fixture
def run(home: Home) -> Iterator[Run]:
    made = make_run(home, script={"hold": {"1": [1]}})
    yield made
    local.signal_group(made, signal.SIGKILL)


def test_the_environment_has_what_a_worker_needs_and_no_secrets(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "SOMETHING"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    env = local.worker_env(home, threads=3)
    assert "secret" not in env.values()
    assert env["TUNEWRIGHT_HOME"] == str(home.root)
    assert (env["OMP_NUM_THREADS"], env["CUDA_VISIBLE_DEVICES"], env["HF_HUB_OFFLINE"]) == ("3", "1", "1")
    assert local.worker_env(home, online=True)["HF_HUB_OFFLINE"] == "0"


FREE = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="glibc only")
def test_freed_memory_is_kept_by_the_worker(home: Home) -> None:
    def faults(env: dict[str, str]) -> int:
        return int(subprocess.run([sys.executable, "-c", FREE], env=env, capture_output=True, check=True).stdout)

    env = local.worker_env(home)
    plain = faults({k: v for k, v in env.items() if k != "GLIBC_TUNABLES"})
    pages = (64 << 20) // resource.getpagesize()
    assert faults(env) < 2 * pages < 4 * pages < plain


def test_a_worker_is_in_its_own_session_with_its_output_in_the_log(run: Run, home: Home) -> None:
    process = FAKE.start(run, home)
    wait_for(run.is_active)
    assert os.getsid(process.pid) == process.pid != os.getsid(0)
    assert local.leader_alive(run) and local.worker_alive(run)
    assert (run.folder / "worker.log").exists()
    with pytest.raises(Busy, match="is being trained by another process"):
        FAKE.start(run, home)
    assert local.stop(run, 30)
    assert process.wait() == 75
    assert not local.leader_alive(run) and not local.worker_alive(run)


def test_a_worker_counts_as_alive_from_the_moment_it_is_started(home: Home) -> None:
    run = make_run(home, script={"late_lock": 30})
    process = FAKE.start(run, home)
    assert local.worker_alive(run) and not run.is_active()
    with pytest.raises(Busy):
        FAKE.start(run, home)
    process.kill()
    process.wait()
    assert not local.worker_alive(run)


def test_what_a_worker_leaves_behind_keeps_the_run_and_is_killed_with_it(home: Home) -> None:
    run = make_run(home, script={"hold": {"1": [1]}, "child": True})
    process = FAKE.start(run, home)
    wait_for((run.folder / "child.pid").exists)
    child = psutil.Process(int((run.folder / "child.pid").read_text()))
    process.kill()
    process.wait()
    assert not local.leader_alive(run)
    assert local.worker_alive(run)  # its child lives
    with pytest.raises(Busy):
        FAKE.start(run, home)
    assert not local.stop(run, 0.2)  # the child ignores SIGTERM
    assert not local.worker_alive(run)
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_a_process_that_got_the_same_number_is_left_alone(run: Run, home: Home) -> None:
    FAKE.start(run, home).kill()
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        wait_for(lambda: not local.worker_alive(run))
        who = {"pid": other.pid, "create_time": psutil.Process(other.pid).create_time() - 100}
        (run.folder / "launch.lock").write_text(json.dumps(who))
        assert not local.leader_alive(run) and not local.worker_alive(run)
        local.signal_group(run, signal.SIGKILL)
        time.sleep(0.1)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("note", [b"", b"{", b'{"pid": 1}', b"[]", b"null"])
def test_an_unreadable_note_means_that_nothing_lives(run: Run, note: bytes) -> None:
    (run.folder / "launch.lock").write_bytes(note)
    assert not local.worker_alive(run) and not local.leader_alive(run)


def test_launchers_are_a_table() -> None:
    assert LAUNCHERS.load("local") is local.LAUNCHER


# ---- the describe file ----

PRINTS = "import os; open(os.environ['TUNEWRIGHT_HOME'] + '/calls', 'a').write('x'); print('{\"tuner\": {}}')"


def test_the_describe_file_is_made_once_for_what_is_installed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe, "COMMAND", (sys.executable, "-c", PRINTS))
    assert describe.load_describe(home) == {"tuner": {}}
    assert describe.load_describe(home) == {"tuner": {}}
    assert (home.root / "calls").read_text() == "x"
    installed = describe._version
    monkeypatch.setattr(describe, "_version", lambda name: "9.9" if name == "peft" else installed(name))
    describe.load_describe(home)
    assert (home.root / "calls").read_text() == "xx"
    assert len(list(home.cache.glob("describe-*.json"))) == 1


def test_parts_that_cannot_be_loaded_are_one_clear_error(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe, "COMMAND", (sys.executable, "-c", "import nothing_like_this"))
    with pytest.raises(TunewrightError, match=r"No module named 'nothing_like_this'.*tunewright doctor"):
        describe.load_describe(home)
    assert not list(home.cache.glob("*.json"))


@pytest.mark.slow
def test_the_real_describe_file_has_every_kind(home: Home) -> None:
    found = describe.load_describe(home)
    assert {"tuner", "objective", "optimizer", "schedule"} <= set(found)
    assert "lora" in found["tuner"] and "sft" in found["objective"]
    row = found["tuner"]["lora"]
    assert row["schema"]["type"] == "object" and set(row["defaults"]) == set(row["schema"]["properties"])


def test_source_files_of_the_parts_are_watched() -> None:
    assert {Path(p).name for p in describe._source_files()} >= {"lora.py", "sft.py", "describe.py"}
