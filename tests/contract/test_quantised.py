"""A base in nf4 or int8: what its bits stand for, every tuner that claims to work over it, whole jobs, the refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from job_kit import attempt, greedy, stop_after, weights
from parts import OPTIONS, groups_for, instance
from peft import LoraConfig, PeftModel
from test_selected_jobs import new_run, story
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tiny
from tunewright.core.errors import Interrupted, OutOfMemory, SpecError, UserError
from tunewright.core.home import Home
from tunewright.core.run import read_artefact
from tunewright.core.spec import check_parts, parse_spec
from tunewright.models.heads import Head
from tunewright.models.loader import load_model
from tunewright.models.memory import NF4_BYTES, stored_parameters
from tunewright.models.policy import Policy
from tunewright.models.shape import quantised_bytes, shape_of
from tunewright.objectives.sft import SFT
from tunewright.ops.packing import collate
from tunewright.ops.quant import CODINGS, Quantised, Scratch, count, dequantise, is_quantised
from tunewright.train import room
from tunewright.train.describe import describe
from tunewright.train.fast import PLAIN, choose_path
from tunewright.tuners import TUNERS

# the package is not in the environment of the default tests
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("bitsandbytes")]
WORKING = [name for name in TUNERS if TUNERS.load(name).card.works_on_nf4]
REFUSED = [name for name in TUNERS if name not in WORKING]
IDS = torch.tensor([[5, 17, 300, 41, 8, 77, 12, 250]])
GROUPS = groups_for(SFT.card)
# appendix E of arXiv 2305.14314
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def load(folder: Path, name: str = "nf4", dtype: torch.dtype = torch.float32) -> Any:
    return load_model(folder, dtype, quantization=name)


def quantised_layer(name: str, out: int = 10, inner: int = 48, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(inner, out)
    return layer, Quantised(layer, name, dtype, Scratch())


@pytest.mark.parametrize("name", CODINGS)
def test_pieces_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, held = quantised_layer(name, out=700)
    whole = held.weight
    monkeypatch.setattr("tunewright.ops.quant.PIECE", 64 * 256)
    assert 700 * 48 > 2 * 64 * 256 and torch.equal(held.weight, whole)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(held.decoded(dtype), whole.to(dtype))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def test_nf4_is_the_papers(bitsandbytes: Path) -> None:
    """Blocks of 64 numbers of the whole matrix, the nearest of 16 codes, scales in 8 bits: in float64."""
    import bitsandbytes as bnb  # type: ignore[import-not-found] # noqa: F401 registers the operators

    layer, held = quantised_layer("nf4", out=70)
    codes = torch.stack([held.codes.flatten() >> 4, held.codes.flatten() & 15], 1).flatten().long()
    outer = held.outer.double().repeat_interleave(256)[: len(held.scale)]
    scale = held.table.double()[held.scale.long()] * outer + held.offset.double()
    table = torch.tensor(NF4, dtype=torch.float64)
    spread = scale.repeat_interleave(64)[: len(codes)]
    torch.testing.assert_close(held.weight.double().flatten(), table[codes] * spread, rtol=1e-6, atol=1e-9)
    blocks = F.pad(layer.weight.detach().double().flatten(), (0, -layer.weight.numel() % 64)).view(-1, 64)
    absmax = blocks.abs().amax(1)
    assert ((scale - absmax).abs() < 0.05 * absmax).all()
    nearest = ((blocks / absmax[:, None]).flatten()[: len(codes), None] - table).abs()
    picked = nearest.gather(1, codes[:, None])[:, 0]
    assert (picked <= nearest.amin(1) + 1e-6).all()


def test_int8_is_each_row_over_its_largest(bitsandbytes: Path) -> None:
    import bitsandbytes as bnb  # type: ignore[import-not-found] # noqa: F401

    layer, held = quantised_layer("int8")
    w = layer.weight.detach().half().double()
    step = w.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(held.weight.double(), torch.round(w / step) * step, rtol=1e-3, atol=1e-3 * step.max())
    assert ((held.weight.double() - w).abs() <= 0.51 * step).all()


@pytest.mark.parametrize("name", CODINGS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_multiplies_as_what_its_bits_stand_for(name: str, autocast: bool) -> None:
    layer, held = quantised_layer(name)
    plain = held.plain()
    assert torch.equal(plain.bias, layer.bias) and not plain.weight.requires_grad
    x = torch.randn(3, 7, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, want = held(x), F.linear(x, plain.weight, plain.bias)
    assert got.dtype == want.dtype
    close = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(got, want, **close)
    dy = torch.randn(want.shape)
    ours = torch.autograd.grad((got.float() * dy).sum(), [x, layer.bias])
    theirs = torch.autograd.grad((want.float() * dy).sum(), [x, layer.bias])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **close)


def test_what_is_held_so_and_what_is_not(tiny_model_dir: Path) -> None:
    plain, model = load_model(tiny_model_dir), load(tiny_model_dir, dtype=torch.bfloat16)
    held = {name for name, m in model.named_modules() if isinstance(m, Quantised)}
    assert held == {name for name, m in plain.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight.bfloat16())
    logits(other := load(tiny_model_dir))
    (scratch,) = {m.scratch for m in other.modules() if isinstance(m, Quantised)}
    assert len(scratch.bytes) == 4 * max(plain.get_submodule(name).weight.numel() for name in held)
    assert count(model) == count(plain) and shape_of(model) == shape_of(plain)
    # the codes do not depend on the dtype of the computation
    for name in held:
        assert torch.equal(model.get_submodule(name).codes, other.get_submodule(name).codes)
    bits = sum(b.numel() * b.element_size() for m in model.modules() if isinstance(m, Quantised) for b in m.buffers())
    tables = 256 * 4 * len(held)
    assert bits - tables == pytest.approx(
        NF4_BYTES * sum(plain.get_submodule(n).weight.numel() for n in held), rel=0.02
    )
    assert CODINGS["nf4"].size == pytest.approx(NF4_BYTES, rel=1e-3)


def sft_loss(model: nn.Module) -> Tensor:
    batch = collate(GROUPS)
    return SFT(SFT.Options())(Policy(model), batch)["loss"].total / batch.weights_T.sum()


@pytest.mark.parametrize("name", WORKING)
def test_a_tuner_that_says_so_works_over_nf4(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """It starts as the base, is the base when off, trains all it should, learns, comes back, and can be folded in."""
    base = logits(load(tiny_model_dir))
    assert not torch.allclose(base, logits(load_model(tiny_model_dir)), atol=1e-3)
    tuner = instance(TUNERS, name)
    model = tuner.attach(load(tiny_model_dir), 0)
    assert torch.equal(logits(model), base) == tuner.card.identity_at_start
    optimizer = torch.optim.AdamW(tuner.trainable().values(), lr=tuner.card.default_lr)
    losses = []
    for step in range(1, 13):
        tuner.before_step(step)
        loss = sft_loss(model)
        loss.backward()
        tuner.on_gradients(step)
        tuner.update(optimizer, step)
        tuner.after_step(step)
        assert all(p.grad is not None for p in tuner.trainable().values())
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    after = logits(model)
    with tuner.off():
        assert torch.equal(logits(model), base)
    tuner.save(tmp_path, str(tiny_model_dir))
    fresh = instance(TUNERS, name)
    again = fresh.attach(load(tiny_model_dir), 9)
    fresh.load(tmp_path)
    fresh.load_state(tuner.state())
    fresh.load_tensors(tuner.tensors())
    assert torch.equal(logits(again), after)
    if tuner.card.mergeable:
        merged = tuner.merge()
        assert not is_quantised(merged)
        torch.testing.assert_close(logits(merged), after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", WORKING)
def test_gradients_are_those_over_the_decoded_base(name: str, tiny_model_dir: Path) -> None:
    """Of every trained parameter, also through all layers above it, against the same tuner over plain layers."""
    found = []
    for base in (load(tiny_model_dir), dequantise(load(tiny_model_dir))):
        tuner = instance(TUNERS, name)
        model = tuner.attach(base, 0)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in tuner.trainable().values():
                p.add_(0.02 * torch.randn(p.shape, generator=g))
        loss = sft_loss(model)
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in tuner.trainable().items()}))
    (held, ours), (plain, theirs) = found
    assert held == pytest.approx(plain, abs=1e-5)
    for key, grad in theirs.items():
        assert grad is not None and grad.abs().max() > 0, key
        torch.testing.assert_close(ours[key], grad, rtol=1e-4, atol=1e-5)


def of_bitsandbytes(folder: Path, name: str) -> Any:
    """A plain model with bitsandbytes' own layers in the place of its linear ones, for peft to recognise."""
    import bitsandbytes as bnb  # type: ignore[import-not-found]
    from peft import import_utils

    import_utils.is_bnb_available.cache_clear()
    import_utils.is_bnb_4bit_available.cache_clear()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or path == "lm_head":
            continue
        if name == "nf4":
            made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, False, torch.float32, quant_type="nf4")
            made.weight = bnb.nn.Params4bit(layer.weight.data, quant_type="nf4", module=made)
        else:
            made = bnb.nn.Linear8bitLt(
                layer.in_features, layer.out_features, False, has_fp16_weights=False, threshold=0
            )
            made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made.to("cpu"))
    setattr(model, f"is_loaded_in_{'4' if name == 'nf4' else '8'}bit", True)
    return model.train()


