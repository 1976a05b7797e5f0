"""Jobs of every kind with the unmodified SDK: what they leave is called by its `ft:` name, next to all the others.

`PYTHONPATH=.sdks/VERSION python journey_kinds.py URL TUNER …` makes a job with each tuner (`dora+nf4`: over a base in
4 bits), waits for it, then makes recipes of what came out, and prints one JSON line for each check: {"check", "ok",
"error", "seconds"}.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import openai
from journey import ASK, BASE, FAILURES, MODEL_NAME, Journey, chat_row, jsonl
from openai import AsyncOpenAI

NEW = jsonl([chat_row(i) for i in range(12)])
OLD = jsonl([chat_row(i) for i in range(50, 62)])
OPTIONS: dict[str, dict[str, Any]] = {
    "bitfit": {"add_biases": True},
    "fishmask": {"k": 400, "examples": 6},
    "child_d": {"examples": 6},
    "last_layers": {"layers": 1},
    "prompt": {"virtual_tokens": 5, "init_text": "Answer the question."},
    "p_tuning": {"virtual_tokens": 5, "encoder": "lstm", "hidden_size": 32},
    "prefix": {"virtual_tokens": 5},
}
# what goes beside a tuner, one thing of each: a job may have any of them with any tuner. OLD_FILE: an uploaded one
OLD_FILE = "OLD_FILE"
BESIDE: dict[str, dict[str, Any]] = {
    "lora": {"retain": [{"name": "replay", "file": OLD_FILE, "share": 0.5}]},
    "prompt": {"retain": ["kl"]},
    "fishmask": {"retain": ["l2sp", {"name": "ewc", "file": OLD_FILE, "examples": 4}]},
    "half": {"mix": {"files": [{"file": OLD_FILE, "weight": 1}], "weight": 3}},
}


class Kinds(Journey):
    """names: tuner -> the `ft:` name of its model. alone: model -> what it says when nothing else is asked."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.names: dict[str, str] = {}
        self.alone: dict[str, str] = {}
        self.recipes: dict[str, str] = {}
        self.new, self.old = self.upload(NEW), self.upload(OLD, "old.jsonl")

    def create(self, asked: str) -> Any:
        tuner, _, held = asked.partition("+")
        own = {"tuner": {"name": tuner, **OPTIONS.get(tuner, {})}, **BESIDE.get(tuner, {})}
        own |= {"quantization": held} if held else {}
        return self.jobs.create(
            model=BASE,
            training_file=self.new.id,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
            suffix=tuner.replace("_", "-"),
            seed=3,
            extra_body={"tunewright": json.loads(json.dumps(own).replace(OLD_FILE, self.old.id))},
        )

    def first_logprob(self, model: str) -> float:
        answer = self.ask(model, max_completion_tokens=1, logprobs=True)
        return answer.choices[0].logprobs.content[0].logprob

    def make_recipe(self, recipe: dict[str, Any], **more: Any) -> str:
        """Over the SDK's own way to endpoints that it does not know."""
        made: Any = self.client.post(
            "/tunewright/recipes", body={"model": BASE, "recipe": recipe, **more}, cast_to=object
        )
        self.recipes[recipe["name"]] = made["id"]
        return made["id"]


def finished(k: Kinds, asked: str, job: Any) -> None:
    """The job ended well, says what it was asked for, and its model is listed, answers, and is not the base."""
    (tuner, _, held), done = asked.partition("+"), k.wait(job.id)
    assert done.status == "succeeded", done.error
    name = k.names[tuner] = done.fine_tuned_model
    assert MODEL_NAME.match(name) and f":{tuner.replace('_', '-')}:" in name
    own = done.tunewright
    assert own.get("quantization", "") == held
    assert own["tuner"]["name"] == tuner and own["tuner"].items() >= OPTIONS.get(tuner, {}).items()
    for field, asked in BESIDE.get(tuner, {}).items():
        assert own[field] and len(own[field]) >= len(asked), own
    k.alone[name] = text(k.ask(name))
    assert name in [m.id for m in k.client.models.list()] and k.ask(name).model == name
    assert abs(k.first_logprob(name) - k.first_logprob(BASE)) > 1e-5


def text(answer: Any) -> str:
    return answer.choices[0].message.content


def recipes(k: Kinds) -> None:
    """Each that needs no encoder. Proxy-tuning with small = large and alpha = 1 is the tuned model itself."""
    tuned = k.names.get("lora") or next(iter(k.names.values()))
    k.make_recipe({"name": "prompt", "system": "Be short."}, suffix="brief")
    k.make_recipe({"name": "few_shot", "k": 2}, data=[k.new.id])
    k.make_recipe({"name": "mixture", "proposers": [BASE, tuned], "max_tokens": 4})
    k.make_recipe({"name": "proxy", "tuned": tuned, "small": BASE})
    listed = [m.id for m in k.client.models.list()]
    for name in k.recipes.values():
        assert MODEL_NAME.match(name) and name in listed
        k.alone[name] = text(k.ask(name))
    assert k.alone[k.recipes["proxy"]] == k.alone[tuned]


def side_by_side(k: Kinds) -> None:
    """All at once, with the base and a checkpoint between them: each says what it said alone."""
    k.alone[BASE] = text(k.ask(BASE))

    async def ask_all() -> dict[str, str]:
        client = AsyncOpenAI(base_url=k.url, api_key="local", max_retries=2)

        async def ask(model: str) -> str:
            wanted: Any = {"model": model, "messages": ASK, "max_completion_tokens": 8, "temperature": 0, "seed": 1}
            return text(await client.chat.completions.create(**wanted))

        names = [n for n in k.alone for _ in range(2)]
        return dict(zip(names, await asyncio.gather(*map(ask, names)), strict=True))

    said = asyncio.run(ask_all())
    assert said == k.alone, {n: (said[n], k.alone[n]) for n in said if said[n] != k.alone[n]}


def deleted(k: Kinds) -> None:
    """A recipe and a tuned model go by the SDK's own call; the others stay."""
    name = k.recipes["few_shot"]
    assert k.client.models.delete(name).deleted is True
    try:
        k.ask(name)
    except openai.NotFoundError as e:
        assert e.code == "model_not_found"
    else:
        raise AssertionError("a deleted recipe answers")
    assert text(k.ask(BASE)) == k.alone[BASE]


def report(name: str, check: Callable[..., None], *args: Any) -> None:
    start, error = time.monotonic(), None
    try:
        check(*args)
    except FAILURES:
        error = traceback.format_exc()
    seconds = time.monotonic() - start
    print(json.dumps({"check": name, "ok": error is None, "error": error, "seconds": seconds}), flush=True)


def main() -> None:
    k = Kinds(sys.argv[1])
    jobs = {tuner: k.create(tuner) for tuner in sys.argv[2:]}
    for tuner, job in jobs.items():
        report(tuner, finished, k, tuner, job)
    for check in (recipes, side_by_side, deleted):
        report(check.__name__, check, k)


if __name__ == "__main__":
    main()
