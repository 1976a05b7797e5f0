"""The engine's promises as equalities: transformers' tokens, batched = alone, mixed = alone, streamed = whole."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import engine_kit as kit
from tunewright.core.durable import commit_folder
from tunewright.core.errors import CheckpointError, TunewrightError, UserError
from tunewright.core.home import Home
from tunewright.core.run import BASE_IS_START
from tunewright.data.tokenizer import Tokenizer
from tunewright.engine.engine import Engine
from tunewright.engine.request import parse_request
from tunewright.engine.scheduler import Limits

LENGTHS = (1, 2, 3, 17, 127, 128, 129, 200, 300)
CHAT = [{"role": "user", "content": "Question 3: what colour is the sea? Think well."}]


@pytest.fixture(scope="module")
def engine(lively_home: Home) -> Engine:
    """Small chunks, so that prompts are computed in several pieces."""
    return Engine(lively_home, dtype="float32", threads=1, limits=Limits(chunk_tokens=64))


@pytest.fixture(scope="module")
def base(model_dir: Path) -> Any:
    return kit.hf_model(model_dir)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Path]:
    """Adapters of different rank, scale and targets; `dora` and `head` are more than plain LoRA."""
    root = tmp_path_factory.mktemp("adapters")
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "rank": {"r": 7, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
        "scaled": {"use_rslora": True, "alpha_pattern": {"v_proj": 2, r"layers\.1\.mlp\.up_proj": 16}},
        "ranks": {"rank_pattern": {"k_proj": 2, "layers.0.self_attn.o_proj": 9}},
        "dora": {"use_dora": True},
        "head": {"target_modules": ["q_proj", "embed_tokens"]},
    }
    return {k: kit.make_adapter(root / k, model_dir, i, **options) for i, (k, options) in enumerate(kinds.items())}


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_is_generate(engine: Engine, base: Any, length: int) -> None:
    prompt = kit.random_prompt(length, length)
    wanted = kit.reference(base, prompt, 40)
    assert kit.answer(engine, kit.ask(prompt, 40)) == wanted
    assert len(set(wanted)) > 5 or len(wanted) < 10  # a model that repeats itself would prove nothing


@pytest.mark.parametrize("at_once", [2, 16])
def test_a_requests_choices_share_its_prompt(lively_home: Home, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They say the same as with a prompt for each; and of the prompt, only the last token is computed for each."""
    asked = {**kit.ask(kit.random_prompt(150, 3), 6), "n": 5, "temperature": 1.0, "seed": 7, "logit_bias": {2: -100}}
    computed, compute = [], Engine._compute

    def counted(engine: Engine, model: Any, work: list[tuple[Any, int]]) -> None:
        computed.append(sum(n for _, n in work))
        compute(engine, model, work)

    monkeypatch.setattr(Engine, "_compute", counted)
    limits = Limits(chunk_tokens=64, max_running=at_once)
    texts, tokens = [], []
    for _ in range(2):
        said = Engine(lively_home, dtype="float32", threads=1, limits=limits).generate(parse_request(asked))
        texts.append([c["text"] for c in said["choices"]])
        tokens.append(sum(computed))
        computed.clear()
        monkeypatch.setattr(Engine, "_share_prompts", lambda engine: None)
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    assert tokens == [5 * (150 + 5) - 4 * 149, 5 * (150 + 5)]


def test_an_answer_that_grows_through_the_pools_is_generate(engine: Engine, base: Any) -> None:
    """No end token is allowed, so the answer moves through pools of 128, 256 and 512."""
    prompt = kit.random_prompt(5, 1)
    log = kit.run_all(engine, [kit.ask(prompt, 270, logit_bias={2: -100})])[0]
    base.generation_config.suppress_tokens = [2]
    try:
        wanted = kit.reference(base, prompt, 270)
    finally:
        base.generation_config.suppress_tokens = None
    assert kit.tokens(log) == wanted
    assert len(wanted) == 270 and log[-1]["choices"][0]["finish_reason"] == "length"


def test_a_chat_is_generate_on_the_rendered_template(engine: Engine, base: Any, lively_home: Home) -> None:
    tokenizer = Tokenizer.load(lively_home.models / kit.BASE)
    prompt = tokenizer.encode_chat(CHAT)
    log = kit.run_all(engine, [{"base": kit.BASE, "messages": CHAT, "temperature": 0.0, "max_tokens": 30}])[0]
    wanted = kit.reference(base, prompt, 30)
    assert kit.tokens(log) == wanted
    assert log[-1]["choices"][0]["text"] == tokenizer.decode(wanted)
    assert log[0] == {"type": "start", "prompt_tokens": len(prompt)}


