"""From a name in a request to what it stands for: a file, a job, a model. A client can never name a path."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from tunewright.api.state import Server
from tunewright.core.errors import ModelNotFound, NotFound, UserError, did_you_mean
from tunewright.core.ids import parse_model_name
from tunewright.core.run import Artefact, read_artefact
from tunewright.core.spec import Part
from tunewright.jobs.prepare import check_head, other_model
from tunewright.jobs.rows import FileRow, JobRow
from tunewright.models.catalogue import ModelInfo, list_models


@dataclass(frozen=True)
class Target:
    """What answers to a name. base: a catalogue name; artefact: the folder of a fine-tuned model. One is None."""

    base: str | None
    artefact: str | None


def base_models(server: Server) -> dict[str, ModelInfo]:
    return {m.name: m for m in list_models(server.home)}


def known_names(server: Server) -> list[str]:
    """Every name that a request may use, base models first."""
    return [*base_models(server), *(m.name for m in server.store.list_models())]


def find_target(server: Server, name: str) -> Target:
    """The model of a chat request. Raises ModelNotFound in OpenAI's words, with the nearest name."""
    row = server.store.find_model(name)
    if row is not None:
        return Target(None, row.folder)
    info = base_models(server).get(name)
    if info is None:
        near = did_you_mean(name, known_names(server))
        raise ModelNotFound(f"The model `{name}` does not exist or you do not have access to it.{near}", param="model")
    if info.needs_network:
        raise ModelNotFound(
            f"The model `{name}` is in the catalogue but not on this machine yet. Download it with "
            f"`tunewright models get {name}`, or start a fine-tuning job on it.",
            param="model",
        )
    return Target(name, None)


def find_start(server: Server, name: str, param: str = "model") -> Artefact | None:
    """What a job on `name` continues from, or learns from; None for a base model. param: where the name was.

    Raises UserError (400 model_not_available) unless `name` is a base model or an `ft:` model or checkpoint.
    """
    if parse_model_name(name) is None and name in base_models(server):
        return None
    row = server.store.find_model(name)
    if row is not None:
        return read_artefact(Path(row.folder))
    near = did_you_mean(name, known_names(server))
    raise UserError(
        f"Model {name} is not available for fine-tuning or does not exist.{near} "
        f"Base models: {', '.join(base_models(server))}.",
        param=param,
        code="model_not_available",
    )


def find_other(server: Server, objective: Part, where: str) -> None:
    """Look at the model that a job asks beside its own, if it does. where: the objective is. Raises UserError."""
    named = other_model(objective)
    if named is not None:
        option, name = named
        found = find_start(server, name, f"{where}.{option}")
        check_head(option, name, "lm" if found is None else found.head)


class NoSuchFile(NotFound):
    """OpenAI gives this one no code."""

    code = None


def find_file(server: Server, file_id: str) -> FileRow:
    """The row, or NoSuchFile in OpenAI's words."""
    row = server.store.get_file(file_id)
    if row is None or is_expired(row):
        raise NoSuchFile(f"No such File object: {file_id}", param="id")
    return row


def is_expired(row: FileRow) -> bool:
    return row.expires_at is not None and row.expires_at <= time.time()


def find_job(server: Server, job_id: str) -> JobRow:
    """The row, or NotFound in OpenAI's words."""
    row = server.store.get_job(job_id)
    if row is None:
        raise NotFound(f"Could not find fine tune: {job_id}", param="fine_tune_id", code="fine_tune_not_found")
    return row


def find_data_file(server: Server, file_id: str, param: str) -> FileRow:
    """The row of a training or validation file. Raises UserError (400), as OpenAI does in a create request."""
    row = server.store.get_file(file_id)
    if row is None or is_expired(row):
        raise UserError(f"No such File object: {file_id}", param=param)
    if row.purpose != "fine-tune":
        raise UserError(
            f"The file '{file_id}' was uploaded with the purpose '{row.purpose}'; a {param} needs the purpose "
            "'fine-tune'. Upload it again with that purpose.",
            param=param,
            code="invalid_file_purpose",
        )
    return row
