"""Before `up` starts anything: ports, addresses, folders, the first key."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tunewright.cli import main, serving
from tunewright.core.durable import Lock
from tunewright.core.errors import Busy, UserError
from tunewright.core.home import Home
from tunewright.core.run import Run


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        yield s.getsockname()[1]


def test_a_port_in_use_is_one_message_with_the_nearest_free_one(
    home: Home, taken: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["up", "--port", str(taken), "--home", str(home.root)]) == 69
    err = capsys.readouterr().err
    assert err.startswith(f"Error: Port {taken} on 127.0.0.1 is in use") and err.count("\n") == 1
    free = int(err.rsplit("--port ", 1)[1])
    assert free > taken and serving.can_bind("127.0.0.1", free)


def test_the_dashboards_port_moves_unless_it_was_asked_for(home: Home, taken: int) -> None:
    if not serving.can_bind("127.0.0.1", taken - 1):
        pytest.skip("the port below is in use by another program")
    place = serving.choose_place(home, "127.0.0.1", taken - 1, None, False, False)
    assert place.web_port is not None and place.web_port > taken
    with pytest.raises(Busy, match="--web-port"):
        serving.choose_place(home, "127.0.0.1", taken - 1, taken, False, False)
    with pytest.raises(UserError, match="cannot both use"):
        serving.choose_place(home, "127.0.0.1", taken - 1, taken - 1, False, False)
    assert serving.choose_place(home, "127.0.0.1", taken - 1, None, True, False).web_port is None


def test_open_is_for_this_machine_only(home: Home) -> None:
    with pytest.raises(UserError, match=r"refused on 0\.0\.0\.0"):
        serving.choose_place(home, "0.0.0.0", 18000, None, True, True)


def test_an_address_of_another_machine_is_refused(home: Home) -> None:
    with pytest.raises(UserError, match=r"'192\.0\.2\.1' is not an address of this machine"):
        serving.choose_place(home, "192.0.2.1", 18000, None, True, False)


def test_a_folder_in_use_by_another_server_is_one_message(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    with Lock(home.root / "server.lock"):
        assert main.run(["up", "--port", "18765", "--home", str(home.root)]) == 69
    err = capsys.readouterr().err
    assert "in use by another tunewright server" in err and err.count("\n") == 1


def test_the_first_key_is_made_once(home: Home) -> None:
    assert serving.make_first_key(home, open=True) is None
    key = serving.make_first_key(home)
    assert key is not None and key.startswith("sk-")
    assert serving.make_first_key(home) is None


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:8000"), ("0.0.0.0", "http://127.0.0.1:8000"), ("::1", "http://[::1]:8000"),
     ("::", "http://[::1]:8000"), ("box.local", "http://box.local:8000")],
)  # fmt: skip
def test_urls_can_be_opened_here(home: Home, host: str, url: str) -> None:
    assert serving.Place(home, host, 8000, 8001, False).url(8000) == url


def test_the_children_get_what_they_need(home: Home) -> None:
    api, web = serving.make_children(serving.Place(home, "127.0.0.1", 8000, 8001, True))
    assert "--open" in api.command and "--open" in web.command
    assert api.env["TUNEWRIGHT_HOME"] == str(home.root)
    assert "http://127.0.0.1:8000" in web.command and "8001" in web.command
    (only,) = serving.make_children(serving.Place(home, "127.0.0.1", 8000, None, False))
    assert "--open" not in only.command and str(home.root / "signin-token") in only.command


def test_jobs_that_train_on_are_named(home: Home) -> None:
    run = Run(home.runs / "ftjob-1")
    run.folder.mkdir()
    (run.folder / "job.json").write_text("{}")
    assert serving.still_training(home) == []
    with Lock(run.lock):
        assert "ftjob-1" in serving.still_training(home)[0]
