"""Recipes over HTTP: made of uploaded files, listed, called whole and streamed, deleted; no paths."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from live import LiveServer

import recipe_kit
from tunewright.core.home import Home

pytestmark = pytest.mark.slow

PATH = "/v1/tunewright/recipes"


def upload(http: httpx.Client, name: str, text: str, purpose: str = "user_data") -> str:
    answer = http.post("/v1/files", data={"purpose": purpose}, files={"file": (name, text.encode())})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def create(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post(PATH, json={"model": "tiny", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def ask(http: httpx.Client, model: str, **options: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "who barks?"}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_completion_tokens": 6, **options}
    return http.post("/v1/chat/completions", json=body)


def test_retrieval_over_uploaded_files(http: httpx.Client, server: LiveServer) -> None:
    """The real process makes the index; passages come with the answer, whole and streamed."""
    recipe_kit.add_encoder(Home(server.home))
    ids = [upload(http, name, text) for name, text in recipe_kit.ANIMALS.items()]
    recipe = {"name": "retrieval", "k": 1, "encoder": recipe_kit.ENCODER}
    made = create(http, recipe=recipe, data=ids, suffix="animals", decoding={"seed": 1})
    assert made["object"] == "tunewright.recipe" and made["id"].startswith("ft:tiny:personal:animals:")
    assert made["model"] == "tiny" and made["recipe"]["k"] == 1 and made["decoding"] == {"seed": 1}
    for file_id in ids:
        assert http.delete(f"/v1/files/{file_id}").status_code == 200  # the recipe keeps its own copy
    whole = ask(http, made["id"]).json()
    assert whole["model"] == made["id"] and len(whole["tunewright"]["contexts"]) == 1
    assert whole["tunewright"]["contexts"][0].startswith(("# Cats", "A dog"))
    streamed = ask(http, made["id"], stream=True)
    chunks = [json.loads(e[6:]) for e in streamed.text.split("\n\n") if e.startswith("data: {")]
    assert [c["tunewright"] for c in chunks if "tunewright" in c] == [whole["tunewright"]]
    said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert said == whole["choices"][0]["message"]["content"]
    assert "tunewright" not in ask(http, "tiny").json()


def test_listed_and_deleted_like_a_model(http: httpx.Client) -> None:
    made = create(http, recipe={"name": "prompt", "system": "/think, briefly"})
    assert made["recipe"]["system"] == "/think, briefly"
    assert made["id"] in [m["id"] for m in http.get("/v1/models").json()["data"]]
    assert made in http.get(PATH).json()["data"]
    assert http.get(f"/v1/models/{made['id']}").json()["owned_by"] == "org-personal"
    assert ask(http, made["id"]).status_code == 200
    assert http.delete(f"/v1/models/{made['id']}").json()["deleted"]
    assert ask(http, made["id"]).status_code == 404
    assert made not in http.get(PATH).json()["data"]


def test_a_mixture_and_a_proxy(http: httpx.Client) -> None:
    mixed = create(http, recipe={"name": "mixture", "proposers": ["tiny", "org/tiny-2"], "max_tokens": 4})
    answer = ask(http, mixed["id"]).json()
    assert [p["model"] for p in answer["tunewright"]["proposals"]] == ["tiny", "org/tiny-2"]
    assert answer["usage"]["prompt_tokens"] > 2 * ask(http, "tiny").json()["usage"]["prompt_tokens"]
    proxy = create(http, recipe={"name": "proxy", "tuned": "org/tiny-2", "small": "tiny"})
    same = [ask(http, name).json()["choices"][0]["message"] for name in (proxy["id"], "org/tiny-2")]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"recipe": "few_shots"}, 400, "Did you mean 'few_shot'?"),
        ({"recipe": {"name": "few_shot", "k": 99}}, 400, "less than or equal to 64"),
        ({"recipe": "few_shot", "data": ["file-none"]}, 400, "No such File object: file-none"),
        ({"recipe": {"name": "prompt", "system": "S."}, "model": "/etc"}, 404, "is a path"),
        ({"recipe": {"name": "mixture", "proposers": ["../x"]}}, 404, "is a path"),
        ({"recipe": {"name": "prompt", "system": "S."}, "model": "tinny"}, 404, "Did you mean 'tiny'?"),
        ({"recipe": {"name": "prompt", "system": "S."}, "sufix": "a"}, 400, "Did you mean 'suffix'?"),
        ({"recipe": 3}, 400, "recipe"),
    ],
)
def test_errors(http: httpx.Client, body: dict[str, Any], status: int, said: str) -> None:
    answer = http.post(PATH, json={"model": "tiny", **body})
    assert answer.status_code == status and said in answer.json()["error"]["message"], answer.text


def test_a_path_of_the_server_is_not_shown(http: httpx.Client, server: LiveServer) -> None:
    folder = recipe_kit.make(
        Home(server.home), {"name": "prompt", "system": "S."}, str(server.home / "models" / "tiny")
    )
    shown = next(r for r in http.get(PATH).json()["data"] if r["id"] == recipe_kit.name_of(folder))
    assert shown["model"] == "tiny" and str(server.home) not in json.dumps(shown)


def test_a_recipe_is_not_fine_tuned(http: httpx.Client) -> None:
    made = create(http, recipe={"name": "prompt", "system": "S."})
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(10)
    ]
    data = upload(http, "rows.jsonl", "".join(json.dumps(r) + "\n" for r in rows), "fine-tune")
    answer = http.post("/v1/fine_tuning/jobs", json={"model": made["id"], "training_file": data})
    assert answer.status_code == 400 and "is a recipe" in answer.json()["error"]["message"]
