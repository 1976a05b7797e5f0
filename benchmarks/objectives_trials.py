"""One trial an objective: what is trained on which rows, and its own measure on held-out rows before and after."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import objectives_rows as rows_of
from benchmarks import objectives_score as score
from benchmarks import objectives_verdict as verdict
from benchmarks.objectives_judge import judging
from benchmarks.objectives_rows import Rows, Rowset
from benchmarks.objectives_score import Model, Said
from benchmarks.objectives_verdict import Runs, Verdict
from benchmarks.ours import Place
from benchmarks.process import run_ours
from benchmarks.rivals.shared import Task
from benchmarks.settings import write
from tunewright.core.run import Run
from tunewright.core.spec import JobSpec
from tunewright.evals.baselines import majority_labels, tfidf_labels
from tunewright.graders.base import Sample, parse_grader

Found = dict[str, Any]
# what a job of these trials has unless the trial says otherwise: the job spec's own defaults
DEFAULTS: dict[str, Any] = {
    "tuner": "lora", "learning_rate": "auto", "batch_size": "auto", "n_epochs": "auto",
    "schedule": JobSpec.model_fields["schedule"].default.model_dump(),
}  # fmt: skip
START: dict[str, Any] = {"n_epochs": 2}
RIGHT = {
    "type": "string_check", "name": "department", "operation": "eq",
    "input": "{{ sample.output_json.department }}", "reference": "{{ item.department }}",
}  # fmt: skip
PAIR_TOKENS = 512  # that a pair, a dialogue or a text of a public set may have
ANSWER_TOKENS, ANSWERS = 32, 4  # of a sampled answer to a held-out prompt, and how many
TALK_TOKENS = 48
RULE = r"\byour\b"
FIXED = [DEFAULTS, PAIR_TOKENS, ANSWER_TOKENS, ANSWERS, TALK_TOKENS, RULE]  # on which all results depend


def addresses(text: str) -> bool:
    """The rule of RLAIF's judge: the answer speaks to the patient."""
    return re.search(RULE, text, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Done:
    """A job that has ended. name: of its model. facts: plan and end."""

    run: Run
    name: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Bench:
    """One trial's place. rows: at most so many of each part; None takes all. kept: starts that several trials share."""

    place: Place
    seed: int
    encoder: str
    rows: int | None
    kept: dict[str, Done] = field(default_factory=dict)

    def job(self, what: str, rows: Rows, model: str = "", **spec: Any) -> Done:
        """A job to its end; its run folder stays until forget()."""
        name = f"{what}-{self.seed}-{len(list(self.place.home.runs.iterdir()))}"
        data = self.file(name, rows)
        options = {**DEFAULTS, "min_examples": 1, **spec}
        task = Task(model=model or self.place.model, data=str(data), out=str(self.place.work / name), seed=self.seed,
                    threads=self.place.threads, dtype=self.place.dtype, steps=1 << 30, options=options)  # fmt: skip
        outcome = run_ours(task, task.model, self.place.home, limit_s=4 * 3600.0)
        run = Run(Path(outcome.facts["run"]))
        return Done(run, run.job().name, outcome.facts)

    def file(self, name: str, rows: Rows) -> Path:
        return write(self.place.work / f"{name}.jsonl", [json.dumps(row, ensure_ascii=False) for row in rows])

    def start(self) -> Done:
        """A model that knows the demo's task a little."""
        if f"start-{self.seed}" not in self.kept:
            self.kept[f"start-{self.seed}"] = self.job("start", rows_of.demo_start()[: self.rows], **START)
        return self.kept[f"start-{self.seed}"]

    def forget(self) -> None:
        """Remove the run folders of all jobs but the shared starts."""
        shared = {done.run.folder for done in self.kept.values()}
        for folder in self.place.home.runs.iterdir():
            if folder not in shared:
                shutil.rmtree(folder)


@dataclass(frozen=True)
class Trial:
    """objective: of the table; its code and `spec` (what the job has beside the defaults) are part of a result's key.

    rows: the rows, given the folder of --data; None where that does not have them. measured: in words. before: what the
    first of the two columns is. asked: of the verdict, in words. minutes: of a free core, about.
    """

    objective: str
    rows: Callable[[Path | None], Rowset | None]
    run: Callable[[Bench, Trial, Rowset], Found]
    measured: str
    verdict: Callable[[Runs], Verdict]
    asked: str
    minutes: float
    spec: Mapping[str, Any] = field(default_factory=dict)
    from_start: bool = False
    before: str = "before"


def result(before: Sequence[float], after: Sequence[float], done: Done, **more: Any) -> Found:
    """What is kept of a trial."""
    plan, end = done.facts["plan"], done.facts["end"]
    facts = {k: plan[k] for k in ("learning_rate", "n_rows", "n_epochs", "batch_size", "path", "versions")}
    return {"before": list(before), "after": list(after), "more": more, **facts, "seconds": end["seconds"]}


def begin(b: Bench, trial: Trial) -> tuple[str, Model]:
    """What the trial's job starts from: a model's name, and the same to be judged."""
    base = score.base_model(b.place)
    if not trial.from_start:
        return b.place.model, base
    start = b.start()
    return start.name, base.over(start.run.result)


def preference(b: Bench, trial: Trial, rows: Rowset) -> Found:
    """How much likelier the preferred answer is than the other one."""
    name, start = begin(b, trial)
    pairs = score.rendered(start, b.file("held_out", rows.held_out), "preference", PAIR_TOKENS)
    done = b.job(trial.objective, rows.train, name, **trial.spec)
    policies = (start.policy(), start.over(done.run.result).policy())
    return result(*(score.margins(policy, pairs) for policy in policies), done)


def grpo(b: Bench, trial: Trial, rows: Rowset) -> Found:
    """The grader's reward of sampled answers, the mean of each prompt's."""
    name, start = begin(b, trial)
    done = b.job(trial.objective, rows.train, name, **trial.spec)

    def rewards(model: Model) -> list[float]:
        with parse_grader(RIGHT) as grader:
            return [
                fmean(grader.grade(row, Sample(said.text)).reward for said in answers)
                for row, answers in zip(rows.held_out, answered(b, model, rows), strict=True)
            ]

    return result(rewards(start), rewards(start.over(done.run.result)), done)


def ppo(b: Bench, trial: Trial, rows: Rowset) -> Found:
    """The same with a reward model, trained on pairs of the same messages; and how far from its start it went."""
    name, start = begin(b, trial)
    reward = b.job("reward", rows_of.demo_pairs().cut(b.rows).train, objective="reward")
    objective = {**trial.spec["objective"], "reward_model": reward.name}
    done = b.job(trial.objective, rows.train, name, **{**trial.spec, "objective": objective})
    new = start.over(done.run.result)
    said = [answered(b, model, rows) for model in (start, new)]
    sides = [_scored(b, reward, rows, answers) for answers in said]
    tokens = [fmean(len(a.tokens) for own in answers for a in own) for answers in said]
    nats = score.divergence(new, start, [a for own in said[1] for a in own])
    return result(*sides, done, nats=nats, tokens_before=tokens[0], tokens_after=tokens[1], right=_right(rows, said))


def _scored(b: Bench, reward: Done, rows: Rowset, said: Sequence[Sequence[Said]]) -> list[float]:
    """[prompts] the mean of the reward model's scores."""
    talks = [[*row["messages"][:-1], {"role": "assistant", "content": a.text}]
             for row, own in zip(rows.held_out, said, strict=True) for a in own]  # fmt: skip
    found = score.scores(b.place, reward.run.result, talks)
    return [fmean(found[i : i + ANSWERS]) for i in range(0, len(found), ANSWERS)]


def _right(rows: Rowset, sides: Sequence[Sequence[Sequence[Said]]]) -> list[float]:
    """The share of right answers on each side."""
    wanted = [row["messages"][-1]["content"] for row in rows.held_out]
    return [fmean(a.text == w for w, own in zip(wanted, said, strict=True) for a in own) for said in sides]


def answered(b: Bench, model: Model, rows: Rowset) -> list[list[Said]]:
    chats = [row["messages"][:-1] for row in rows.held_out]
    return score.sample(b.place, model, chats, ANSWER_TOKENS, ANSWERS)


def rlaif(b: Bench, trial: Trial, rows: Rowset) -> Found:
    """Whether a sampled answer keeps the judge's rule, one to each prompt."""
    name, start = begin(b, trial)
    chats = [row["messages"][:-1] for row in rows.held_out]
    with judging(addresses) as url:
        objective = {**trial.spec["objective"], "endpoint": url, "model": "rule"}
        prompts = [{"prompt": row["messages"][:-1]} for row in rows.train]
        done = b.job(trial.objective, prompts, name, **{**trial.spec, "objective": objective})
    models = (start, start.over(done.run.result))
    said = [score.sample(b.place, model, chats, TALK_TOKENS) for model in models]
    sides = [[float(addresses(own[0].text)) for own in answers] for answers in said]
    tokens = [fmean(len(own[0].tokens) for own in answers) for answers in said]
    return result(*sides, done, tokens_before=tokens[0], tokens_after=tokens[1])


def reward(b: Bench, trial: Trial, rows: Rowset) -> Found:
    """Whether the preferred answer has the higher score."""
    done = b.job(trial.objective, rows.train, **trial.spec)
    talks = [[*row["input"]["messages"], *row[side]] for row in rows.held_out
             for side in ("preferred_output", "non_preferred_output")]  # fmt: skip
    found = score.scores(b.place, done.run.result, talks)
    right = [float(a > b) for a, b in zip(found[::2], found[1::2], strict=True)]
    return result([0.5] * len(right), right, done)


def classify(b: Bench, trial: Trial, rows: Rowset) -> Found:
    """Whether the label is right; the same of TF-IDF + logistic regression and of the majority class."""
    done = b.job(trial.objective, rows.train, b.encoder, **trial.spec)
    texts, known = [r["text"] for r in rows.train], [r["label"] for r in rows.train]
    asked, wanted = [r["text"] for r in rows.held_out], [r["label"] for r in rows.held_out]
    said = (tfidf_labels(texts, known, asked), score.labels(b.place, done.run.result, asked),
            majority_labels(known, len(asked)))  # fmt: skip
    before, after, most = ([float(a == w) for a, w in zip(own, wanted, strict=True)] for own in said)
    return result(before, after, done, majority=most)


def pretrain(b: Bench, trial: Trial, rows: Rowset) -> Found:
    """The loss of a text's tokens; e to that is the perplexity."""
    name, start = begin(b, trial)
    texts = score.rendered(start, b.file("held_out", rows.held_out), "text", PAIR_TOKENS, "truncate")
    done = b.job(trial.objective, rows.train, name, **trial.spec)
    return result(score.losses(start, texts), score.losses(start.over(done.run.result), texts), done)


def distill(b: Bench, trial: Trial, rows: Rowset) -> Found:
    """The loss of the right answers: a student that learned from rows alone, and one that had a teacher as well."""
    base = score.base_model(b.place)
    teacher = b.job("teacher", rows.train)
    half = replace(base, base=halved(base.base, b.place.work / "half"))
    chats = score.rendered(half, b.file("held_out", rows.held_out), "chat", 1 << 20)
    alone = b.job("alone", rows.train, str(half.base), tuner="full")
    objective = {**trial.spec["objective"], "teacher": teacher.name}
    taught = b.job(trial.objective, rows.train, str(half.base), **{**trial.spec, "objective": objective})
    sides = [score.losses(half.over(done.run.result), chats) for done in (alone, taught)]
    return result(*sides, taught, teacher=fmean(score.losses(base.over(teacher.run.result), chats)))


def halved(source: Path, folder: Path) -> Path:
    """The model with the first half of its layers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not folder.is_dir():
        net: Any = AutoModelForCausalLM.from_pretrained(source)
        net.config.num_hidden_layers //= 2
        net.model.layers = net.model.layers[: net.config.num_hidden_layers]
        net.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def on_demo(make: Callable[[], Rowset]) -> Callable[[Path | None], Rowset | None]:
    return lambda folder: make()


def given(name: str) -> Callable[[Path | None], Rowset | None]:
    return lambda folder: rows_of.public(folder, name) if folder else None


LONG = {"max_length": PAIR_TOKENS, "overlong": "drop"}
MARGIN = {
    "measured": "log p(preferred) - log p(other), nats", "verdict": verdict.rises, "run": preference,
    "asked": "rises, interval above 0",
}  # fmt: skip


def on_pairs(objective: str, make: Callable[[], Rowset] = rows_of.demo_pairs, from_start: bool = True) -> Trial:
    return Trial(objective, on_demo(make), spec={"objective": objective}, from_start=from_start, minutes=1.5, **MARGIN)


def on_dialogues(objective: str) -> Trial:
    return Trial(objective, given("dpo_en"), spec={"objective": objective, **LONG}, minutes=4, **MARGIN)


PAYS = {"verdict": verdict.pays, "asked": "rises by more than 2 standard errors"}
TRIALS: dict[str, Trial] = {
    "dpo": on_pairs("dpo"),
    "kto": on_pairs("kto", rows_of.demo_marks),
    "orpo": on_pairs("orpo", from_start=False),
    "simpo": on_pairs("simpo"),
    "cpo": on_pairs("cpo"),
    "dpo-public": on_dialogues("dpo"),
    "kto-public": on_dialogues("kto"),
    "orpo-public": on_dialogues("orpo"),
    "reward": Trial(
        "reward", given("hh"), reward, "pairs in the right order", verdict.orders,
        f"at least {verdict.ORDERED_PAIRS} pairs, lower bound above {verdict.ORDERED:.0%}", 12,
        {"objective": "reward", "n_epochs": 1, "max_length": 256, "overlong": "drop"}, before="guessing",
    ),
    "grpo": Trial(
        "grpo", on_demo(rows_of.demo_prompts), grpo, "answers with the right department (`string_check`)", minutes=15,
        from_start=True, **PAYS,
        spec={"objective": {"name": "grpo", "grader": RIGHT, "max_completion_tokens": ANSWER_TOKENS}},
    ),
    "ppo": Trial(
        "ppo", on_demo(rows_of.demo_prompts), ppo, "score of the reward model", verdict.pays_nearby,
        f"{PAYS['asked']}; at most {verdict.MOST_NATS:g} nats an answer; length within half", 5, from_start=True,
        spec={"objective": {"name": "ppo", "max_completion_tokens": ANSWER_TOKENS}, "n_epochs": 1},
    ),
    "rlaif": Trial(
        "rlaif", on_demo(rows_of.demo_chats), rlaif, 'answers that say "your" (the judge\'s rule)', verdict.satisfies,
        f"at least {100 * verdict.POINTS:.0f} points more", 4,
        {"objective": {"name": "rlaif", "max_tokens": TALK_TOKENS}},
    ),
    "classify": Trial(
        "classify", on_demo(rows_of.demo_labels), classify, "right departments", verdict.classifies,
        f"better than both with p < {verdict.SURE}", 0.5, {"objective": "classify"}, before="TF-IDF",
    ),
    "pretrain": Trial(
        "pretrain", given("c4"), pretrain, "loss of a token, nats", verdict.falls, "falls, interval below 0", 3,
        {"objective": "pretrain", "max_length": PAIR_TOKENS},
    ),
    "distill": Trial(
        "distill", on_demo(rows_of.demo_chats), distill, "loss of a right answer's token, nats", verdict.falls,
        "lower than from rows alone, interval below 0", 8,
        {"objective": {"name": "distill"}, "tuner": "full"}, before="rows alone",
    ),
}  # fmt: skip
