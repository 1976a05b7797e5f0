"""Chains as plain data: what stages inherit, what they may name, what `chain: rlhf` means, what comes next."""

from __future__ import annotations

from typing import Any

import pytest

from tunewright.core.chain import check_stages, expand, files_of, fill_in, is_chain, parse_chain, references
from tunewright.core.errors import SpecError
from tunewright.jobs.chain import Child, next_stage

THREE: dict[str, Any] = {
    "model": "tiny",
    "training_file": "texts",
    "validation_file": "other-texts",
    "n_epochs": 2,
    "suffix": "clinic",
    "stages": [
        {"name": "domain", "objective": "pretrain"},
        {"name": "sft", "training_file": "chats", "n_epochs": 1, "suffix": "mine"},
        {"name": "dpo", "training_file": "pairs", "objective": {"name": "dpo", "beta": 0.2}},
    ],
}


def part(kind: str = "adapter", head: str = "lm", properties: tuple[str, ...] = ()) -> dict[str, Any]:
    schema = {"properties": {name: {"type": "string"} for name in properties}, "additionalProperties": False}
    card = {"artefact": kind, "works_on_nf4": True, "head": head}
    return {"schema": schema, "defaults": {}, "card": card}


DESCRIBE: dict[str, Any] = {
    "tuner": {"lora": part(), "dora": part(), "bitfit": part("delta"), "full": part("weights")},
    "objective": {
        "sft": part(),
        "dpo": part(),
        "reward": part(head="reward"),
        "ppo": part(properties=("reward_model",)),
        "distill": part(properties=("teacher",)),
    },
    "optimizer": {"adamw": part()},
    "schedule": {"linear": part()},
    "retain": {},
}


def chain(*stages: dict[str, Any], **common: Any) -> dict[str, Any]:
    return {"model": "tiny", "training_file": "a", **common, "stages": list(stages)}


def stage(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "training_file": f"{name}.jsonl", **fields}