@pytest.mark.parametrize("name", CODINGS)
def test_loss_and_gradients_are_those_of_peft_and_bitsandbytes(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    tuner = instance(TUNERS, "lora")
    model = tuner.attach(load(tiny_model_dir, name), 0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tuner.trainable().values():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    tuner.save(tmp_path, str(tiny_model_dir))
    loss = sft_loss(model)
    loss.backward()
    theirs: Any = PeftModel.from_pretrained(of_bitsandbytes(tiny_model_dir, name), str(tmp_path), is_trainable=True)
    assert "bnb" in type(theirs.base_model.model.model.layers[0].mlp.up_proj).__module__
    total, weight = torch.zeros(()), 0.0
    for example in (e for group in GROUPS for e in group.examples):
        logp = theirs(torch.tensor([example.ids])).logits[0, :-1].log_softmax(-1)
        taken = logp.gather(1, torch.tensor(example.ids)[1:, None])[:, 0]
        total = total - (taken * torch.tensor(example.weights[1:])).sum()
        weight += sum(example.weights[1:])
    (total / weight).backward()
    assert loss.item() == pytest.approx((total / weight).item(), abs=1e-5)
    others = {key: p.grad for key, p in theirs.named_parameters() if p.requires_grad}
    for key, p in tuner.trainable().items():
        torch.testing.assert_close(p.grad, others[key], rtol=1e-4, atol=1e-5)


def test_a_tuner_that_trains_the_base_is_refused_before_anything_is_loaded() -> None:
    for name in REFUSED:
        raw = {"model": "tiny", "training_file": "t", "tuner": name}
        for quantization in ("nf4", "int8"):
            with pytest.raises(SpecError, match=f"tuner '{name}' trains weights of the base itself; use .* lora"):
                check_parts(parse_spec({**raw, "quantization": quantization}), describe())
        check_parts(parse_spec({**raw, "quantization": "none"}), describe())


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    monkeypatch.setattr("tunewright.core.spec.find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"needs the package bitsandbytes.*pip install bitsandbytes"):
        check_parts(parse_spec({"model": "tiny", "training_file": "t", "quantization": "nf4"}), describe())
    monkeypatch.setattr("tunewright.ops.quant.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load(tiny_model_dir)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose linear layers are most of it."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    return tiny.build_tiny_model(folder, hidden_size=128, intermediate_size=768, num_hidden_layers=3)


@pytest.mark.parametrize(
    ("tuner", "share", "asked", "found"),
    [
        ("lora", 1.5, "auto", ("float32", "none")),
        ("lora", 0.7, "auto", ("bfloat16", "none")),
        ("lora", 0.45, "auto", ("bfloat16", "nf4")),
        ("lora", 0.45, "none", "For 4 bits (.*) set quantization: nf4"),
        ("lora", 0.45, "int8", ("bfloat16", "int8")),
        ("lora", 0.05, "auto", "Choose a smaller model"),
        ("full", 2.0, "auto", "Use the tuner 'lora'"),
        ("full", 0.3, "auto", "Choose a smaller model"),
    ],
)
def test_what_is_auto_becomes_what_fits(
    wide: Path, monkeypatch: pytest.MonkeyPatch, tuner: str, share: float, asked: str, found: Any
) -> None:
    """share: what is there, of the weights in float32."""
    n = stored_parameters(wide)
    assert quantised_bytes(wide, n, 2, "nf4") < 0.8 * 0.45 * 4 * n < 2 * n
    monkeypatch.setattr(room, "room_left", lambda limit: share * 4 * n)
    spec = parse_spec({"model": "m", "training_file": "t", "tuner": tuner, "quantization": asked})
    card = TUNERS.load(tuner).card
    if isinstance(found, str):
        with pytest.raises(OutOfMemory, match=found):
            room.room_to_load(wide, card, torch.float32, spec)
        return
    dtype, quantization = room.room_to_load(wide, card, torch.float32, spec)
    assert (str(dtype), quantization) == (f"torch.{found[0]}", found[1])


def test_the_plain_modules_run_and_say_why(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = instance(TUNERS, "lora").attach(load(tiny_model_dir), 0)
    chosen = choose_path(model, torch.float32, 1, tmp_path, "auto", 1e12)
    assert (chosen.name, chosen.forward) == (PLAIN, None) and "its base is quantised" in chosen.why


def test_a_model_without_such_layers_says_so(tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = tiny.build_family(tmp_path / "gpt2", "gpt2", tiny_model_dir)
    with pytest.raises(UserError, match=r"no linear layers that can be held in nf4.*quantization: none"):
        load(folder)


@pytest.mark.nightly
@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f != "gpt2"])
@pytest.mark.parametrize("name", CODINGS)
def test_every_family(family: str, name: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Its numbers pass the probe, the head is left alone, and LoRA's gradients are those over the decoded base."""
    from test_families import LABELS, groups_of, is_head, our_loss

    head = Head("classify", LABELS) if is_head(family) else None
    folder = tiny.build_family(tmp_path / "model", family, tiny_model_dir)
    found = []
    for decode in (False, True):
        model = load_model(folder, head=head, quantization=name)
        assert is_quantised(model)
        tuner = TUNERS.load("lora")(TUNERS.load("lora").Options(r=4))
        net = tuner.attach(dequantise(model) if decode else model, 0)
        loss = our_loss(family, net, groups_of(family))
        found.append((loss, {k: p.grad for k, p in tuner.trainable().items()}))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for key, grad in found[1][1].items():
        if grad is not None:
            torch.testing.assert_close(found[0][1][key], grad, rtol=1e-3, atol=1e-5)


@pytest.fixture
def base(tiny_home: Home) -> Home:
    tiny.write_rows(tiny_home.root / "train.jsonl", tiny.sft_rows(18))
    return tiny_home


JOBS: list[Any] = [("lora", coding) for coding in CODINGS]
JOBS += [pytest.param(n, "nf4", marks=pytest.mark.nightly) for n in WORKING if n != "lora"]


@pytest.mark.parametrize(("tuner", "quantization"), JOBS)
def test_a_job_over_a_quantised_base_resumes_exactly(base: Home, tuner: str, quantization: str) -> None:
    options = {"tuner": {"name": tuner, **OPTIONS.get(tuner, {})}, "quantization": quantization}
    golden, stopped = new_run(base, tuner, **options), new_run(base, tuner, **options)
    attempt(golden, base)
    plan = golden.plan() or {}
    assert plan["quantization"] == quantization and "bitsandbytes" in plan["versions"]
    frozen = plan["parameters"] - plan["trainable_parameters"]
    assert frozen == pytest.approx(stored_parameters(base.models / "tiny"), rel=1e-3)
    assert any(f"are held in {quantization}; the adapter" in e.message for e in golden.events())
    record = read_artefact(golden.result)
    assert (record.quantization, record.base) == (quantization, "tiny")
    with pytest.raises(Interrupted):
        attempt(stopped, base, 1, stop_after(7))
    attempt(stopped, base, 2)
    assert story(stopped) == story(golden) and weights(stopped) == weights(golden)


def test_any_cut_of_a_step_is_the_step(base: Home) -> None:
    whole = new_run(base, "lora", quantization="nf4")
    cut = new_run(base, "lora", quantization="nf4", micro_batch_tokens=1)
    for run in (whole, cut):
        attempt(run, base)
    for a, b in zip(story(whole), story(cut), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("tuner", ["lora", "dora", "houlsby", "bitfit"])
def test_the_result_is_served_over_the_unquantised_base(
    base: Home, tuner: str, with_artefact: Callable[[Path, Path], Any]
) -> None:
    options = {"tuner": {"name": tuner, **OPTIONS.get(tuner, {})}, "quantization": "nf4"}
    run = new_run(base, tuner, n_epochs=8, learning_rate_multiplier=5, **options)
    attempt(run, base)
    losses = [row[1] for row in story(run)]
    assert losses[-1] < losses[0] - 0.05
    prompt = [5, 17, 300, 41]
    model = with_artefact(base.models / "tiny", run.result)
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 4:].tolist()
    said = greedy(base, run, prompt, 8)
    assert said and said == wanted[: len(said)]


@pytest.fixture
def with_artefact() -> Callable[[Path, Path], Any]:
    """(base folder, result) -> a plain model with what was trained, opened without us."""
    from parts import with_adapter

    from tunewright.tuners.delta import is_delta, merge_delta

    def opened(folder: Path, result: Path) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return merge_delta(model, result) if is_delta(result) else with_adapter(model, result)

    return opened


def test_a_job_goes_on_from_an_adapter_that_was_trained_so(base: Home) -> None:
    first = new_run(base, "lora", quantization="nf4", learning_rate_multiplier=5)
    attempt(first, base)
    name = first.job().name
    over = new_run(base, "lora", model=name, quantization="nf4", n_epochs=1, learning_rate=1e-12)
    plain = new_run(base, "lora", model=name, n_epochs=1, learning_rate=1e-12)
    full = new_run(base, "full", model=name, n_epochs=1, learning_rate=1e-12, tuner="full")
    for run in (over, plain, full):
        attempt(run, base)
    assert [read_artefact(r.result).quantization for r in (over, plain, full)] == ["nf4", "none", "none"]
    assert story(plain)[0][1] == pytest.approx(story(full)[0][1], abs=1e-5)
    assert story(over)[0][1] != pytest.approx(story(plain)[0][1], abs=1e-5)


def test_auto_becomes_nf4_in_a_job_that_would_not_fit(base: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    n = stored_parameters(base.models / "tiny")
    monkeypatch.setattr(room, "room_left", lambda limit: 2.2 * n)
    run = new_run(base, "lora", dtype="auto")
    attempt(run, base)
    assert (run.plan() or {})["quantization"] == "nf4"
    assert any("are held in nf4 because it would not fit otherwise" in e.message for e in run.events())


def test_peft_keeps_its_name_for_the_task(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The adapter's file says nothing of the quantisation: it opens in plain peft over the unquantised base."""
    tuner = instance(TUNERS, "lora")
    tuner.attach(load(tiny_model_dir), 0)
    tuner.save(tmp_path, "tiny")
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert (config.base_model_name_or_path, config.task_type) == ("tiny", "CAUSAL_LM")
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), str(tmp_path))
    torch.testing.assert_close(logits(opened), logits(load_model(tiny_model_dir)), atol=1e-5, rtol=1e-5)
