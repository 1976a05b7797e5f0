"""Python graders: what they may do, and hostile ones. What is killed is looked for in its own process namespace."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from shutil import which
from typing import Any

import psutil
import pytest

from tunewright.core.errors import Forbidden, SpecError, UserError
from tunewright.graders import sandbox
from tunewright.graders.base import Grade, Grader, Sample, parse_grader
from tunewright.graders.sandbox import VARIABLE, Ended, NoSandbox, Sandbox, choose_mode

GOOD = "def grade(sample, item):\n    return len(sample['output_text']) / item['most']\n"


@pytest.fixture(scope="module", autouse=True)
def confined() -> None:
    if why := sandbox.trouble():
        pytest.skip(f"no namespaces here: {why}")


def spec(source: str, timeout: float = 30.0) -> dict[str, Any]:
    return {"type": "python", "name": "p", "source": source, "tunewright": {"timeout": timeout}}


def run(body: str, timeout: float = 30.0, text: str = "abc", **item: Any) -> Grade:
    """The grade of a function with this body."""
    source = "import os, sys, time\ndef grade(sample, item):\n" + "".join(f"    {x}\n" for x in body.split("\n"))
    with parse_grader(spec(source, timeout)) as grader:
        return grader.grade(item, Sample(text))


def why(grade: Grade) -> str:
    """The details of a grader that failed at run time."""
    assert grade.reward == 0.0 and grade.errors["python_grader_runtime_error"] is True, grade
    return str(grade.errors["python_grader_runtime_error_details"])


# --- what they may do ------------------------------------------------------------------------------------------------


def test_it_sees_the_sample_and_the_item() -> None:
    with parse_grader(spec(GOOD)) as grader:
        assert [grader.grade({"most": 4}, Sample("x" * n)).reward for n in (0, 3, 8)] == [0.0, 0.75, 2.0]
    assert run("return sample['output_json']['a'] + item['b']", text='{"a": 1.5}', b=2).reward == 3.5
    assert run("return sample['output_json'] is None and sample['choices'][0]['message']['content'] == 'ä'",
               text="ä").reward == 1.0  # fmt: skip


@pytest.mark.slow
def test_it_has_the_packages_of_this_installation() -> None:
    assert run("import numpy\nreturn numpy.float32(0.5)").reward == 0.5


@pytest.mark.slow
def test_it_may_write_to_tmp_and_finds_it_empty() -> None:
    body = "n = len(os.listdir('/tmp'))\nopen('/tmp/x', 'w').write('y')\nreturn n + len(open('/tmp/x').read())"
    assert [run(body).reward for _ in range(2)] == [1.0, 1.0]


def test_globals_live_on_until_an_error() -> None:
    source = (
        "n = 0\ndef grade(sample, item):\n    global n\n    n += 1\n    return n / (sample['output_text'] != 'x')\n"
    )
    with parse_grader(spec(source)) as grader:
        rewards = [grader.grade({}, Sample(t)).reward for t in ("a", "a", "x", "a", "a")]
    assert rewards == [1.0, 2.0, 0.0, 1.0, 2.0]


LATER = """
import os, threading, time
def later():
    time.sleep(0.1)
    if sample_text == "end":
        os._exit(3)
    for n in range(3, 10):
        try:
            os.write(n, b'{"reward": 9.0}\\n')
        except OSError:
            pass
def grade(sample, item):
    global sample_text
    sample_text = sample["output_text"]
    threading.Thread(target=later).start()
    return 0.5
