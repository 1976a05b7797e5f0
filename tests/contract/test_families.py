"""The law of every model family: our numbers are those of transformers' own padded forward, however a step is cut."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import tiny
from tunewright.core.errors import UserError
from tunewright.core.example import Example, Group
from tunewright.models.heads import Head
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.models.recompute import set_checkpointing
from tunewright.objectives.classify import Classify
from tunewright.objectives.sft import SFT
from tunewright.ops.noise import embedding_noise, token_keys
from tunewright.ops.packing import collate, pack
from tunewright.ops.padding import pad, real
from tunewright.tuners.base import Tuner
from tunewright.tuners.full import Full
from tunewright.tuners.lora import LoRA

PADDED = {"bloom", "gemma2", "t5", "mt5", "roberta"}
LABELS = ("a", "b", "c")
# the others differ from one of these in nothing that the paths of the code could tell apart
USUAL = ("mistral", "mixtral", "gpt2", "bloom", "t5", "bert", "roberta")
pytestmark = pytest.mark.parametrize(
    "family", [f if f in USUAL else pytest.param(f, marks=pytest.mark.slow) for f in tiny.FAMILIES]
)


def is_head(family: str) -> bool:
    return tiny.FAMILIES[family][2] == "classify"


def load(family: str, folder: Path) -> nn.Module:
    return load_model(folder, head=Head("classify", LABELS) if is_head(family) else None)


def groups_of(family: str, n: int = 7) -> list[Group]:
    """Rows of different lengths: with a source for encoder-decoders, with a label for heads."""
    g = torch.Generator().manual_seed(1)
    groups = []
    for i in range(n):
        length, source = torch.randint(3, 14, (2,), generator=g).tolist()
        ids = torch.randint(3, 97, (length,), generator=g).tolist()
        extra: dict[str, Any] = {}
        if family.endswith("t5"):
            extra["source_ids"] = tuple(torch.randint(3, 97, (source,), generator=g).tolist())
        if is_head(family):
            extra["label"] = float(i % 3)
        weights = tuple(float(k > length // 3 or k == length - 1) for k in range(length))
        groups.append(Group((Example(tuple(ids), weights, i + 1, **extra),)))
    return groups


def our_loss(
    family: str, model: nn.Module, groups: list[Group], micro_batch_tokens: int = 10**6, noise_step: int | None = None
) -> float:
    """Loss of a step, its gradients left on the parameters. noise_step: with this step's noise."""
    objective: Any = Classify(Classify.Options()) if is_head(family) else SFT(SFT.Options())
    policy, batches = Policy(model), pack(groups, micro_batch_tokens)
    weight = sum(objective.weights(b)["loss"] for b in batches)
    loss = 0.0
    for batch in batches:
        if noise_step is not None:
            batch = replace(batch, noise_T=token_keys(batch, 0, noise_step))
        part = objective(policy, batch)["loss"].total / weight
        part.backward()
        loss += part.item()
    return loss


def their_loss(family: str, model: nn.Module, groups: list[Group]) -> Tensor:
    """The loss that transformers computes itself over one padded batch."""
    examples = [e for g in groups for e in g.examples]
    lengths = [len(e.ids) for e in examples]
    ids = pad(torch.tensor([t for e in examples for t in e.ids]), lengths)
    mask = real(lengths, torch.device("cpu"))
    if is_head(family):
        padding = (1 - mask) * model.config.pad_token_id  # type: ignore[union-attr,operator]
        labels = torch.tensor([int(e.label or 0) for e in examples])
        return model(input_ids=ids + padding, attention_mask=mask, labels=labels).loss
    supervised = pad(torch.tensor([w for e in examples for w in e.weights]), lengths) > 0
    labels = torch.where(supervised, ids, -100)
    if not family.endswith("t5"):
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss
    widths = [len(e.source_ids) for e in examples]
    return model(
        input_ids=pad(torch.tensor([t for e in examples for t in e.source_ids]), widths),
        attention_mask=real(widths, torch.device("cpu")),
        decoder_input_ids=ids,
        decoder_attention_mask=mask,
        labels=torch.cat([labels[:, 1:], torch.full((len(examples), 1), -100)], 1),
    ).loss


