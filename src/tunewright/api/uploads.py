"""A multipart upload streamed to disk and hashed on the way: memory stays flat whatever the size of the file."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from tunewright.api.errors import TooLarge
from tunewright.core.durable import disk_full_is_clear, fsync_path
from tunewright.core.errors import UserError
from tunewright.core.home import Home
from tunewright.core.ids import random_part

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FILE_BYTES = 512 * 1024 * 1024
MAX_FIELD_BYTES = 64 * 1024
MAX_FIELDS = 32
# room for the form's other fields and its boundaries
OVERHEAD_BYTES = 1024 * 1024


@dataclass
class Upload:
    """A form as it arrives. The file is in `path` (inside the data folder) until keep() or drop().

    fields: the other form fields. sha256: of the file's bytes, size: how many they are.
    """

    path: Path
    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    size: int = 0
    sha256: str = ""

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)

    def keep(self, home: Home) -> None:
        """Move the file to its place by hash; equal content is stored once."""
        blob = home.blob(self.sha256)
        blob.parent.mkdir(mode=0o700, exist_ok=True)
        os.replace(self.path, blob)
        fsync_path(blob.parent)


async def receive_upload(request: Request, home: Home) -> Upload:
    """Read the whole form. Raises UserError for a form that is not one and TooLarge beyond 512 MB."""
    boundary = _boundary(request)
    if int(request.headers.get("content-length") or 0) > MAX_FILE_BYTES + OVERHEAD_BYTES:
        raise TooLarge(_too_large(), param="file")
    upload = Upload(home.files / f".upload-{random_part(12)}.tmp")
    try:
        with disk_full_is_clear("the upload"), open(upload.path, "xb") as out:
            os.chmod(upload.path, 0o600)
            form = _Form(upload, out)
            await _feed(request, MultipartParser(boundary, form.callbacks()))
            out.flush()
            await run_in_threadpool(os.fsync, out.fileno())
        upload.sha256 = form.hash.hexdigest()
        _check_complete(upload, form)
    except BaseException:
        upload.drop()
        raise
    return upload


async def _feed(request: Request, parser: MultipartParser) -> None:
    try:
        async for block in request.stream():
            parser.write(block)
        parser.finalize()
    except MultipartParseError as e:
        raise UserError(f"The multipart form is damaged: {e}.", code="invalid_form") from e


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise UserError(
            "A file is uploaded as multipart/form-data with the fields 'purpose' and 'file'; this request has the "
            f"content type '{kind.decode('latin1') or 'none'}'.",
            code="invalid_form",
        )
    return boundary


def _check_complete(upload: Upload, form: _Form) -> None:
    if not form.ended:
        raise UserError("The upload broke off before its end. Send it again.", code="incomplete_upload", param="file")
    if upload.filename is None:
        raise UserError("Missing required parameter: 'file'.", code="missing_required_parameter", param="file")


def _too_large() -> str:
    return f"The file is larger than the limit of {MAX_FILE_BYTES // (1024 * 1024)} MB. Split it into several files."


class _Form:
    """The parser's callbacks: the part named `file` goes to disk, every other part is a small text field."""

    def __init__(self, upload: Upload, out: BinaryIO) -> None:
        self.upload = upload
        self.out = out
        self.hash = hashlib.sha256()
        self.ended = False
        self._header = (b"", b"")
        self._name = ""
        self._text = b""

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._on_header(data[start:end], b""),
            "on_header_value": lambda data, start, end: self._on_header(b"", data[start:end]),
            "on_header_end": self._end_header,
            "on_part_data": lambda data, start, end: self._data(data[start:end]),
            "on_part_end": self._end,
            "on_end": self._end_of_form,
        }

    def _begin(self) -> None:
        self._name, self._text, self._header = "", b"", (b"", b"")

    def _on_header(self, name: bytes, value: bytes) -> None:
        self._header = (self._header[0] + name, self._header[1] + value)

    def _end_header(self) -> None:
        name, value = self._header
        self._header = (b"", b"")
        if name.lower() != b"content-disposition":
            return
        _, options = parse_options_header(value)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name == "file":
            if self.upload.filename is not None:
                raise UserError("The form has more than one 'file'. Upload one file a request.", param="file")
            self.upload.filename = _safe_name(options.get(b"filename", b"upload").decode("utf-8", "replace"))

    def _data(self, data: bytes) -> None:
        if self._name != "file":
            self._text += data
            if len(self._text) > MAX_FIELD_BYTES:
                raise TooLarge(f"The form field '{self._name[:80]}' is larger than {MAX_FIELD_BYTES} bytes.")
            return
        self.upload.size += len(data)
        if self.upload.size > MAX_FILE_BYTES:
            raise TooLarge(_too_large(), param="file")
        self.hash.update(data)
        self.out.write(data)

    def _end(self) -> None:
        if self._name == "file":
            return
        if len(self.upload.fields) >= MAX_FIELDS:
            raise UserError(f"The form has more than {MAX_FIELDS} fields.", code="invalid_form")
        self.upload.fields[self._name] = self._text.decode("utf-8", "replace")

    def _end_of_form(self) -> None:
        self.ended = True


def _safe_name(name: str) -> str:
    """The last part of a client's file name, without control characters. It is shown, never used as a path."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in last if c.isprintable())[:255] or "upload"