def test_what_stages_have_in_common_and_what_is_the_first_ones() -> None:
    found = parse_chain(THREE)
    assert list(found) == ["domain", "sft", "dpo"] and is_chain(THREE)
    assert [s.model for s in found.values()] == ["tiny", "stage:domain", "stage:sft"]
    assert [s.training_file for s in found.values()] == ["texts", "chats", "pairs"]
    assert [s.validation_file for s in found.values()] == ["other-texts", None, None]
    assert [s.n_epochs for s in found.values()] == [2, 1, 2]
    assert [s.suffix for s in found.values()] == ["clinic-domain", "mine", "clinic-dpo"]
    assert found["dpo"].objective.options == {"beta": 0.2}
    assert files_of(found["domain"]) == {"train": "texts", "validation": "other-texts"}
    by_name = {**THREE, "stages": {"domain": {"objective": "pretrain"}, "sft": "chats"}}
    assert [s.training_file for s in parse_chain(by_name).values()] == ["texts", "chats"]
    long = parse_chain({**THREE, "suffix": "x" * 64})
    assert long["dpo"].suffix == "x" * 60 + "-dpo"
    assert {k: s.suffix for k, s in parse_chain({**THREE, "suffix": None}).items()}["domain"] == "domain"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (chain(), "'stages' is empty"),
        ({"stages": "sft"}, "'stages' is a list of job specs, each with a name, not str"),
        (chain({"training_file": "b"}), "The stage number 1 has no name; give it a name of 1 to 32 letters"),
        (chain(stage("a b")), "is called 'a b'"),
        (chain(stage("a"), stage("a")), "Two stages are called 'a'"),
        ({"stages": {"a": 3}}, "The stage a is 3; it must be a mapping"),
        (chain(*(stage(f"s{i}") for i in range(17))), "17 stages; at most 16"),
        (chain({"name": "a"}, {"name": "b"}), "Stage 'b': The job spec is not valid: the field 'training_file'"),
        (chain(stage("a", n_epoch=3)), "Stage 'a': The job spec is not valid: unknown field 'n_epoch'. Did you mean"),
        (
            chain(stage("sft"), stage("dpo", model="stage:stf")),
            "Stage 'dpo': model names the stage 'stf', which does not exist; the stages before it are sft. "
            "Did you mean 'sft'?",
        ),
        (chain(stage("a", model="stage:a")), "model names 'a', the stage itself, which has no result yet; it is"),
        (
            chain(stage("a", model="stage:b"), stage("b", model="stage:a")),
            "Stage 'a': model names 'b', a later stage, which has no result yet",
        ),
        (
            chain(stage("a"), stage("b", objective={"name": "distill", "teacher": "stage:c"}), stage("c")),
            "Stage 'b': teacher names 'c', a later stage",
        ),
        ({"chain": "rlfh", "model": "tiny"}, "There is no chain 'rlfh'. Use one of: rlhf. Did you mean 'rlhf'?"),
        ({"chain": "rlhf", "stages": {"rewards": "p"}}, "has no stage 'rewards'. Did you mean 'reward'?"),
        ({"chain": "rlhf", "model": "t", "stages": {"sft": "a"}}, "Stage 'reward': The job spec is not valid: the"),
    ],
)  # fmt: skip
def test_a_wrong_chain_is_one_clear_error(raw: Any, expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_chain(raw)
    assert expected in caught.value.message


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        parse_chain(chain(stage("a", n_epochs=0), stage("b", batch_size=0)))
    assert "Stage 'a'" in caught.value.message and "Stage 'b'" in caught.value.message


RLHF = {"chain": "rlhf", "model": "tiny", "stages": {"sft": "rows", "reward": "pairs", "ppo": "prompts"}}


def test_rlhf_is_three_stages() -> None:
    assert list(expand(RLHF)) == ["sft", "reward", "ppo"]
    found = parse_chain(RLHF)
    assert [s.training_file for s in found.values()] == ["rows", "pairs", "prompts"]
    assert [s.model for s in found.values()] == ["tiny", "stage:sft", "stage:sft"]
    assert [(s.objective.name, s.head) for s in found.values()] == [("sft", "lm"), ("reward", "reward"), ("ppo", "lm")]
    assert references(found["ppo"]) == [("model", "sft"), ("reward_model", "reward")]
    own = {"name": "ppo", "training_file": "prompts", "objective": {"kl": 0.1}, "n_epochs": 3}
    listed = [{"name": "sft", "training_file": "rows"}, {"name": "reward", "training_file": "pairs"}, own]
    ppo = parse_chain({**RLHF, "stages": listed})["ppo"]
    assert ppo.objective.options == {"reward_model": "stage:reward", "kl": 0.1} and ppo.n_epochs == 3
    elsewhere = {**RLHF["stages"], "ppo": {"training_file": "prompts", "objective": {"name": "grpo", "group": 4}}}
    assert parse_chain({**RLHF, "stages": elsewhere})["ppo"].objective.options == {"group": 4}


def test_an_objective_that_is_not_there_is_named_with_its_stage() -> None:
    without = {**DESCRIBE, "objective": {k: v for k, v in DESCRIBE["objective"].items() if k != "ppo"}}
    with pytest.raises(SpecError, match=r"Stage 'ppo': .*there is no objective 'ppo'; use one of: d"):
        check_stages(parse_chain(RLHF), without)
    assert list(check_stages(parse_chain(RLHF), DESCRIBE)) == ["sft", "reward", "ppo"]


def test_a_stage_goes_on_with_the_tuner_that_it_continues() -> None:
    raw = chain(stage("a", tuner="bitfit"), stage("b"), stage("c", tuner="full"), stage("d"))
    assert [s.tuner.name for s in check_stages(parse_chain(raw), DESCRIBE).values()] == [
        "bitfit",
        "bitfit",
        "full",
        "lora",
    ]


def test_the_judge_of_a_grader_may_be_a_stage() -> None:
    """Also within a `multi`; other texts that look like it are texts."""
    judge = {"type": "score_model", "model": "stage:a", "input": [{"role": "user", "content": "stage:a"}]}
    grader = {"type": "multi", "name": "stage:a", "graders": {"j": judge}}
    found = parse_chain(chain(stage("a"), stage("b", objective={"name": "ppo", "grader": grader})))
    assert references(found["b"]) == [("model", "a"), ("grader.model", "a")]
    filled = fill_in(found["b"], {"a": "ft:a"}).objective.options["grader"]
    assert filled == {**grader, "graders": {"j": {**judge, "model": "ft:a"}}}
    judge["model"] = "stage:c"
    with pytest.raises(SpecError, match=r"grader\.model names the stage 'c', which does not exist"):
        parse_chain(chain(stage("a"), stage("b", objective={"name": "ppo", "grader": grader})))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            chain(stage("a"), stage("b", tuner="bitfit")),
            "Stage 'b': it continues from 'a', which leaves the kind 'adapter' (tuner lora); the tuner 'bitfit' goes "
            "on from kind 'delta' only.",
        ),
        (
            chain(stage("a", head="reward"), stage("b")),
            "Stage 'b': model names 'a', whose model has the head 'reward'; it must have the head 'lm'",
        ),
        (
            chain(stage("a"), stage("b", objective={"name": "ppo", "reward_model": "stage:a"})),
            "Stage 'b': reward_model names 'a', whose model has the head 'lm'; it must have the head",
        ),
        (chain(stage("a", tuner="lorra")), "Stage 'a': The job spec is not valid: there is no tuner 'lorra'"),
    ],
)
def test_a_result_that_cannot_be_used_is_refused_before_anything_is_trained(raw: Any, expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_stages(parse_chain(raw), DESCRIBE)
    assert expected in caught.value.message


def child(status: str, model: str = "ft:m") -> Child:
    return Child("ftjob-1", status, model)


@pytest.mark.parametrize(
    ("made", "what", "name"),
    [
        ({}, "start", "sft"),
        ({"sft": "validating_files"}, "wait", "sft"),
        ({"sft": "queued"}, "wait", "sft"),
        ({"sft": "running"}, "wait", "sft"),
        ({"sft": "paused"}, "wait", "sft"),
        ({"sft": "pausing"}, "wait", "sft"),
        ({"sft": "cancelling"}, "wait", "sft"),
        ({"sft": "failed"}, "failed", "sft"),
        ({"sft": "cancelled"}, "failed", "sft"),
        ({"sft": "succeeded"}, "start", "reward"),
        ({"sft": "succeeded", "reward": "running"}, "wait", "reward"),
        ({"sft": "succeeded", "reward": "succeeded"}, "start", "ppo"),
        ({"sft": "succeeded", "reward": "succeeded", "ppo": "failed"}, "failed", "ppo"),
        ({"sft": "succeeded", "reward": "succeeded", "ppo": "succeeded"}, "done", "ppo"),
        # a stage that is made anew holds up those behind it
        ({"sft": "queued", "reward": "succeeded"}, "wait", "sft"),
    ],
)
def test_what_comes_next(made: dict[str, str], what: str, name: str) -> None:
    stages = parse_chain(RLHF)
    found = next_stage(stages, {k: child(v, f"ft:{k}") for k, v in made.items()})
    assert (found.what, found.stage, found.number) == (what, name, list(stages).index(name) + 1)
    assert (found.spec is None) == (what == "done") and (found.child is None) == (what == "start")
    if name == "ppo" and found.spec is not None:
        assert (found.spec.model, found.spec.objective.options["reward_model"]) == ("ft:sft", "ft:reward")


def test_only_whole_references_are_replaced() -> None:
    raw = chain(stage("a"), stage("b", objective={"name": "distill", "teacher": "ft:other"}), metadata={"x": "stage:a"})
    filled = fill_in(parse_chain(raw)["b"], {"a": "ft:a"})
    assert (filled.model, filled.objective.options, filled.metadata) == (
        "ft:a",
        {"teacher": "ft:other"},
        {"x": "stage:a"},
    )
