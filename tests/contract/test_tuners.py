"""The law of every tuner in the table: off = base, saved and loaded = original, merged = adapted, opens elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import groups_for, instance, prepared, with_adapter
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tunewright.core.errors import CheckpointError, SpecError
from tunewright.core.spec import KINDS, LISTS, check_parts, parse_spec
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.objectives.sft import SFT
from tunewright.ops.packing import collate
from tunewright.train.describe import describe_part
from tunewright.train.plan import resolve
from tunewright.tuners import TUNERS
from tunewright.tuners.base import Tuner

pytestmark = pytest.mark.parametrize("name", list(TUNERS))
IDS = torch.tensor([[5, 17, 300, 41, 8, 77, 12, 250]])
ARTEFACTS = {"adapter", "delta", "weights", "recipe"}


def attached(name: str, folder: Path, seed: int = 0) -> tuple[Tuner, nn.Module]:
    tuner = instance(TUNERS, name)
    return tuner, prepared(tuner, tuner.attach(load_model(folder), seed))


def shaken(name: str, folder: Path, seed: int = 0) -> tuple[Tuner, nn.Module]:
    """A tuner whose trained parameters are all away from where they started."""
    tuner, model = attached(name, folder, seed)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tuner.trainable().values():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    tuner.after_step(1)
    return tuner, model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of the text, without those of virtual tokens before it."""
    return model(IDS).logits[:, -IDS.shape[1] :]


def with_delta(base: Path, folder: Path) -> nn.Module:
    """A plain model with a delta in it, from the format's own description."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tensors = load_file(folder / "delta.safetensors")
    state = model.state_dict()
    for name, what in json.loads((folder / "delta_config.json").read_text())["tensors"].items():
        if what["kind"] == "sparse":
            state[name].view(-1)[tensors[f"{name}|at"].long()] = tensors[f"{name}|values"]
        elif what["kind"] == "whole":
            state[name].copy_(tensors[name])
        else:
            model.get_submodule(name.removesuffix(".bias")).bias = nn.Parameter(tensors[name])
    return model


@pytest.fixture(scope="module")
def base_logits(tiny_model_dir: Path) -> Tensor:
    return logits(load_model(tiny_model_dir))


def test_card_and_options(name: str) -> None:
    part = TUNERS.load(name)
    assert part.card.title and part.card.artefact in ARTEFACTS and 0 < part.card.default_lr < 1
    json.dumps(part.Options.model_json_schema())
    json.dumps(part.Options().model_dump())
    with pytest.raises(ValidationError):
        part.Options(no_such_option=1)
    assert part.__doc__


def test_auto_is_its_own_learning_rate(name: str) -> None:
    """Untouched, and as OpenAI's field multiplies it."""
    card = TUNERS.load(name).card

    def rate(**fields: Any) -> float:
        spec = parse_spec({"model": "m", "training_file": "f", "tuner": name, **fields})
        sizes: Any = {"threads": 1, "context": 64, "parameters": 1, "trainable": 1, "versions": {}, "dtype": "float32"}
        return resolve(spec, groups_for(SFT.card), [], card, **sizes).learning_rate

    assert rate() == card.default_lr
    assert rate(learning_rate_multiplier=0.5) == pytest.approx(card.default_lr / 2)
    assert rate(learning_rate=0.003) == 0.003


def test_a_bad_value_says_the_range_and_a_sensible_one(name: str) -> None:
    """Of every option with a range or a list of words, before anything is loaded."""
    row = describe_part(TUNERS.load(name))
    described = {
        **{kind: {} for kind in LISTS},
        **{k: dict.fromkeys(DEFAULTS, PLAIN) for k in KINDS},
        "tuner": {name: row},
    }
    for option, schema in row["schema"].get("properties", {}).items():
        for bad, said in wrong_values(schema):
            part = {"name": name, option: bad}
            with pytest.raises(SpecError) as e:
                check_parts(parse_spec({"model": "m", "training_file": "f", "tuner": part}), described)
            text, usual = e.value.message, json.dumps(row["defaults"][option])
            assert f"tuner '{name}', option '{option}' is {json.dumps(bad)}" in text and said in text, text
            assert f"usual: {usual}" in text and text.count("option '") == 1, text


