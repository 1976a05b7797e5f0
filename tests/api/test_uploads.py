"""Uploads: streamed, hashed, limited; a refused one leaves nothing on the disk."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from live import LiveServer

import tiny

ROWS = "".join(json.dumps(r) + "\n" for r in tiny.sft_rows(12)).encode()


def upload(http: httpx.Client, data: bytes, name: str = "train.jsonl", purpose: str = "fine-tune") -> httpx.Response:
    return http.post("/v1/files", files={"file": (name, data)}, data={"purpose": purpose})


def leftovers(server: LiveServer) -> list[Path]:
    return list((server.home / "files").glob(".upload-*"))


def test_bytes_lie_by_hash_once(http: httpx.Client, server: LiveServer) -> None:
    rows = ROWS + json.dumps({"messages": [], "only": "in this test"}).encode()
    first, second = upload(http, rows).json(), upload(http, rows, "again.jsonl").json()
    digest = hashlib.sha256(rows).hexdigest()
    blob = server.home / "files" / digest[:2] / digest
    assert blob.read_bytes() == rows and blob.stat().st_mode & 0o077 == 0
    http.delete(f"/v1/files/{first['id']}")
    assert http.get(f"/v1/files/{second['id']}/content").content == rows
    http.delete(f"/v1/files/{second['id']}")
    assert not blob.exists() and not leftovers(server)


def test_large_upload_round_trip(http: httpx.Client, server: LiveServer) -> None:
    row = json.dumps({"messages": [{"role": "user", "content": "x" * 9000}, {"role": "assistant", "content": "y"}]})
    data = (row + "\n").encode() * 2000
    made = upload(http, data).json()
    assert made["bytes"] == len(data)
    got = http.get(f"/v1/files/{made['id']}/content")
    assert hashlib.sha256(got.content).digest() == hashlib.sha256(data).digest()
    assert got.headers["content-type"] == "application/octet-stream"
    http.delete(f"/v1/files/{made['id']}")


@pytest.mark.parametrize("name", ["../../../etc/passwd", "..\\x.jsonl", "a\x00b\n.jsonl", "ü 文.jsonl", '"q".jsonl'])
def test_a_file_name_is_never_a_path(http: httpx.Client, server: LiveServer, name: str) -> None:
    made = upload(http, ROWS, name).json()
    assert "/" not in made["filename"] and "\\" not in made["filename"] and made["filename"].isprintable()
    content = http.get(f"/v1/files/{made['id']}/content")
    assert content.content == ROWS and "attachment" in content.headers["content-disposition"]
    http.delete(f"/v1/files/{made['id']}")


def test_other_row_formats(http: httpx.Client) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a"] * 12, "completion": ["b"] * 12}), table)
    array = json.dumps(tiny.sft_rows(12), indent=1).encode()
    for name, data in (("a.parquet", table.getvalue()), ("a.json", array), ("a.csv", b"prompt,completion\na,b\n")):
        response = upload(http, data, name)
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["empty"]),
        (b"[1,2]\nhello\n", ["JSONL", "Line 1"]),
        (b'{"a": 1}\nhello\n', ["2"]),
        ('{"a": 1}'.encode("utf-16"), ["UTF-16"]),
        (b"\x1f\x8b\x08\x00" + b"\0" * 50, ["gzip"]),
    ],
)
def test_what_is_not_rows_is_refused_and_leaves_nothing(
    http: httpx.Client, server: LiveServer, data: bytes, words: list[str]
) -> None:
    before = len(http.get("/v1/files").json()["data"])
    response = upload(http, data)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "file" and all(w in error["message"] for w in words), error
    assert len(http.get("/v1/files").json()["data"]) == before and not leftovers(server)


def test_other_purposes_take_any_bytes(http: httpx.Client) -> None:
    made = upload(http, b"\x89PNG\r\n\x1a\n", "a.png", "vision")
    assert made.status_code == 200 and made.json()["status"] == "processed"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "purpose"),
        ({"purpose": "fine-tune", "expires_after[seconds]": "3600"}, "expires_after[anchor]"),
        ({"purpose": "fine-tune", "expires_after[anchor]": "created_at"}, "expires_after[seconds]"),
        ({"purpose": "fine-tune", "expire": "1"}, "expire"),
    ],
)
def test_wrong_form_fields(http: httpx.Client, server: LiveServer, fields: dict[str, str], param: str) -> None:
    response = http.post("/v1/files", files={"file": ("a.jsonl", ROWS)}, data=fields)
    assert response.status_code == 400 and response.json()["error"]["param"] == param
    assert not leftovers(server)


def test_forms_that_are_none(http: httpx.Client, server: LiveServer) -> None:
    for headers, body in (
        ({"content-type": "application/json"}, b"{}"),
        ({"content-type": "multipart/form-data; boundary=x"}, b"nonsense"),
        ({"content-type": "multipart/form-data; boundary=x"}, b'--x\r\nContent-Disposition: form-data; name="file'),
        ({"content-type": "multipart/form-data"}, b""),
    ):
        response = http.post("/v1/files", content=body, headers=headers)
        assert response.status_code == 400, (headers, body)
        assert response.json()["error"]["message"]
    assert not leftovers(server)


def test_a_declared_size_over_the_limit_is_refused_before_it_is_sent(server: LiveServer) -> None:
    import socket

    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Length: 9999999999\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" % server.port
        )
        assert s.recv(100).startswith(b"HTTP/1.1 413")
