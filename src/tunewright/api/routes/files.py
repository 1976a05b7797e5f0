"""/v1/files: uploads kept by hash, listed, read back, deleted."""

from __future__ import annotations

import time
from typing import Annotated, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from tunewright.api import present
from tunewright.api.errors import parse
from tunewright.api.filecheck import check_upload
from tunewright.api.lookup import find_file, is_expired
from tunewright.api.requests import CreateFile
from tunewright.api.schemas import Deleted, File, ListPage
from tunewright.api.state import Server, server_of
from tunewright.api.uploads import Upload, receive_upload
from tunewright.core.errors import UserError
from tunewright.core.ids import new_id
from tunewright.jobs.rows import FileRow, Page

router = APIRouter()

NOT_DOWNLOADABLE = ("assistants", "user_data")
BATCH_SECONDS = 30 * 24 * 3600


@router.post("/v1/files")
async def create_file(request: Request) -> File:
    """Stream the form to disk, look at it, keep it. A refused file leaves nothing behind."""
    server = server_of(request)
    upload = await receive_upload(request, server.home)
    try:
        row = await run_in_threadpool(_accept, server, upload)
    finally:
        upload.drop()
    return present.file(row)


def _accept(server: Server, upload: Upload) -> FileRow:
    form = parse(CreateFile, upload.fields)
    filename = upload.filename or "upload"
    check_upload(upload.path, filename, form.purpose)
    now = int(time.time())
    seconds = form.seconds if form.seconds is not None else BATCH_SECONDS if form.purpose == "batch" else None
    if (form.anchor is None) != (form.seconds is None):
        missing = "expires_after[seconds]" if form.seconds is None else "expires_after[anchor]"
        raise UserError(f"Missing required parameter: '{missing}'.", param=missing, code="missing_required_parameter")
    row = FileRow(
        id=new_id("file-"),
        bytes=upload.size,
        created_at=now,
        expires_at=None if seconds is None else now + seconds,
        filename=filename,
        purpose=form.purpose,
        sha256=upload.sha256,
    )
    with server.changing:
        upload.keep(server.home)
        server.store.add_file(row)
    return row


@router.get("/v1/files")
def list_files(
    request: Request,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> ListPage[File]:
    rows = server_of(request).store.list_files(purpose, after, limit, order)
    return present.page(Page([row for row in rows.data if not is_expired(row)], rows.has_more), present.file)


@router.get("/v1/files/{file_id}")
def retrieve_file(request: Request, file_id: str) -> File:
    return present.file(find_file(server_of(request), file_id))


@router.get("/v1/files/{file_id}/content")
def file_content(request: Request, file_id: str) -> FileResponse:
    server = server_of(request)
    row = find_file(server, file_id)
    if row.purpose in NOT_DOWNLOADABLE:
        raise UserError(f"Not allowed to download files of purpose: {row.purpose}")
    disposition = f"attachment; filename*=utf-8''{quote(row.filename)}"
    return FileResponse(
        server.home.blob(row.sha256),
        media_type="application/octet-stream",
        headers={"content-disposition": disposition},
    )


@router.delete("/v1/files/{file_id}")
def delete_file(request: Request, file_id: str) -> Deleted:
    """Jobs that use the file are not affected: they copied it at their start."""
    server = server_of(request)
    find_file(server, file_id)
    with server.changing:
        server.store.delete_file(file_id)
    return Deleted(id=file_id, object="file")