PLAIN: dict[str, Any] = {"schema": {}, "defaults": {}, "card": {}}
DEFAULTS = ("sft", "adamw", "linear")


def wrong_values(schema: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    """Values that an option must not have, with what the error has to say of the range."""
    kinds = schema.get("anyOf", [schema])
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    for kind in kinds:
        low = kind.get("minimum", kind.get("exclusiveMinimum", low))
        high = kind.get("maximum", high)
    if low is not None:
        yield low - 1, f" {low}"
    if high is not None:
        yield high + 1, f"to {high}"
    if "enum" in schema:
        yield "no-such-word", ", ".join(f"`{v}`" for v in schema["enum"])


def test_exactly_what_is_trained_asks_for_gradients(name: str, tiny_model_dir: Path) -> None:
    tuner, model = attached(name, tiny_model_dir)
    trained = tuner.trainable()
    assert trained
    assert all(p.requires_grad and p.dtype == torch.float32 for p in trained.values())
    asking = {n for n, p in model.named_parameters() if p.requires_grad}
    if tuner.card.needs_data:  # the chosen entries of a tensor are a parameter of their own
        assert {n.removesuffix(".selected") for n in trained} <= asking
    else:
        assert {id(p) for p in trained.values()} == {id(p) for n, p in model.named_parameters() if n in asking}


def test_master_weights_are_float32_over_a_bfloat16_base(name: str, tiny_model_dir: Path) -> None:
    """And they are the same as over a float32 base."""
    trained = []
    for dtype in (torch.bfloat16, torch.float32):
        tuner = instance(TUNERS, name)
        prepared(tuner, tuner.attach(load_model(tiny_model_dir, dtype), 0))
        trained.append(tuner.trainable())
    assert {p.dtype for p in trained[0].values()} == {torch.float32}
    if not tuner.card.needs_data:  # whose choice may change with the rounding
        assert {n: p.shape for n, p in trained[0].items()} == {n: p.shape for n, p in trained[1].items()}


def test_attach_is_a_function_of_the_seed_and_draws_nothing_else(name: str, tiny_model_dir: Path) -> None:
    state = torch.random.get_rng_state()
    a, b, c = (attached(name, tiny_model_dir, seed)[0].trainable() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(a) == list(b) == list(c)
    assert all(torch.equal(a[k], b[k]) for k in a)
    if any("lora_A" in k for k in a):  # others begin at constants
        assert any(not torch.equal(a[k], c[k]) for k in a)


def test_starts_as_the_base_exactly(name: str, tiny_model_dir: Path, base_logits: Tensor) -> None:
    tuner, model = attached(name, tiny_model_dir)
    assert torch.equal(logits(model), base_logits) == tuner.card.identity_at_start


def test_off_is_the_base_exactly_and_only_within_the_block(
    name: str, tiny_model_dir: Path, base_logits: Tensor
) -> None:
    tuner, model = shaken(name, tiny_model_dir)
    before = logits(model)
    assert not torch.allclose(before, base_logits, atol=1e-2)
    with tuner.off():
        assert torch.equal(logits(model), base_logits)
    assert torch.equal(logits(model), before)
    with pytest.raises(KeyError), tuner.off():
        raise KeyError
    assert torch.equal(logits(model), before)
    assert all(p.requires_grad for p in tuner.trainable().values())


def test_gradients_through_a_policy_survive_a_look_at_the_base(name: str, tiny_model_dir: Path) -> None:
    """The reference pass of DPO comes after the policy's forward in some objectives' code, before it in others."""
    tuner, model = shaken(name, tiny_model_dir)
    batch = collate(groups_for(SFT.card, n=2))
    objective, policy = SFT(SFT.Options()), Policy(model)

    def grads() -> dict[str, Tensor]:
        out = {k: p.grad.clone() for k, p in tuner.trainable().items() if p.grad is not None}
        for p in tuner.trainable().values():
            p.grad = None
        return out

    tuner.before_step(1)
    objective(policy, batch)["loss"].total.backward()
    alone = grads()
    with tuner.off(), torch.no_grad():
        objective(policy, batch)
    objective(policy, batch)["loss"].total.backward()
    after = grads()
    frozen = getattr(tuner, "frozen", set())  # for this round
    assert set(alone) == set(after) == set(tuner.trainable()) - frozen
    assert all(torch.equal(alone[k], after[k]) for k in alone)


def test_saved_and_loaded_is_the_original(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    tuner, model = shaken(name, tiny_model_dir)
    tuner.save(tmp_path, str(tiny_model_dir))
    fresh, fresh_model = attached(name, tiny_model_dir, seed=9)
    fresh.load(tmp_path)
    fresh.load_state(json.loads(json.dumps(tuner.state())))
    fresh.load_tensors(tuner.tensors())
    mine, theirs = tuner.trainable(), fresh.trainable()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert torch.equal(logits(fresh_model), logits(model))


def test_only_safetensors_and_text_are_written(name: str, tiny_model_dir: Path, tmp_path: Path, capfd) -> None:
    tuner, _ = shaken(name, tiny_model_dir)
    capfd.readouterr()
    tuner.save(tmp_path, "some-base")
    assert capfd.readouterr() == ("", "")
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} <= {".safetensors", ".json"}


def test_the_artefact_opens_without_us(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """An adapter opens with peft (our own format with a few lines of torch), whole weights with transformers."""
    tuner, model = shaken(name, tiny_model_dir)
    tuner.save(tmp_path, str(tiny_model_dir))
    openers: dict[str, Any] = {
        "adapter": lambda: with_adapter(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path),
        "weights": lambda: AutoModelForCausalLM.from_pretrained(tmp_path),
        "delta": lambda: with_delta(tiny_model_dir, tmp_path),
    }
    opened = openers[tuner.card.artefact]().eval()
    torch.testing.assert_close(logits(opened), logits(model), atol=1e-5, rtol=1e-5)
    if tuner.card.artefact == "adapter":
        record = json.loads((tmp_path / "adapter_config.json").read_text())
        assert record["base_model_name_or_path"] == str(tiny_model_dir)


def test_merged_is_adapted_or_refused_as_the_card_says(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    tuner, model = shaken(name, tiny_model_dir)
    if not tuner.card.mergeable:
        with pytest.raises(SpecError, match="cannot be folded"):
            tuner.merge()
        return
    before = logits(model)
    merged = tuner.merge()
    torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=1e-4)
    assert not any("lora" in k or "base_layer" in k for k in merged.state_dict())
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("damage", ["empty folder", "cut off", "missing tensor"])
def test_a_damaged_artefact_is_one_clear_error_and_changes_nothing(
    name: str, tiny_model_dir: Path, tmp_path: Path, damage: str
) -> None:
    from safetensors.torch import save_file

    tuner, model = shaken(name, tiny_model_dir)
    if damage != "empty folder":
        tuner.save(tmp_path, str(tiny_model_dir))
        (path,) = tmp_path.glob("*.safetensors")
        if damage == "cut off":
            path.write_bytes(path.read_bytes()[:-100])
        else:
            tensors = load_file(path)
            tensors.pop(sorted(tensors)[0])
            save_file(tensors, path, {"format": "pt"})
    before = logits(model)
    with pytest.raises(CheckpointError):
        tuner.load(tmp_path)
    assert torch.equal(logits(model), before)


def test_training_at_the_default_rate_lowers_the_loss(name: str, tiny_model_dir: Path) -> None:
    tuner, model = attached(name, tiny_model_dir)
    optimizer = torch.optim.AdamW(tuner.trainable().values(), lr=tuner.card.default_lr)
    batch = collate(groups_for(SFT.card))
    losses = []
    for step in range(1, 13):
        tuner.before_step(step)
        loss = SFT(SFT.Options())(Policy(model), batch)["loss"].total / batch.weights_T.sum()
        loss.backward()
        tuner.on_gradients(step)
        tuner.update(optimizer, step)
        tuner.after_step(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