"""


@pytest.mark.parametrize("text", ["end", "speak"])
def test_one_that_ended_or_spoke_meanwhile_is_replaced(text: str) -> None:
    with parse_grader(spec(LATER)) as grader:
        for _ in range(2):
            assert grader.grade({}, Sample(text)).reward == 0.5
            (box,) = grader.work.idle
            deadline = time.monotonic() + 10
            while box.ready and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not box.ready


@pytest.mark.slow
def test_several_grade_at_once() -> None:
    body = "import time\ndef grade(sample, item):\n    time.sleep(0.05)\n    return float(sample['output_text'])\n"
    with parse_grader(spec(body)) as grader, ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda n: grader.grade({}, Sample(str(n))).reward, range(24)))
        assert found == [float(n) for n in range(24)]
        assert 1 <= len(grader.work.idle) <= 4
        pids = [box._process.pid for box in grader.work.idle]
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


# --- what is wrong with them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def grade(sample, item)\n    return 1", "line 1: expected ':'"),
        ("x = 1", "has no function grade"),
        ("(" * 5000, "parenthes"),
        ("#" + "x" * (256 << 10), "larger than 256 KiB"),
        ("def grade(s, i): return '\0'", "null"),
    ],
)
def test_sources_that_are_none(source: str, words: str) -> None:
    with pytest.raises(SpecError, match=words) as e:
        parse_grader(spec(source))
    assert e.value.param == "grader.source"


ERRORS = {
    "return 1 / 0": "line 3, in grade\n    return 1 / 0",
    "return None": "TypeError: grade() returned None",
    "return '1'": "TypeError: grade() returned '1'",
    "return float('nan')": "finite",
    "return item['missing']": "KeyError: 'missing'",
    "raise SystemExit(0)": "SystemExit: 0",
    "os._exit(0)": "ended with exit status 0 before grade() returned",
    "os.kill(os.getpid(), 9)": "was killed by signal 9",
    "raise BaseException('x' * 10_000_000)": "xxx",
    "def f(): f()\nf()": "RecursionError",
}


@pytest.mark.parametrize("body", ERRORS)
def test_errors_of_a_grader(body: str) -> None:
    found = why(run(body))
    assert ERRORS[body] in found and len(found) <= 4000


def test_a_source_that_cannot_be_loaded() -> None:
    with parse_grader(spec("import nothing_of_this_name\n" + GOOD)) as grader:
        assert "No module named 'nothing_of_this_name'" in why(grader.grade({"most": 1}, Sample("a")))


# --- hostile ones ----------------------------------------------------------------------------------------------------


class Watched:
    """A sandbox whose namespace is known. left(): its processes that still live, after up to 10 s."""

    def __init__(self, body: str, seconds: float) -> None:
        source = "import os, time\ndef grade(sample, item):\n" + "".join(f"    {x}\n" for x in body.split("\n"))
        self.box = Sandbox(source, seconds)
        (first,) = psutil.Process(self.box._process.pid).children()
        self.space = os.readlink(f"/proc/{first.pid}/ns/pid")
        assert self.space != os.readlink("/proc/self/ns/pid")

    def end(self) -> str:
        """Ask, and close. What it ended with."""
        with pytest.raises(Ended) as e:
            self.box.ask({"sample": {}, "item": {}})
        self.box.close()
        return str(e.value)

    def members(self) -> list[int]:
        found = []
        for pid in psutil.pids():
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/pid") == self.space:
                    found.append(pid)
        return found

    def left(self) -> list[int]:
        end = time.monotonic() + 10
        while (found := self.members()) and time.monotonic() < end:
            time.sleep(0.02)
        return found


FORK_BOMB = """
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
DAEMON = """
for _ in range(20):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        time.sleep(1000)
os.close(1); time.sleep(1000)
"""


@pytest.mark.parametrize("body", ["while True: pass", "time.sleep(1000)", FORK_BOMB, DAEMON])
def test_what_never_ends_is_killed_with_all_it_began(body: str) -> None:
    watched = Watched(body, 0.5)
    assert len(watched.members()) >= 2
    assert "took more than 0.5 s and was killed" in watched.end()
    assert watched.left() == []


@pytest.mark.slow
def test_a_fork_bomb_stays_small() -> None:
    watched = Watched(FORK_BOMB, 1.0)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(watched.end)
        most = 0
        while not ended.done():
            most = max(most, len(watched.members()))
    assert 10 < most <= 3 + sandbox.LIMITS["processes"]


