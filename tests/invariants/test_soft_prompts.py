"""Soft prompts: peft's loss, gradients and answers, however rows are packed, cut, shared, recomputed or served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_kit import make_groups
from peft import PeftModel, get_peft_model
from plain import assert_relative, plain_loss, plain_model, shake, step
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import engine_kit as kit
import tiny
from tunewright.core.errors import SpecError, UserError
from tunewright.core.example import Example, Group
from tunewright.core.spec import Part as Chosen
from tunewright.engine.engine import Engine
from tunewright.engine.request import parse_request
from tunewright.engine.scheduler import Limits
from tunewright.models.fast_llama import FastLlama
from tunewright.models.fast_serves import why_not
from tunewright.models.heads import Head
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.ops.kernels import Kernels
from tunewright.ops.packing import collate
from tunewright.ops.prefix import share_prefixes
from tunewright.train.run import context_left, row
from tunewright.tuners import TUNERS
from tunewright.tuners.combine import check
from tunewright.tuners.peft_adapter import merge_adapter
from tunewright.tuners.soft import SoftPrompt

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("prompt", {}),
    "p_tuning": ("p_tuning", {"hidden_size": 16}),
    "p_tuning, lstm": ("p_tuning", {"encoder": "lstm", "hidden_size": 16, "layers": 1}),
    "prefix": ("prefix", {}),
    "prefix, projection": ("prefix", {"projection": True, "hidden_size": 16}),
}
ONE_EACH = ("prompt", "p_tuning", "prefix")
P_TUNING_SLOW = [pytest.param(kind, marks=pytest.mark.slow) if kind == "p_tuning" else kind for kind in ONE_EACH]
TEXT = "It is red. It is blue."


def make(kind: str, **options: Any) -> SoftPrompt:
    name, own = KINDS[kind]
    part = TUNERS.load(name)
    return part(part.Options(**{"virtual_tokens": 5, **own, **options}))


def shaken(kind: str, folder: Path, size: float = 0.1, **options: Any) -> tuple[SoftPrompt, nn.Module]:
    tuner = make(kind, **options)
    return tuner, shake(tuner, folder, size)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if "," in kind else kind for kind in KINDS]
)
def test_loss_and_gradients_are_peft_s(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """peft's model with the same encoder, and with the saved file: rows padded, transformers' own loss."""
    tuner, model = shaken(kind, tiny_model_dir)
    config = tuner.config(load_model(tiny_model_dir), 0)
    reference: Any = get_peft_model(plain_model(tiny_model_dir), config)  # type: ignore[arg-type]
    reference.prompt_encoder.load_state_dict(tuner.model.prompt_encoder.state_dict())
    wanted = plain_loss(reference, make_groups())
    wanted.backward()
    got, grads = step(Policy(model), make_groups())
    assert got == pytest.approx(wanted.item(), abs=1e-5)
    assert_relative(grads, {k: p.grad for k, p in reference.named_parameters() if p.grad is not None}, 1e-4)
    tuner.save(tmp_path, str(tiny_model_dir))
    opened = PeftModel.from_pretrained(plain_model(tiny_model_dir), tmp_path)
    with torch.no_grad():
        assert plain_loss(opened, make_groups()).item() == pytest.approx(got, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt2", "mixtral", "qwen3"])
@pytest.mark.parametrize("kind", ONE_EACH)
def test_windows_learned_positions_and_experts(kind: str, family: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """peft's loss on other architectures, with the saved file; rows longer than the windows."""
    folder = tiny.build_family(tmp_path / "model", family, tiny_model_dir)
    config = json.loads((folder / "config.json").read_text())
    if family == "gpt2":
        config.pop("num_key_value_heads")
        (folder / "config.json").write_text(json.dumps(config))
    groups = [Group((Example(tuple(t % 97 for t in e.ids), e.weights),)) for g in make_groups() for e in g.examples]
    tuner, model = shaken(kind, folder)
    tuner.save(tmp_path, str(folder))
    opened = PeftModel.from_pretrained(plain_model(folder), tmp_path)
    with torch.no_grad():
        assert step_loss(Policy(model), groups) == pytest.approx(plain_loss(opened, groups).item(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONE_EACH)
def test_a_decoder_with_a_head(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The head is trained and saved beside the soft prompt; peft's scores, row by row."""
    folder = tiny.build_family(tmp_path / "model", "llama, head", tiny_model_dir)
    tuner = make(kind)
    model = tuner.attach(load_model(folder, head=Head("classify", ("a", "b", "c"))), 0)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in tuner.trainable().values():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    assert any("score" in name for name in tuner.trainable())
    tuner.save(tmp_path, str(folder))
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    opened = PeftModel.from_pretrained(plain, tmp_path).eval()
    rows = [tuple(t % 97 for t in e.ids) for group in make_groups(4) for e in group.examples]
    batch = collate([Group((Example(ids, (0.0,) * len(ids), label=0.0),)) for ids in rows])
    with torch.no_grad():
        wanted = torch.cat([opened(input_ids=torch.tensor([ids])).logits for ids in rows])
        torch.testing.assert_close(Policy(model).scores(batch), wanted, atol=1e-5, rtol=1e-5)


def step_loss(policy: Policy, groups: list[Group]) -> float:
    batch = collate(groups)
    return -float((policy.token_stats(batch, {"logp"})["logp"] * batch.weights_T).sum() / batch.weights_T.sum())


@pytest.mark.parametrize("kind", P_TUNING_SLOW)
def test_packed_is_alone_and_recomputing_changes_nothing(kind: str, tiny_model_dir: Path) -> None:
    _, model = shaken(kind, tiny_model_dir)
    policy = Policy(model)
    loss, grads = step(policy, make_groups())
    alone, apart = step(policy, make_groups(), budget=1)
    assert alone == pytest.approx(loss, abs=1e-5)
    assert_relative(apart, grads, 1e-4)
    policy.set_checkpointing("full")
    model.train()
    again, recomputed = step(policy, make_groups())
    assert again == loss
    assert all(torch.equal(recomputed[k], g) for k, g in grads.items())


def targets(policy: Policy, shared: bool, groups: list[Group]) -> dict[tuple[int, int], float]:
    """(example, position) -> log-probability of each supervised token."""
    batch = share_prefixes(groups) if shared else collate(groups)
    numbers = batch.per_segment.get("example", torch.arange(batch.n_segments))
    with torch.no_grad():
        logp_T: Tensor = policy.token_stats(batch, {"logp"})["logp"]
    segment_T = torch.bucketize(torch.arange(batch.n_tokens), batch.cu_seqlens[1:].long(), right=True)
    found = batch.weights_T.nonzero()[:, 0].tolist()
    return {(int(numbers[segment_T[t]]), int(batch.position_T[t])): float(logp_T[t]) for t in found}


@pytest.mark.parametrize("kind", P_TUNING_SLOW)
def test_a_shared_prompt_sees_the_soft_prompt_once(kind: str, tiny_model_dir: Path) -> None:
    _, model = shaken(kind, tiny_model_dir)
    groups = [
        Group(tuple(Example((*prompt, *answer), (0.0,) * 4 + (1.0,) * len(answer)) for answer in answers), prefix=4)
        for prompt, answers in [((5, 6, 7, 8), [(9, 10), (11, 12, 13)]), ((20, 21, 22, 23), [(24,), (25, 26)])]
    ]
    apart, shared = (targets(Policy(model), is_shared, groups) for is_shared in (False, True))
    assert shared == pytest.approx(apart, abs=1e-5)
    assert len(apart) == 8


def test_a_prefix_and_a_prompt_of_the_same_text_are_the_same_at_the_start(tiny_model_dir: Path) -> None:
    """Keys and values of tokens in front are what the tokens in front would give."""
    groups = make_groups()
    losses = [
        step(Policy(make(kind, init_text=text).attach(load_model(tiny_model_dir), 0)), groups)[0]
        for kind, text in [("prompt", TEXT), ("prefix", TEXT), ("prompt", None), ("prefix", None)]
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[2] == pytest.approx(losses[3], abs=1e-5)
    assert abs(losses[0] - losses[2]) > 1e-3


def test_a_text_is_repeated_or_cut(tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    model: Any = load_model(tiny_model_dir)
    ids = AutoTokenizer.from_pretrained(tiny_model_dir)(TEXT)["input_ids"]
    table = model.get_input_embeddings().weight
    for n in (3, 2 * len(ids) + 1):
        tuner = make("prompt", init_text=TEXT, virtual_tokens=n)
        tuner.attach(load_model(tiny_model_dir), 0)
        assert torch.equal(tuner.encoder.embedding.weight, table[torch.tensor((ids * 3)[:n])])


def test_bad_options_are_clear_errors(tiny_model_dir: Path) -> None:
    for options in ({"virtual_tokens": 0}, {"virtual_tokens": 1001}, {"init_text": ""}):
        with pytest.raises(ValidationError):
            make("prompt", **options)
    with pytest.raises(SpecError, match=r"^tuner 'prefix': with projection the start is random"):
        row(TUNERS, Chosen(name="prefix", options={"projection": True, "init_text": "x"}))
    with pytest.raises(SpecError, match=r"virtual_tokens is 500, and the model's context is 512"):
        context_left(tiny_model_dir, make("prompt", virtual_tokens=500))
    assert context_left(tiny_model_dir, make("prefix", virtual_tokens=400)) == 112


@pytest.mark.parametrize("kind", ONE_EACH)
def test_it_cannot_be_merged_and_says_so(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    tuner, _ = shaken(kind, tiny_model_dir)
    tuner.save(tmp_path, "base")
    with pytest.raises(SpecError, match="cannot be folded into the base's weights"):
        tuner.merge()
    with pytest.raises(SpecError, match=rf"method {kind}\w*, which cannot be folded into the weights"):
        merge_adapter(load_model(tiny_model_dir), tmp_path)
    with pytest.raises(SpecError, match=rf"an adapter of the method {kind}\w*; only lora"):
        check([tmp_path, tmp_path], "svd", None, None, 0.5)


def test_the_fast_path_leaves_a_prefix_under_a_window_to_the_plain_modules(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    folder = tiny.build_family(tmp_path / "model", "mistral", tiny_model_dir)
    reason = why_not(make("prefix").attach(load_model(folder), 0), torch.float32)
    assert reason == "a window slides over its prefix of keys and values"


@pytest.mark.parametrize("kind", ["prompt", "p_tuning", "prefix", "prefix, projection"])
def test_the_fast_path_says_the_same(kind: str, tiny_model_dir: Path, kernels: Kernels) -> None:
    """Loss and gradients, whole, cut and computed again; without the prompt the base."""
    tuner, model = shaken(kind, tiny_model_dir)
    fast, groups = Policy(model, fast=FastLlama(model, torch.float32, kernels)), make_groups()
    want, want_grads = step(Policy(model), groups)
    for choice, budget in (("none", 10**6), ("full", 10**6), ("none", 40)):
        fast.set_checkpointing(choice)
        got, grads = step(fast, groups, budget)
        assert got == pytest.approx(want, abs=1e-5)
        assert_relative(grads, want_grads, 1e-4)
    batch = collate(groups)
    with torch.no_grad():
        torch.testing.assert_close(fast.hidden(batch), Policy(model).hidden(batch), atol=1e-5, rtol=1e-5)
        with tuner.off():
            base = Policy(load_model(tiny_model_dir)).hidden(batch)
            torch.testing.assert_close(fast.hidden(batch), base, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_the_fast_path_on_tiles_is_off_by_rounding_only(
    kind: str, tmp_path: Path, kernels: Kernels, tiny_model_dir: Path
) -> None:
    """Against float32 with the same rounded weights: no further from it than the plain bfloat16 modules."""
    if not kernels.tiles:
        pytest.skip("this processor has no AMX tiles")
    folder = tiny.build_family(tmp_path / "model", "llama", tiny_model_dir, **tiny.TILED, initializer_range=0.05)
    rows = [Group((Example(tuple(range(3, 3 + n)), (1.0,) * n, n),)) for n in (9, 30, 21)]
    exact, half = (make(kind).attach(load_model(folder, dtype), 0) for dtype in (torch.float32, torch.bfloat16))
    with torch.no_grad():
        for a, b in zip(exact.parameters(), half.parameters(), strict=True):
            a.copy_(b)
    fast = Policy(half, torch.bfloat16, fast=FastLlama(half, torch.bfloat16, kernels))
    assert fast.fast.tiles  # type: ignore[union-attr]
    (want, (wanted,)), (plain, (usual,)), (got, (grad,)) = (
        (loss, tuple(grads.values()))
        for loss, grads in (step(p, rows) for p in (Policy(exact), Policy(half, torch.bfloat16), fast))
    )
    assert got == pytest.approx(want, rel=0.005)
    assert (grad - wanted).norm() <= 1.5 * (usual - wanted).norm() <= 0.15 * wanted.norm()
    assert plain == pytest.approx(want, rel=0.01)


def test_another_method_s_or_peft_s_own_file_is_not_continued(tiny_model_dir: Path, tmp_path: Path) -> None:
    shaken("prompt", tiny_model_dir)[0].save(tmp_path, "base")
    with pytest.raises(SpecError, match="method is prompt_tuning there and prefix_tuning in this job"):
        shaken("prefix", tiny_model_dir)[0].load(tmp_path)
    tuner = shaken("p_tuning", tiny_model_dir)[0]
    tuner.model.save_pretrained(str(tmp_path))
    with pytest.raises(SpecError, match="holds what its encoder said and not the encoder"):
        tuner.load(tmp_path)


def artefact(folder: Path, kind: str, model: Path) -> Path:
    folder.mkdir()
    shaken(kind, model, 0.5)[0].save(folder, kit.BASE)
    return kit.write_artefact(folder, "adapter", kit.BASE)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("soft")
    made = {kind: artefact(root / kind.replace(", ", "-"), kind, model_dir) for kind in KINDS}
    return {**made, "lora": kit.make_adapter(root / "lora", model_dir, 3)}


def engine_of(root: Path, model_dir: Path, **limits: Any) -> Engine:
    home = kit.make_home(root / "home", model_dir)
    return Engine(home, dtype="float32", threads=1, limits=Limits(chunk_tokens=64, **limits))


def plain_answer(model: Path, adapter: Path | None, prompt: list[int], n: int) -> list[int]:
    """Greedy, by peft's forward over the whole text each time: no cache, no generate."""
    net: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    net = net if adapter is None else PeftModel.from_pretrained(net, adapter).eval()
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(n):
            ids.append(int(net(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == net.config.eos_token_id:
                return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def test_served_next_to_others_in_one_batch(tmp_path: Path, model_dir: Path, adapters: dict[str, Path]) -> None:
    """Greedy: peft's tokens for each of them, LoRA's and the base's, all in the same steps."""
    engine = engine_of(tmp_path, model_dir)
    sources: list[Path | None] = [None, *adapters.values()]
    prompts = [kit.random_prompt(n, n) for n in (3, 70)]
    asked = [(s, p) for p in prompts for s in sources]
    requests = [kit.ask(p, 12, **({"artefact": str(s)} if s else {})) for s, p in asked]
    got = [kit.tokens(log) for log in kit.run_all(engine, requests, spread=1)]
    assert got == [plain_answer(model_dir, s, p, 12) for s, p in asked]
    assert len({tuple(t) for t in got}) > len(sources)
    assert len(engine.artefacts.models) == 1
    assert len(next(iter(engine.artefacts.models.values())).adapters) == len(adapters)


@pytest.mark.parametrize("kind", P_TUNING_SLOW)
def test_the_answer_is_that_of_peft_s_generate(
    tmp_path: Path, model_dir: Path, adapters: dict[str, Path], kind: str
) -> None:
    """Long enough to move through the pools of the cache."""
    engine, prompt = engine_of(tmp_path, model_dir), kit.random_prompt(90, 1)
    net = kit.hf_adapted(model_dir, adapters[kind])
    net.generation_config.suppress_tokens = [2]
    asked = kit.ask(prompt, 60, artefact=str(adapters[kind]), logit_bias={2: -100})
    assert kit.answer(engine, asked) == kit.reference(net, prompt, 60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONE_EACH)
def test_served_over_a_model_with_a_window(tmp_path: Path, model_dir: Path, kind: str) -> None:
    """The window counts the virtual tokens, and most of them are behind it."""
    import transformers

    plain = {k: getattr(kit.hf_model(model_dir).config, k) for k in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ends = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2}
    made: Any = {**plain, **sizes, **ends, "sliding_window": 16, "initializer_range": 0.3}
    config = transformers.MistralConfig(**made)
    torch.manual_seed(1)
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    transformers.MistralForCausalLM(config).save_pretrained(folder)
    engine, where = engine_of(tmp_path, folder), artefact(tmp_path / "adapter", kind, folder)
    prompts = [kit.random_prompt(n, n) for n in (3, 12, 70)]
    logs = kit.run_all(engine, [kit.ask(p, 20, artefact=str(where)) for p in prompts])
    assert [kit.tokens(log) for log in logs] == [plain_answer(folder, where, p, 20) for p in prompts]


def test_virtual_tokens_take_room_in_the_context(tmp_path: Path, model_dir: Path, adapters: dict[str, Path]) -> None:
    engine = engine_of(tmp_path, model_dir)
    where = {"artefact": str(adapters["prefix"])}
    with pytest.raises(UserError, match="maximum context length is 507 tokens"):
        engine.add_request(parse_request(kit.ask(kit.random_prompt(507), 5, **where)), lambda event: None)
    log = kit.run_all(engine, [kit.ask(kit.random_prompt(504), None, logit_bias={2: -100}, **where)])[0]
    assert log[-1]["usage"] == {"prompt_tokens": 504, "completion_tokens": 3, "total_tokens": 507}


def test_what_is_not_used_goes_and_comes_back(tmp_path: Path, model_dir: Path, adapters: dict[str, Path]) -> None:
    engine, prompt = engine_of(tmp_path, model_dir, max_adapters=1), kit.random_prompt(9, 2)
    asked = {kind: kit.ask(prompt, 8, artefact=str(adapters[kind])) for kind in ("prompt", "prefix")}
    first = {kind: kit.answer(engine, raw) for kind, raw in asked.items()}
    (model,) = engine.artefacts.models.values()
    assert len(model.prefixes) == len(model.adapters) == 1
    assert {kind: kit.answer(engine, raw) for kind, raw in asked.items()} == first
    engine.unload(str(adapters["prefix"]))
    assert not model.prefixes


def test_one_of_another_model_is_refused(tmp_path: Path, model_dir: Path) -> None:
    other = kit.make_model(tmp_path / "other", hidden_size=32)
    engine = engine_of(tmp_path, model_dir)
    for kind in ONE_EACH:
        folder = artefact(tmp_path / kind, kind, other)
        (log,) = kit.run_all(engine, [kit.ask([5, 6], 3, artefact=str(folder))])
        assert log[-1]["type"] == "error" and "does not fit its base model" in log[-1]["error"]["message"]
