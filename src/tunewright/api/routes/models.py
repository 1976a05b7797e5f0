"""/v1/models: base models, recipes, and what jobs left, checkpoints included."""

from __future__ import annotations

from fastapi import APIRouter, Request

from tunewright.api import present
from tunewright.api.lookup import base_models
from tunewright.api.schemas import Deleted, ListPage, Model
from tunewright.api.state import server_of
from tunewright.core.errors import Forbidden, ModelNotFound

router = APIRouter()


@router.get("/v1/models")
def list_models(request: Request) -> ListPage[Model]:
    server = server_of(request)
    data = present.models(base_models(server).values(), server.store.list_models())
    return ListPage[Model](data=data)


@router.get("/v1/models/{model:path}")
def retrieve_model(request: Request, model: str) -> Model:
    server = server_of(request)
    row = server.store.find_model(model)
    if row is not None:
        return present.tuned_model(row)
    info = base_models(server).get(model)
    if info is None:
        raise _unknown(model)
    return present.base_model(info)


@router.delete("/v1/models/{model:path}")
def delete_model(request: Request, model: str) -> Deleted:
    """Delete a fine-tuned model, checkpoint or recipe; its job, files and children stay."""
    server = server_of(request)
    if server.store.find_model(model) is not None:
        server.store.delete_model(model)
        return Deleted(id=model, object="model")
    if model in base_models(server):
        raise Forbidden(
            f"'{model}' is a base model; base models are not deleted over the API. Fine-tuned models and checkpoints "
            "(names that begin with ft:) are. To free its disk space, remove its folder in the data folder's models.",
            param="model",
        )
    raise _unknown(model)


def _unknown(model: str) -> ModelNotFound:
    return ModelNotFound(f"The model '{model}' does not exist", param="model")