SHAPES = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral, sliding window": ("Mistral", {"sliding_window": 16}),
    "many heads": ("Llama", {"num_key_value_heads": 4}),
    "one key head": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_other_architectures(shape: str, tmp_path: Path, model_dir: Path) -> None:
    family, changes = SHAPES[shape]
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    plain = {k: getattr(kit.hf_model(model_dir).config, k) for k in ("vocab_size", "hidden_size")}
    config = getattr(transformers, f"{family}Config")(
        **plain,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        **{"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, **changes},
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(1)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    engine = Engine(Home(tmp_path / "home").ensure(), dtype="float32", threads=1, limits=Limits(chunk_tokens=32))
    net = kit.hf_model(folder)
    prompts = [kit.random_prompt(n, n) for n in (4, 40, 100)]
    logs = kit.run_all(engine, [{**kit.ask(p, 30), "base": str(folder)} for p in prompts])
    assert [kit.tokens(log) for log in logs] == [kit.reference(net, p, 30) for p in prompts]


@pytest.mark.parametrize("spread", [0, 3])
def test_batched_is_alone(engine: Engine, spread: int) -> None:
    """Greedy and sampled, long and short, arriving together or one after the other."""
    rng = random.Random(spread)
    requests = []
    for i in range(12):
        how = {"temperature": 0.0} if i % 2 else {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": i}
        requests.append(kit.ask(kit.random_prompt(rng.randrange(1, 200), i), rng.randrange(1, 60), **how))
    together = kit.run_all(engine, requests, spread)
    alone = [kit.run_all(engine, [r])[0] for r in requests]
    assert [kit.tokens(log) for log in together] == [kit.tokens(log) for log in alone]
    assert [log[-1] for log in together] == [log[-1] for log in alone]


@pytest.mark.parametrize("kind", ["plain", "rank", "scaled", "ranks", "dora", "head"])
def test_an_adapter_is_peft(engine: Engine, adapters: dict[str, Path], model_dir: Path, base: Any, kind: str) -> None:
    prompts = [kit.random_prompt(n, n) for n in (3, 90)]
    net = kit.hf_adapted(model_dir, adapters[kind])
    wanted = [kit.reference(net, p, 30) for p in prompts]
    assert [kit.answer(engine, kit.ask(p, 30, artefact=str(adapters[kind]))) for p in prompts] == wanted
    assert wanted != [kit.reference(base, p, 30) for p in prompts]


def test_mixed_adapters_are_alone(engine: Engine, adapters: dict[str, Path]) -> None:
    """Base, four adapters beside it and one in a copy of its own, all in the same steps."""
    sources: list[dict[str, Any]] = [{}, *({"artefact": str(adapters[k])} for k in ("plain", "rank", "scaled", "dora"))]
    requests = [kit.ask(kit.random_prompt(5 + 9 * i, i), 30, **sources[i % len(sources)]) for i in range(15)]
    together = [kit.tokens(log) for log in kit.run_all(engine, requests, spread=2)]
    assert together == [kit.answer(engine, r) for r in requests]


def test_loading_an_adapter_changes_nothing_for_the_base(engine: Engine, adapters: dict[str, Path], base: Any) -> None:
    prompt = kit.random_prompt(30, 4)
    kit.answer(engine, kit.ask(prompt, 5, artefact=str(adapters["plain"])))
    assert kit.answer(engine, kit.ask(prompt, 40)) == kit.reference(base, prompt, 40)


def test_whole_weights_are_served(engine: Engine, tmp_path: Path) -> None:
    folder = kit.write_artefact(kit.make_model(tmp_path / "result", seed=5), "weights", None)
    prompt = kit.random_prompt(30, 4)
    wanted = kit.reference(kit.hf_model(folder), prompt, 40)
    assert kit.answer(engine, kit.ask(prompt, 40, artefact=str(folder))) == wanted


def test_an_adapter_over_a_runs_own_weights_finds_them(engine: Engine, model_dir: Path, tmp_path: Path) -> None:
    """A job that went on from whole weights keeps a copy of them; its adapter is no adapter of the catalogue's base."""
    run, prompt = tmp_path / "ftjob-a", kit.random_prompt(30, 4)
    start = kit.make_model(run / "start", seed=5)
    adapter = kit.make_adapter(run / "result", start, 6, base=BASE_IS_START)
    (run / "job.json").write_text("{}")
    wanted = kit.reference(kit.hf_adapted(start, adapter), prompt, 30)
    assert kit.answer(engine, kit.ask(prompt, 30, artefact=str(adapter))) == wanted
    assert wanted != kit.reference(kit.hf_adapted(model_dir, adapter), prompt, 30)
    (run / "job.json").unlink()
    with pytest.raises(CheckpointError, match="run folder, which is gone"):
        kit.answer(engine, kit.ask(prompt, 30, artefact=str(adapter)))


def test_an_artefact_that_was_replaced_is_loaded_again(engine: Engine, tmp_path: Path, model_dir: Path) -> None:
    folder, prompt = tmp_path / "adapter", kit.random_prompt(30, 4)
    for seed in (11, 12):
        kit.make_adapter(folder, model_dir, seed)
        wanted = kit.reference(kit.hf_adapted(model_dir, folder), prompt, 30)
        assert kit.answer(engine, kit.ask(prompt, 30, artefact=str(folder))) == wanted


def test_seeds(engine: Engine) -> None:
    def sampled(**options: Any) -> list[int]:
        return kit.answer(engine, kit.ask([5, 6, 7], 30, temperature=1.0, **options))

    assert sampled(seed=1) == sampled(seed=1) != sampled(seed=2)
    assert len({tuple(sampled()) for _ in range(4)}) == 4


def test_n_choices(engine: Engine) -> None:
    """Choice i with a seed is always the same, differs from the others, and does not depend on n."""
    log = kit.run_all(engine, [kit.ask([5, 6, 7], 20, temperature=1.0, seed=3, n=5, logit_bias={2: -100})])[0]
    fewer = kit.run_all(engine, [kit.ask([5, 6, 7], 20, temperature=1.0, seed=3, n=2, logit_bias={2: -100})])[0]
    choices = [kit.tokens(log, i) for i in range(5)]
    assert [kit.tokens(fewer, i) for i in range(2)] == choices[:2]
    assert len({tuple(c) for c in choices}) == 5
    assert [c["index"] for c in log[-1]["choices"]] == [0, 1, 2, 3, 4]
    assert log[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 100, "total_tokens": 103}


def test_streamed_is_whole(engine: Engine, lively_home: Home) -> None:
    """Hot sampling of a random model: broken characters, special tokens, everything."""
    requests = [kit.ask([9, i], 60, temperature=2.0, seed=i, n=2, logit_bias={2: -100}) for i in range(8)]
    decode = Tokenizer.load(lively_home.models / kit.BASE).decode
    for log in kit.run_all(engine, requests):
        for choice in log[-1]["choices"]:
            i = choice["index"]
            streamed = "".join(e["text"] for e in log if e["type"] == "token" and e["index"] == i)
            assert streamed == choice["text"] == decode(kit.tokens(log, i))
            assert len(kit.tokens(log, i)) == 60


def test_stop_texts_cut_where_they_begin(engine: Engine) -> None:
    """Every substring of an answer, also across tokens, works as a stop text."""
    prompt = kit.random_prompt(20, 8)
    whole = kit.run_all(engine, [kit.ask(prompt, 20, logit_bias={2: -100})])[0][-1]["choices"][0]["text"]
    spans = [(i, i + n) for n in (1, 2, 5) for i in range(0, len(whole) - n, 3)]
    stops = [whole[a:b] for a, b in spans if "\ufffd" not in whole[a:b]]
    requests = [kit.ask(prompt, 20, stop=[s], logit_bias={2: -100}) for s in stops]
    for stop, log in zip(stops, kit.run_all(engine, requests), strict=True):
        choice = log[-1]["choices"][0]
        assert choice == {"index": 0, "finish_reason": "stop", "text": whole[: whole.index(stop)]}
        assert "".join(e["text"] for e in log if e["type"] == "token") == choice["text"]
    assert len(stops) > 20


def test_an_end_token_ends(lively_home: Home, base: Any, tmp_path: Path, model_dir: Path) -> None:
    """The 9th token of an answer is declared an end token in generation_config.json, beside the usual one."""
    prompt = kit.random_prompt(9, 5)
    whole = kit.reference(base, prompt, 20)
    end = next(t for t in whole[8:] if t not in whole[:8])
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2, end]}))
    wanted = kit.reference(kit.hf_model(folder), prompt, 20)
    engine = Engine(lively_home, dtype="float32", threads=1)
    ended, cut = kit.run_all(engine, [{**kit.ask(prompt, m), "base": str(folder)} for m in (20, len(wanted))])
    assert kit.tokens(ended) == kit.tokens(cut) == wanted and 0 < len(wanted) < 20
    assert ended[-1]["choices"][0]["finish_reason"] == "stop"
    assert ended[-1]["usage"]["completion_tokens"] == len(wanted) + 1
    assert cut[-1]["choices"][0]["finish_reason"] == "length"
    assert cut[-1]["usage"]["completion_tokens"] == len(wanted)


