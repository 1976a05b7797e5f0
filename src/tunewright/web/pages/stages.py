"""The stages of a chain on its page, and the way back from a stage's page to its chain."""

from __future__ import annotations

from typing import Any

from tunewright.web import kit

DONE = "succeeded"


def stages_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    """[{name, objective, model, training_file, id, status, fine_tuned_model}] of a chain; empty for any other job."""
    return (job.get("tunewright") or {}).get("stages") or []


def chain_of(job: dict[str, Any]) -> dict[str, str] | None:
    """{id, stage} of the chain that the job is a stage of, or None."""
    return (job.get("tunewright") or {}).get("chain")


def share_done(stages: list[dict[str, Any]]) -> float:
    return sum(s["status"] == DONE for s in stages) / len(stages)


def chain_words(stages: list[dict[str, Any]]) -> str:
    """`Stage 2 of 3: preferences (running)`."""
    for number, stage in enumerate(stages, 1):
        if stage["status"] != DONE:
            return f"Stage {number} of {len(stages)}: {stage['name']} ({stage['status'].replace('_', ' ')})"
    return f"All {len(stages)} stages have finished."


def build_stages(stages: list[dict[str, Any]]) -> None:
    """A row for each stage, with a link to its job once there is one."""
    rows = [(number, lambda s=s: _name(s), s["objective"], lambda s=s: _state(s)) for number, s in enumerate(stages, 1)]
    kit.table(("Stage", "Job", "Objective", "State"), rows, "Stages in their order", "stages")


def _name(stage: dict[str, Any]) -> None:
    if stage["id"] is None:
        kit.Text(stage["name"])
    else:
        kit.tag(kit.link(stage["name"], f"/jobs/{stage['id']}", "tw-link"), "stage-link")


def _state(stage: dict[str, Any]) -> None:
    kit.chip(stage["status"])