def test_it_dies_with_whoever_asked() -> None:
    script = (
        "from tunewright.graders.sandbox import Sandbox; import psutil\n"
        "box = Sandbox('import time\\ndef grade(s, i): time.sleep(1000)', 1000.0)\n"
        "print(psutil.Process(box._process.pid).children()[0].pid, flush=True)\n"
        "box.ask({'sample': {}, 'item': {}})\n"
    )
    asker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert asker.stdout is not None
    pid = int(asker.stdout.readline())
    inside = psutil.Process(pid)
    asker.kill()
    asker.wait()
    asker.stdout.close()
    psutil.wait_procs([inside], timeout=10)
    assert not inside.is_running()


def test_memory_is_limited() -> None:
    assert "MemoryError" in why(run("return len(bytearray(10 << 30))"))
    assert run("return len(bytearray(100 << 20)) >> 20").reward == 100.0


@pytest.mark.slow
def test_disk_is_limited() -> None:
    body = "f = open('/tmp/big', 'wb')\nfor _ in range(400): f.write(bytes(1 << 20))"
    assert "File too large" in why(run(body))
    many = "for n in range(20):\n  with open(f'/tmp/{n}', 'wb') as f: f.write(bytes(40 << 20))"
    assert "No space left" in why(run(many))


def test_it_cannot_write_elsewhere() -> None:
    body = "open(sample['output_text'], 'w')\nreturn 1"
    source = (
        "def grade(sample, item):\n  try: open(sample['output_text'], 'w')\n  except OSError as e: return e.errno\n"
    )
    assert "Read-only file system" in why(run(body, text="/x"))
    with parse_grader(spec(source)) as grader:
        for place in ("/x", "/usr/x", "/etc/x", "/dev/x", f"{sys.prefix}/x"):
            assert grader.grade({}, Sample(place)).reward in (errno.EROFS, errno.EACCES), place
            assert not os.path.exists(place)


def test_it_cannot_read_what_is_others(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    secret.chmod(0o644)
    source = "def grade(sample, item):\n  try: open(sample['output_text'])\n  except OSError as e: return e.errno\n"
    with parse_grader(spec(source)) as grader:
        for place in (secret, "/etc/passwd", "/etc/shadow", "/proc/1/environ", Path.home() / ".bashrc"):
            assert grader.grade({}, Sample(str(place))).reward == errno.ENOENT, place
    assert run("return len(os.listdir('/tmp')) + len(os.listdir('/dev')) ").reward == 4.0
    assert run("return len({'boot', 'proc', 'run', 'sys', 'var'} & {*os.listdir('/')})").reward == 0.0


@pytest.mark.slow
def test_it_is_nobody() -> None:
    assert run("return os.getuid()").reward == 65534.0
    assert "PermissionError" in why(run("os.setuid(0)\nreturn 1"))
    mount = "import ctypes\nreturn ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None)"
    assert run(mount).reward == -1.0


def test_it_has_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        body = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\nreturn 1"
        assert "Network is unreachable" in why(run(body))
    assert "gaierror" in why(run("import socket\nreturn len(socket.getaddrinfo('example.com', 80))"))


def test_it_has_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert run("return len([v for v in os.environ.values() if 'secret' in v])").reward == 0.0
    assert run("return len([k for k in os.environ if 'TUNEWRIGHT' in k or 'KEY' in k])").reward == 0.0


@pytest.mark.slow
def test_it_sees_no_other_process() -> None:
    assert run("return os.getppid()").reward == 1.0
    assert "ProcessLookupError" in why(run(f"os.kill({os.getpid()}, 0)\nreturn 1"))
    run("os.kill(1, 9)\nos.kill(-1, 9)\nreturn 1")  # whatever it hits, it is its own


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["sys.stdout", "sys.stderr", "sys.__stdout__"])
def test_what_it_prints_goes_nowhere(stream: str) -> None:
    assert run(f"{stream}.write('x' * 50_000_000)\nreturn 0.5").reward == 0.5


