"""What doctor says of a machine, from facts that a test can make."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tunewright.cli import health, main
from tunewright.core.durable import Lock
from tunewright.core.home import Home

FLAGS = "processor: 0\nflags\t\t: fpu sse2 avx2 {} \n"


@pytest.fixture
def taken() -> tuple[socket.socket, int]:
    s = socket.socket()
    s.bind(("127.0.0.1", 0))
    s.listen()
    return s, s.getsockname()[1]


@pytest.mark.parametrize(
    ("flags", "level", "text"),
    [
        ("amx_bf16 avx512_bf16", "ok", "AMX, AVX-512 BF16"),
        ("avx512_bf16", "ok", "(AVX-512 BF16)"),
        ("", "note", "no bf"),
    ],
)
def test_cpu_says_whether_bfloat16_is_in_hardware(tmp_path: Path, flags: str, level: str, text: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(FLAGS.format(flags))
    check = health.cpu(cpuinfo)
    assert check.level == level and text in check.text and "cores" in check.text
    assert health.cpu(tmp_path / "none").level == "ok"


@pytest.mark.parametrize(
    ("version", "safe"),
    [((3, 40, 1), False), ((3, 51, 2), False), ((3, 51, 3), True), ((3, 53, 4), True), ((3, 44, 6), True),
     ((3, 44, 5), False), ((3, 50, 7), True), ((3, 50, 6), False), ((3, 45, 9), False)],
)  # fmt: skip
def test_sqlite_engines_with_the_defect_are_known(version: tuple[int, ...], safe: bool) -> None:
    assert health.sqlite_is_safe(version) is safe


def test_this_environment_is_sound(home: Home) -> None:
    assert health.sqlite().level == "ok"
    assert health.packages() == health.Check("packages", "ok", "all dependencies in their ranges")
    assert health.data_folder(home).level == "ok"


def test_a_missing_or_too_old_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "requires", lambda _: ["pydantic>=999", "no-such-package", "gone; extra == 'dev'"])
    check = health.packages()
    assert check.level == "bad" and "pydantic>=999 (here: " in check.text
    assert "no-such-package (here: missing)" in check.text and "gone" not in check.text


@pytest.mark.parametrize(
    ("built_for", "cuda", "level", "text"),
    [(None, False, "ok", "CPU build"), ("13.0", False, "note", "no GPU is usable"), ("13.0", True, "ok", "H200")],
)
def test_torch_builds_are_told_apart(built_for: str | None, cuda: bool, level: str, text: str) -> None:
    info = {"version": "2.13.0", "threads": 2, "built_for": built_for, "cuda": cuda, "devices": ["NVIDIA H200"]}
    check = health.torch_check(info)
    assert check.level == level and text in check.text and (check.level == "ok" or check.fix)


def test_a_data_folder_that_cannot_be_written_is_bad(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = health.data_folder(Home(tmp_path / "file" / "home"))
    assert check.level == "bad" and "TUNEWRIGHT_HOME" in check.fix


def test_a_running_server_is_seen(home: Home) -> None:
    with Lock(home.root / "server.lock"):
        assert "in use by a running server" in health.data_folder(home).text


def test_a_port_in_use_names_a_free_one(taken: tuple[socket.socket, int]) -> None:
    _, port = taken
    check = health.port_free("127.0.0.1", port)
    assert check.level == "note"
    free = int(check.fix.split("; ")[1].split()[0])
    assert free != port and health.can_bind("127.0.0.1", free)


def test_doctor_exits_1_only_for_something_bad(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [health.Check("a", "ok", "fine"), health.Check("b", "note", "hm", "do this")]
    monkeypatch.setattr(health, "run_checks", lambda *_: iter(checks))
    assert main.run(["doctor", "--home", str(home.root)]) == 0
    checks.append(health.Check("c", "bad", "broken", "mend it"))
    assert main.run(["doctor", "--home", str(home.root)]) == 1
    out = capsys.readouterr().out
    assert "BAD  c" in out and "→ mend it" in out and "→ do this" in out
