"""Before a job's rows are rendered: a judge on another server says which of two answers is better. `answers/` keeps the
pairs that it labelled, as a training file of preference rows like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from tunewright.core.conversation import Conversation
from tunewright.core.durable import commit_folder
from tunewright.core.errors import SpecError
from tunewright.core.events import EventWriter
from tunewright.core.home import Home
from tunewright.core.outbound import find_endpoint
from tunewright.core.run import JobFile, Run
from tunewright.core.spec import JobSpec
from tunewright.data.asking import Teacher, prompt_of
from tunewright.data.judging import Judged, Pair, judged_rows
from tunewright.data.spans import plain
from tunewright.data.validate import read_conversations
from tunewright.train.asking import ROWS, answers_of, checked, told, write_rows
from tunewright.train.candidates import engine_of, place_of, sampled_pairs
from tunewright.train.finish import Start
from tunewright.train.prepare import is_kept

SUSPICIOUS = 0.5  # share of ties by place from which a judge is doubted


def ask_judge(
    run: Run,
    job: JobFile,
    spec: JobSpec,
    objective: Any,
    home: Home,
    events: EventWriter,
    stop: Callable[[], bool],
    start: Start,
) -> None:
    """Have the training and the validation file's pairs judged, if an earlier attempt has not.

    Raises DataError, SpecError (too few pairs with a verdict), UserError, EndpointDown, Interrupted.
    """
    o = objective.options
    judge = Teacher(find_endpoint(o.endpoint), o.model, home.cache / "answers", options={"max_tokens": o.judge_tokens})
    sample = partial(
        sampled_pairs,
        engine=partial(engine_of, home, spec.dtype),
        asked={**place_of(run, job, start), "temperature": o.temperature, "max_tokens": o.max_tokens},
        seed=spec.seed or 0,
        events=events,
        stop=stop,
    )
    for role in ("train", *(["validation"] if job.validation else [])):
        folder = answers_of(run, role).parent
        if is_kept(folder, "judge's verdicts", events):
            continue
        path, name, report = checked(run, job, spec, objective, role)
        rows, judged = read_conversations(path, report.format, name), Judged()
        if report.shape == "preference":
            pairs = map(own_pair, rows)
        else:
            pairs = sample(run.folder / "answers" / f"{role}-sampled.jsonl", map(prompt_of, rows), report.n_rows)
        pairs = told(pairs, report.n_rows, judged, o.model, events)
        limits = {"budget": o.budget, "concurrency": o.concurrency, "stop": stop}
        found = judged_rows(pairs, judge, judged, o.principles, **limits)
        commit_folder(folder, lambda tmp, found=found: write_rows(tmp / ROWS, found), {"judge": o.model})
        events.write("message", summary(judged, name, o.model), {"judged": asdict(judged)})
        if sum(judged.ties.values()) > SUSPICIOUS * (judged.answered + judged.unusable):
            text = (
                f"More than half of the pairs are ties. Another judge than {o.model}, or clearer principles, may help."
            )
            events.write("message", text, {}, "warn")
        least = spec.min_examples if role == "train" else 1
        if judged.answered < least:
            raise SpecError(
                f"{o.model} gave a verdict on {judged.answered} pairs of {name}, and the job needs {least}"
                f"{': ' + judged.reason if judged.reason else ''}. Raise the budget, or look at the judge.",
                param="objective",
                code="invalid_n_examples",
            )


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