@pytest.mark.slow
def test_it_may_lie_but_not_break_the_asker() -> None:
    """It can write to the pipe of the answers; what comes is its reward or no answer, and never more than a little."""
    for line in (b'{"reward": "high"}', b"[1]", b"x", b"\xff", b'{"reward": NaN}'):
        found = run(
            f"for fd in range(3, 10):\n  try: os.write(fd, {line!r} + b'\\n')\n  except OSError: pass\nreturn 1"
        )
        assert (found.reward, found.ok) == (0.0, False), line
    flood = "for fd in range(3, 10):\n  try:\n    while True: os.write(fd, b'x' * 65536)\n  except OSError: pass"
    assert "more than 64 KiB" in why(run(flood))


# --- where they may run ----------------------------------------------------------------------------------------------


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that cannot make namespaces."""
    start = sandbox._start

    def unable(folder: str, life: int, confined: bool) -> subprocess.Popen[bytes]:
        if not confined:
            return start(folder, life, confined)
        say = 'print(\'{"cannot": "unshare: Operation not permitted"}\')'
        return subprocess.Popen(
            [sys.executable, "-S", "-c", say], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            start_new_session=True,
        )  # fmt: skip

    monkeypatch.setattr(sandbox, "_start", unable)
    sandbox.trouble.cache_clear()
    yield
    sandbox.trouble.cache_clear()


@pytest.mark.usefixtures("limited")
def test_without_namespaces_they_run_only_when_that_was_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Forbidden, match=r"Operation not permitted.*TUNEWRIGHT_PYTHON_GRADERS=limited") as e:
        parse_grader(spec(GOOD))
    assert e.value.code == "python_grader_unavailable"
    monkeypatch.setenv(VARIABLE, "limited")
    assert run("return 0.5").reward == 0.5
    assert "took more than 0.3 s" in why(run("while True: pass", timeout=0.3))
    assert "MemoryError" in why(run("return len(bytearray(10 << 30))"))
    assert run("return len(os.environ) + len(os.listdir(os.environ['TMPDIR']))").reward <= 7


def test_they_may_be_switched_off() -> None:
    with pytest.raises(Forbidden, match="switched off"):
        choose_mode({VARIABLE: "off"})
    with pytest.raises(UserError, match="confined, limited, off"):
        choose_mode({VARIABLE: "on"})


def test_a_sandbox_that_is_gone_is_an_error_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    grader: Grader = parse_grader(spec(GOOD))

    def gone(*args: Any) -> Any:
        raise NoSandbox("no space for processes")

    monkeypatch.setattr("tunewright.graders.python.Sandbox", gone)
    found = grader.grade({"most": 1}, Sample("a"))
    assert found.errors == {
        "python_grader_server_error": True,
        "python_grader_server_error_type": "sandbox_unavailable",
    }
    assert "no space" in found.why


LOOKER = """
import ctypes, os
def grade(sample, item):
    mounted = ctypes.CDLL(None).mount(b"none", b"/tmp", b"tmpfs", 0, None)
    seen = [p for p in ("/etc/passwd", "/proc") if os.path.exists(p)]
    raise Exception((os.getuid(), os.getppid(), os.listdir("/tmp"), seen, mounted))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or which("setpriv") is None, reason="other users confine them like this anyway")
def test_they_are_confined_without_the_rights_of_root() -> None:
    """In a user namespace, which root does without."""
    script = (
        "import sys\nfrom tunewright.graders.sandbox import Sandbox\nbox = Sandbox(sys.argv[1], 10.0)\n"
        "print(box.ask({'sample': {}, 'item': {}})['error'].splitlines()[-1])\nbox.close()\n"
    )
    command = ["setpriv", "--bounding-set", "-sys_admin", sys.executable, "-c", script, LOOKER]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "Exception: (65534, 1, [], [], -1)\n"), done.stderr
