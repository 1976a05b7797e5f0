"""Before a job's rows are rendered: a judge, there or here, says which of two answers is better. `answers/` keeps the
pairs that it labelled, as a training file of preference rows like any other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from tunewright.core.asking import Post, Teacher
from tunewright.core.conversation import Conversation
from tunewright.core.durable import commit_folder
from tunewright.core.errors import SpecError, UserError
from tunewright.core.outbound import Endpoint, Reply, find_endpoint
from tunewright.data.asking import prompt_of
from tunewright.data.judging import Judged, Pair, judged_rows
from tunewright.data.spans import plain
from tunewright.data.validate import read_conversations
from tunewright.engine.engine import Engine, EngineError
from tunewright.engine.request import GenerateRequest, parse_request
from tunewright.graders.base import Ask, Said
from tunewright.train.asking import ROWS, Asking, answers_of, checked, told, write_rows
from tunewright.train.candidates import engine_of, place_of, sampled_pairs
from tunewright.train.prepare import is_kept

HERE = Endpoint("http", "engine.invalid", 80, "")  # only a name: nothing is sent
ENDS = ("done", "error")  # of an engine's request
SUSPICIOUS = 0.5  # share of ties from which a judge is doubted


def ask_judge(a: Asking) -> None:
    """Have the training and the validation file's pairs judged, if an earlier attempt has not.

    Raises DataError, SpecError (too few pairs with a verdict), UserError, EndpointDown, Interrupted.
    """
    o = a.objective.options
    judge, concurrency = judge_of(a), o.concurrency if a.judge is None else 1
    start = place_of(a.run, a.job.base, a.start, "start")
    sample = partial(
        sampled_pairs,
        engine=partial(engine_of, a.home, a.spec.dtype),
        asked={**start, "temperature": o.temperature, "max_tokens": o.max_tokens},
        seed=a.spec.seed or 0,
        events=a.events,
        stop=a.stop,
    )
    for role in ("train", *(["validation"] if a.job.validation else [])):
        folder = answers_of(a.run, role).parent
        if is_kept(folder, "judge's verdicts", a.events):
            continue
        path, name, report = checked(a.run, a.job, a.spec, a.objective, role)
        rows, judged = read_conversations(path, report.format, name), Judged()
        if report.shape == "preference":
            pairs = map(own_pair, rows)
        else:
            pairs = sample(a.run.folder / "answers" / f"{role}-sampled.jsonl", map(prompt_of, rows), report.n_rows)
        pairs = told(pairs, report.n_rows, judged, judge.model, a.events)
        limits = {"budget": o.budget, "concurrency": concurrency, "stop": a.stop}
        found = judged_rows(pairs, judge, judged, o.principles, **limits)
        commit_folder(folder, lambda tmp, found=found: write_rows(tmp / ROWS, found), {"judge": judge.model})
        a.events.write("message", summary(judged, name, judge.model), {"judged": asdict(judged)})
        if sum(judged.ties.values()) > SUSPICIOUS * (judged.answered + judged.unusable):
            text = "More than half of the pairs are ties. Another judge, or clearer principles, may help."
            a.events.write("message", text, {}, "warn")
        least = a.spec.min_examples if role == "train" else 1
        if judged.answered < least:
            raise SpecError(
                f"{judge.model} gave a verdict on {judged.answered} pairs of {name}, and the job needs {least}"
                f"{': ' + judged.reason if judged.reason else ''}. Raise the budget, or look at the judge.",
                param="objective",
                code="invalid_n_examples",
            )


def judge_of(a: Asking) -> Teacher:
    """Whom to ask: the endpoint, or the engine inside this worker with the model that lies in the run folder."""
    o, cache = a.objective.options, a.home.cache / "answers"
    options = {"max_tokens": o.judge_tokens}
    if a.judge is None:
        return Teacher(find_endpoint(o.endpoint), o.model, cache, options=options)
    place = place_of(a.run, a.job.teacher["base"], a.judge, "judge")
    post = by_engine(partial(engine_of, a.home, a.spec.dtype), place)
    return Teacher(HERE, o.judge, cache, options=options, post=post)


def by_engine(make: Callable[[], Engine], place: dict[str, str]) -> Post:
    """In the place of an HTTP request to a judge: the engine's greedy answer, one question at a time. One that is
    too long has an empty one."""
    held: list[Engine] = []
    one_at_a_time = threading.Lock()

    def post(endpoint: Endpoint, path: str, body: Any, timeout: float) -> Reply:
        own = {"messages": body["messages"], "max_tokens": body["max_tokens"], "temperature": 0.0}
        with one_at_a_time:
            if not held:
                held.append(make())
            try:
                done = held[0].generate(GenerateRequest.model_validate({**place, **own}))
            except UserError as e:
                if e.code != "context_length_exceeded":
                    raise
                return Reply(200, None)
        choice = done["choices"][0]
        said = {"message": {"content": choice["text"]}, "finish_reason": choice["finish_reason"]}
        return Reply(200, {"choices": [said], "usage": done["usage"]})

    return post


def for_graders(engine: Engine, place: dict[str, str]) -> Ask:
    """The Seams.ask of a grader whose judge is the model at `place` (place_of): from any number of threads. Whoever has
    the engine takes a step for all, so that questions on the way are answered together."""
    one_at_a_time = threading.Lock()

    def ask(messages: list[dict[str, Any]], *, model: str, max_completion_tokens: int, **sampling: Any) -> Said:
        own = {"temperature": 0.0, **sampling, "messages": messages, "max_tokens": max_completion_tokens}
        asked, heard = parse_request({**place, **own}), []
        with one_at_a_time:
            engine.add_request(asked, heard.append)
        while heard[-1]["type"] not in ENDS:
            with one_at_a_time:
                if heard[-1]["type"] not in ENDS:
                    engine.step()
        if heard[-1]["type"] == "error":
            raise EngineError(heard[-1]["error"]["message"])
        return Said(heard[-1]["choices"][0]["text"], heard[-1]["usage"])

    return ask


def own_pair(row: Conversation) -> Pair:
    """The two answers of a preference row; which one it prefers is not looked at."""
    return Pair([plain(m) for m in row.messages], (_text(row.preferred), _text(row.rejected)))


def _text(answer: Any) -> str:
    return "".join(m.content or "" for m in answer or ())


def summary(judged: Judged, name: str, model: str) -> str:
    """What became of a file's pairs, in words."""
    kept = f" ({judged.kept} of them kept from before)" if judged.kept else ""
    text = f"{model} judged {judged.answered} of {judged.rows} pairs of {name}{kept}, {judged.tokens:,} tokens"
    ties = ", ".join(f"{n} because {why}" for why, n in judged.ties.items())
    text += f"; left out: {judged.unusable} ties ({ties})" if judged.unusable else ""
    text += f"; {judged.same} pairs with equal or empty answers" if judged.same else ""
    return text + (f"; {judged.left_out} pairs were not asked about: the budget is spent" if judged.left_out else "")