def test_logprobs_are_the_models(engine: Engine, base: Any) -> None:
    prompt = kit.random_prompt(12, 3)
    log = kit.run_all(engine, [kit.ask(prompt, 10, logprobs=4, temperature=0.7, seed=2, logit_bias={2: -100})])[0]
    new = kit.tokens(log)
    with torch.inference_mode():
        logp = torch.log_softmax(base(torch.tensor([prompt + new])).logits[0].float(), -1)
    for i, event in enumerate(e for e in log if e["type"] == "token"):
        row = logp[len(prompt) - 1 + i]
        assert event["logprob"] == pytest.approx(float(row[new[i]]), abs=1e-4)
        assert [t["logprob"] for t in event["top_logprobs"]] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
        assert set(event["top_logprobs"][0]) == {"token", "bytes", "logprob"}


def test_abort_frees_the_place_and_leaves_the_others_alone(engine: Engine, base: Any) -> None:
    prompts = [kit.random_prompt(20 + i, i) for i in range(6)]
    logs: list[list[Any]] = [[] for _ in prompts]
    numbers = [
        engine.add_request(parse_request(kit.ask(p, 40)), log.append) for p, log in zip(prompts, logs, strict=True)
    ]
    for _ in range(5):
        engine.step()
    engine.abort(numbers[0])
    engine.abort(numbers[3])
    engine.abort(numbers[3])
    seen = len(logs[0]), len(logs[3])
    while engine.step():
        pass
    assert (len(logs[0]), len(logs[3])) == seen
    assert [kit.tokens(logs[i]) for i in (1, 2, 4, 5)] == [kit.reference(base, prompts[i], 40) for i in (1, 2, 4, 5)]
    assert engine.stats()["kv_bytes"] == 0 and not engine.requests
    assert all(m.idle for m in engine.artefacts.models.values())