def plain(family: str, folder: Path) -> nn.Module:
    return tiny.auto_class(family).from_pretrained(folder, attn_implementation="eager").eval()


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    got = {k.replace("original_module.", ""): p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return got


def assert_relative(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert set(got) == set(want) != set()
    whole = torch.cat([g.flatten() for g in want.values()]).norm()
    for k in want:
        assert (got[k] - want[k]).norm() <= tolerance * max(want[k].norm(), 1e-2 * whole), k


def check_step(family: str, model: nn.Module, reference: nn.Module) -> None:
    """Loss to 1e-5, every gradient to 1e-4 relative, and the loss after one optimizer step."""
    groups = groups_of(family)
    for _ in range(2):
        expected = their_loss(family, reference, groups)
        expected.backward()
        assert our_loss(family, model, groups) == pytest.approx(expected.item(), abs=1e-5)
        for net in (model, reference):
            torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05).step()
        assert_relative(take_gradients(model), take_gradients(reference), 1e-4)


def lora(family: str, folder: Path, dropout: float = 0.0) -> tuple[Tuner, nn.Module]:
    """A LoRA whose B is not zero, so that A has a gradient too."""
    tuner = LoRA(LoRA.Options(r=4, alpha=8, dropout=dropout))
    model = tuner.attach(load(family, folder), 0)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in tuner.trainable().values():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return tuner, model


def test_a_lora_step_is_that_of_transformers_and_peft(family: str, built: Any, tmp_path: Path) -> None:
    """Also: the saved adapter opens in peft and is the same model."""
    folder = built(family)
    tuner, model = lora(family, folder)
    tuner.save(tmp_path, str(folder))
    reference = PeftModel.from_pretrained(plain(family, folder), tmp_path, is_trainable=True)
    check_step(family, model.train(), reference)


def test_a_full_step_is_that_of_transformers(family: str, built: Any) -> None:
    model = Full(Full.Options()).attach(load(family, built(family)), 0)
    assert Policy(model).layout == ("padded" if family in PADDED else "packed")
    check_step(family, model.train(), plain(family, built(family)))


@pytest.mark.parametrize("micro_batch_tokens", [1, 30])
def test_any_cut_of_a_step_is_the_whole_step(family: str, built: Any, micro_batch_tokens: int) -> None:
    _, model = lora(family, built(family))
    groups = groups_of(family)
    whole = our_loss(family, model, groups)
    gradients = take_gradients(model)
    assert our_loss(family, model, groups, micro_batch_tokens) == pytest.approx(whole, rel=1e-6, abs=1e-6)
    assert_relative(take_gradients(model), gradients, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_with_dropout_any_cut_of_a_step_is_the_whole_step(family: str, built: Any, checkpointing: str) -> None:
    _, model = lora(family, built(family), dropout=0.3)
    model.train()
    groups = groups_of(family)
    still = our_loss(family, model, groups)
    take_gradients(model)
    set_checkpointing(model, checkpointing)
    whole = our_loss(family, model, groups, noise_step=1)
    gradients = take_gradients(model)
    assert whole != pytest.approx(still, rel=1e-4)
    assert our_loss(family, model, groups, 1, noise_step=1) == pytest.approx(whole, rel=1e-6, abs=1e-6)
    assert_relative(take_gradients(model), gradients, 1e-5)


@pytest.mark.slow
def test_embedding_noise_is_the_same_for_any_cut_or_refused(family: str, built: Any) -> None:
    """RoBERTa's head is run by the model's own forward, which reads tokens."""
    model = load(family, built(family))
    width = model.get_input_embeddings().weight.shape[-1]  # type: ignore[operator]
    policy = Policy(model, embedding_noise=partial(embedding_noise, width=width, alpha=5.0))

    def outputs(budget: int, noise_step: int | None) -> Tensor:
        batches = pack(groups_of(family), budget)
        if noise_step is not None:
            batches = [replace(b, noise_T=token_keys(b, 0, noise_step)) for b in batches]
        found = [policy.scores(b) if is_head(family) else policy.token_stats(b, {"logp"})["logp"] for b in batches]
        return torch.cat(found).detach()

    if family == "roberta":
        with pytest.raises(UserError, match="neftune_alpha cannot be used with RobertaForSequenceClassification"):
            outputs(10**6, 1)
        return
    whole = outputs(10**6, 1)
    torch.testing.assert_close(outputs(1, 1), whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs(10**6, None), whole, atol=1e-3)
    assert not torch.allclose(outputs(10**6, 2), whole, atol=1e-3)


def test_saved_and_loaded_is_the_original(family: str, built: Any, tmp_path: Path) -> None:
    """Whole weights, through our own loading and through transformers'."""
    tuner = Full(Full.Options())
    model = tuner.attach(load(family, built(family)), 0)
    with torch.no_grad():
        for p in tuner.trainable().values():
            p.add_(0.01)
    tuner.save(tmp_path, "base")
    other = Full(Full.Options())
    again = other.attach(load(family, built(family)), 0)
    other.load(tmp_path)
    assert all(torch.equal(p, tuner.trainable()[k]) for k, p in other.trainable().items())
    batch = collate(groups_of(family))
    with torch.no_grad():
        assert torch.equal(Policy(again).hidden(batch), Policy(model).hidden(batch))
        loss = their_loss(family, plain(family, tmp_path), groups_of(family)).item()
    assert our_loss(family, model, groups_of(family)) == pytest.approx(loss, abs=1e-5)
