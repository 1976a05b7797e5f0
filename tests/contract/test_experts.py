"""Mixture-of-experts models: what adapters reach, the files in plain peft, the routers' loss however a step is cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from job_kit import checked, greedy
from peft import PeftModel
from retain_kit import parts_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tiny
from tunewright.core.errors import SpecError
from tunewright.core.events import EventWriter
from tunewright.core.example import Example, Group
from tunewright.core.home import Home
from tunewright.jobs.prepare import create_run
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.objectives.sft import SFT
from tunewright.ops.noise import neftune
from tunewright.ops.packing import collate
from tunewright.train.balance import Balanced, balanced
from tunewright.train.loop import accumulate, means_of
from tunewright.train.run import run_job
from tunewright.tuners.lora import LoRA
from tunewright.tuners.peft_adapter import merge_adapter
from tunewright.tuners.rslora import RankStabilisedLoRA

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
ONE = [m if m == "qwen3_moe" else pytest.param(m, marks=pytest.mark.slow) for m in MIXTURES]
IDS = torch.tensor([[5, 17, 60, 41, 8, 77, 12, 90]])


def rows(n: int = 6) -> list[Group]:
    g = torch.Generator().manual_seed(2)
    found = []
    for i in range(n):
        length = int(torch.randint(4, 16, (1,), generator=g))
        ids = tuple(torch.randint(3, 97, (length,), generator=g).tolist())
        found.append(Group((Example(ids, (0.0, *[1.0] * (length - 1)), i + 1),)))
    return found


def shaken(tuner: Any, folder: Path) -> nn.Module:
    model = tuner.attach(load_model(folder), 0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tuner.trainable().values():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", MIXTURES)
def test_by_default_only_the_attention_is_adapted(family: str, built: Any) -> None:
    tuner = LoRA(LoRA.Options(r=4))
    tuner.attach(load_model(built(family)), 0)
    assert {n.split(".lora_")[0].rpartition(".")[2] for n in tuner.trainable()} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }


@pytest.mark.parametrize("family", ONE)
@pytest.mark.parametrize("kind", [LoRA, pytest.param(RankStabilisedLoRA, marks=pytest.mark.slow)])
def test_experts_are_adapted_saved_merged_and_switched_off(family: str, kind: Any, built: Any, tmp_path: Path) -> None:
    folder = built(family)
    tuner = kind(kind.Options(r=2, alpha=4, experts=True, target_modules=["q_proj", "v_proj"]))
    fresh = tuner.attach(load_model(folder), 0)
    base = logits(AutoModelForCausalLM.from_pretrained(folder).eval())
    torch.testing.assert_close(logits(fresh), base, atol=1e-5, rtol=1e-5)
    model = shaken(tuner, folder)
    trained = tuner.trainable()
    on_experts = [n for n in trained if ".experts." in n]
    assert len(on_experts) == 2 * 4 and len(trained) == 2 * (4 + 4)  # 2 layers; A, B of both tensors; of q and v
    sizes = {p.shape[0] for n, p in trained.items() if ".experts." in n and "lora_A" in n}
    assert sizes == {4 * 2}  # 4 experts of rank 2
    assert not any(p.requires_grad for n, p in model.named_parameters() if n not in trained)
    after = logits(model)
    assert not torch.allclose(after, base, atol=1e-3)
    with tuner.off():
        torch.testing.assert_close(logits(model), base, atol=1e-5, rtol=1e-5)

    tuner.save(tmp_path, "base")
    record = json.loads((tmp_path / "adapter_config.json").read_text())
    assert record["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path).eval()
    torch.testing.assert_close(logits(plain), after, atol=1e-5, rtol=1e-5)
    again = kind(tuner.options)
    other = again.attach(load_model(folder), 9)
    again.load(tmp_path)
    assert torch.equal(logits(other), after)
    torch.testing.assert_close(logits(merge_adapter(load_model(folder), tmp_path)), after, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(tuner.merge()), after, atol=1e-4, rtol=1e-4)


def test_experts_train_with_every_layer_recomputed(built: Any) -> None:
    """The same gradients, and all of them."""
    found = []
    for choice in ("none", "full"):
        tuner = LoRA(LoRA.Options(r=2, experts=True, target_modules=[]))
        policy = Policy(shaken(tuner, built("qwen3_moe")))
        policy.set_checkpointing(choice)
        policy.model.train()
        SFT(SFT.Options())(policy, collate(rows()))["loss"].total.backward()
        found.append({n: p.grad for n, p in tuner.trainable().items()})
    for name, grad in found[0].items():
        assert grad is not None and grad.abs().sum() > 0
        torch.testing.assert_close(grad, found[1][name])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"experts": True, "dropout": 0.1}, "Set dropout to 0"),
        ({"target_modules": []}, "the list is empty"),
        ({"target_modules": ["gate_up_proj"]}, "no linear layer 'gate_up_proj'"),
    ],
)
def test_what_peft_cannot_do_is_refused(options: dict[str, Any], said: str, built: Any) -> None:
    with pytest.raises(SpecError, match=said):
        LoRA(LoRA.Options(**options)).attach(load_model(built("mixtral")), 0)


def test_a_model_without_experts_says_so(tiny_model_dir: Path) -> None:
    with pytest.raises(SpecError, match="has no experts"):
        LoRA(LoRA.Options(experts=True)).attach(load_model(tiny_model_dir), 0)
    with pytest.raises(SpecError, match="router_loss is for a mixture of experts"):
        balanced(SFT(SFT.Options()), Policy(load_model(tiny_model_dir)), 0.1)


# --- the routers' loss ------------------------------------------------------------------------------------------------


def step(policy: Policy, tokens: int, coefficient: float, tuner: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    for p in tuner.trainable().values():
        p.grad = None
    policy.model.train()
    objective = balanced(SFT(SFT.Options()), policy, coefficient)
    sums, weights = accumulate(parts_of(policy=policy, objective=objective, tuner=tuner), rows(), tokens, 1)
    return means_of(sums, weights), {n: p.grad.clone() for n, p in tuner.trainable().items()}


@pytest.mark.parametrize("family", ONE)
def test_the_routers_loss_is_transformers_own_over_the_whole_step(family: str, built: Any) -> None:
    """Value and gradient, whole and cut; frozen routers pass it on to what is trained below them."""
    tuner = LoRA(LoRA.Options(r=4))
    policy = Policy(shaken(tuner, built(family)))
    got, grads = step(policy, 10**6, 0.3, tuner)
    alone, without = step(policy, 10**6, 0.0, tuner)
    assert "router_loss" not in alone and got["loss"] == pytest.approx(alone["loss"])

    examples = [g.examples[0] for g in rows()]
    width = max(len(e.ids) for e in examples)
    ids = torch.tensor([[*e.ids, *[0] * (width - len(e.ids))] for e in examples])
    mask = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in examples])
    theirs = LoRA(LoRA.Options(r=4))
    model = shaken(theirs, built(family))
    model.get_base_model().set_attn_implementation("eager")
    loss = model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    loss.backward()
    assert got["router_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, p in theirs.trainable().items():
        part = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(grads[name] - without[name], 0.3 * part, rtol=2e-3, atol=2e-6)
    assert any(p.grad is not None and p.grad.abs().max() > 1e-5 for p in theirs.trainable().values())

    for tokens in (1, 20):
        cut, cut_grads = step(policy, tokens, 0.3, tuner)
        assert cut == pytest.approx(got, rel=1e-5)
        for name, grad in grads.items():
            assert (cut_grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7


def test_the_law_holds_with_noise_and_recomputed_layers(built: Any) -> None:
    tuner = LoRA(LoRA.Options(r=4, dropout=0.3))
    model = shaken(tuner, built("qwen3_moe"))
    policy = Policy(model, embedding_noise=neftune(model, 5.0))
    policy.set_checkpointing("full")
    whole, cut = step(policy, 10**6, 0.3, tuner), step(policy, 20, 0.3, tuner)
    assert cut[0] == pytest.approx(whole[0], rel=1e-5)
    for name, grad in whole[1].items():
        assert (cut[1][name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7


def test_everything_else_is_the_objective_s(built: Any) -> None:
    policy = Policy(load_model(built("mixtral")))
    inner = SFT(SFT.Options())
    outer = balanced(inner, policy, 0.5)
    assert isinstance(outer, Balanced) and balanced(inner, policy, 0.0) is inner
    batch = collate(rows())
    with torch.no_grad():
        terms = outer(policy, batch)
    assert outer.card is inner.card and outer.report is None
    assert {n: t.weight for n, t in terms.items()} == outer.weights(batch)
    assert terms["router_loss"].coef == 0.5
    shorter = replace(batch, weights_T=torch.zeros_like(batch.weights_T))
    assert outer.weights(shorter)["router_loss"] == 2 * batch.n_tokens  # every token is routed, trained or not


@pytest.mark.slow
def test_a_job_on_experts_is_served(home: Home, tiny_model_dir: Path) -> None:
    """LoRA on experts with the routers' loss: in the events, in the result, merged by the engine."""

    folder = tiny.build_family(home.models / "moe", "qwen3_moe", tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(500)
    model.config.max_position_embeddings = 256
    model.save_pretrained(folder)
    for name in ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (tiny_model_dir / name).exists():
            (folder / name).write_bytes((tiny_model_dir / name).read_bytes())
    train = tiny.write_rows(home.root / "train.jsonl", tiny.sft_rows(18))
    fields = {"model": "moe", "training_file": str(train), "dtype": "float32", "threads": 1, "seed": 1, "n_epochs": 3}
    tuner = {"name": "lora", "r": 4, "experts": True}
    spec = checked({**fields, "batch_size": 6, "router_loss": 0.02, "tuner": tuner})
    run = create_run(home, spec, train_path=train)
    events = EventWriter(run.attempt(1) / "events.jsonl", 1)
    assert run_job(run, home, events, lambda: False)["status"] == "succeeded"
    events.close()
    told = [e.data for e in run.events() if e.type == "metrics"]
    assert all(2 <= t["router_loss"] < 4 for t in told) and told[-1]["train_loss"] < told[0]["train_loss"]
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), run.result).eval()
    prompt = [5, 17, 300, 41]
    wanted = opened.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 4:].tolist()
    said = greedy(home, run, prompt, 6)
    assert said and said == wanted[: len(said)]