def test_a_prompt_that_fills_the_context_is_refused(engine: Engine) -> None:
    with pytest.raises(UserError) as e:
        engine.add_request(parse_request(kit.ask(kit.random_prompt(512), 5)), lambda event: None)
    assert e.value.code == "context_length_exceeded" and "maximum context length is 512 tokens" in e.value.message
    log = kit.run_all(engine, [kit.ask(kit.random_prompt(511), 5)])[0]
    assert log[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    assert log[-1]["usage"]["completion_tokens"] == 1


def test_bad_requests_hurt_nobody_else(engine: Engine, base: Any, adapters: dict[str, Path], tmp_path: Path) -> None:
    """A template that refuses, an unknown model, a damaged adapter: each fails alone, while others run."""
    broken, misfit = tmp_path / "broken", tmp_path / "misfit"
    shutil.copytree(adapters["plain"], broken)
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    wide = kit.make_model(tmp_path / "wide", hidden_size=32)
    kit.make_adapter(misfit, wide, 3)
    prompt, good, log = kit.random_prompt(15, 2), [], []
    engine.add_request(parse_request(kit.ask(prompt, 40)), good.append)
    engine.step()
    for raw, code in (
        ({"base": kit.BASE, "messages": [{"content": "no role"}]}, "chat_template_error"),
        ({"base": "tinny", "prompt": "x"}, "model_not_found"),
        ({"artefact": str(tmp_path / "nothing"), "prompt": "x"}, "model_not_found"),
        ({"base": kit.BASE, "prompt": [10**6]}, "invalid_value"),
    ):
        with pytest.raises(TunewrightError) as e:
            engine.add_request(parse_request(raw), log.append)
        assert e.value.code == code
    engine.add_request(parse_request(kit.ask(prompt, 5, artefact=str(misfit))), log.append)
    with pytest.raises(TunewrightError):
        engine.add_request(parse_request(kit.ask(prompt, 5, artefact=str(broken))), log.append)
    while engine.step():
        pass
    assert [e["type"] for e in log] == ["start", "error"] and log[1]["error"]["code"] == "adapter_does_not_fit"
    assert kit.tokens(good) == kit.reference(base, prompt, 40)


def test_a_changed_artefact_is_refused(engine: Engine, tmp_path: Path, model_dir: Path) -> None:
    """A committed result whose weights were altered afterwards is not served."""
    made = kit.make_adapter(tmp_path / "made", model_dir, 3)
    folder = commit_folder(tmp_path / "result", lambda tmp: shutil.copytree(made, tmp, dirs_exist_ok=True) and None)
    weights = bytearray((folder / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(weights)
    log = kit.run_all(engine, [kit.ask([5, 6], 5, artefact=str(folder))])[0]
    assert log[-1]["error"]["code"] == "checkpoint_damaged"


def test_a_failed_step_fails_its_requests_only(engine: Engine, base: Any, adapters: dict[str, Path]) -> None:
    """The copy of its own (dora) breaks in the middle of a forward; what runs on the base goes on."""
    prompt, bad, good = kit.random_prompt(15, 2), [], []
    engine.add_request(parse_request(kit.ask(prompt, 40, artefact=str(adapters["dora"]))), bad.append)
    engine.add_request(parse_request(kit.ask(prompt, 40)), good.append)
    engine.step()
    target = engine.artefacts.resolve(None, str(adapters["dora"]))
    net: Any = engine.artefacts.models[target.key].net

    def explode(*args: Any) -> None:
        raise RuntimeError("not enough memory\nand a long stack trace")

    hook = net.model.layers[1].register_forward_pre_hook(explode)
    while engine.step():
        pass
    hook.remove()
    assert bad[-1]["error"]["message"] == "Computing the answer failed: not enough memory"
    assert kit.tokens(good) == kit.reference(base, prompt, 40)
    assert engine.stats()["kv_bytes"] == 0


@pytest.mark.slow
def test_models_and_adapters_make_room(lively_home: Home, adapters: dict[str, Path], tmp_path: Path) -> None:
    """With room for one model and one adapter everything is still answered right, in turn."""
    whole = kit.write_artefact(kit.make_model(tmp_path / "result", seed=5), "weights", None)
    sources: list[dict[str, Any]] = [{}, {"artefact": str(whole)}]
    sources += [{"artefact": str(adapters[k])} for k in ("plain", "rank", "dora")]
    requests = [kit.ask(kit.random_prompt(10, i), 12, **sources[i % 5]) for i in range(10)]
    small = Engine(lively_home, dtype="float32", threads=1, limits=Limits(max_models=1, max_adapters=1))
    roomy = Engine(lively_home, dtype="float32", threads=1)
    assert [kit.tokens(x) for x in kit.run_all(small, requests)] == [
        kit.tokens(x) for x in kit.run_all(roomy, requests)
    ]
    assert len(small.stats()["models"]) == 1
    assert len(roomy.stats()["models"]) == 3 and len(roomy.stats()["adapters"]) == 2
    assert roomy.unload(str(adapters["rank"])) == 1 and roomy.stats()["adapters"] == [str(adapters["plain"].resolve())]
    assert roomy.unload() == 4 and roomy.stats()["models"] == []


def test_artefact_decoding_defaults(engine: Engine, tmp_path: Path, model_dir: Path) -> None:
    folder = kit.make_adapter(tmp_path / "adapter", model_dir, 3)
    kit.write_artefact(folder, "adapter", kit.BASE, decoding={"temperature": 0.0, "max_tokens": 7})
    raw = {"artefact": str(folder), "prompt": [5, 6, 7], "logit_bias": {2: -100}}
    first, second = kit.run_all(engine, [raw, raw])
    assert kit.tokens(first) == kit.tokens(second) and len(kit.tokens(first)) == 7
    assert len(kit.answer(engine, {**raw, "max_tokens": 9})) == 9


def test_packed_bfloat16_is_bfloat16(lively_home: Home, base: Any) -> None:
    """Packed weights only change the order of sums: the log-probabilities stay within bfloat16's rounding."""
    engine = Engine(lively_home, dtype="bfloat16", threads=1)
    prompt = kit.random_prompt(40, 6)
    log = kit.run_all(engine, [kit.ask(prompt, 1, logprobs=5, logit_bias={2: -100})])[0]
    with torch.inference_mode():
        row = torch.log_softmax(base(torch.tensor([prompt])).logits[0, -1].float(), -1)
    event = next(e for e in log if e["type"] == "token")
    assert event["logprob"] == pytest.approx(float(row[event["token_id"]]), abs=0.15)
    assert engine.stats()["dtype"] == "bfloat16"
