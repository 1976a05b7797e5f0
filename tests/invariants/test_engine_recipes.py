"""Recipes as equalities: a proxy's tokens are the formula's, a rewritten conversation is the one written by hand, a
mixture is its parts asked one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import engine_kit as kit
import recipe_kit
import tiny
from recipe_kit import make, name_of
from tunewright.core.durable import MANIFEST, read_json, write_json
from tunewright.core.errors import CheckpointError, ModelNotFound, SpecError, UserError
from tunewright.core.home import Home
from tunewright.core.run import ARTEFACT
from tunewright.data.tokenizer import Tokenizer
from tunewright.engine.engine import Engine
from tunewright.engine.request import parse_request
from tunewright.engine.scheduler import Limits

EOS = 2
TUNED, CALM_TUNED = "ft:tiny:test:tuned:AbCdEfG1", "ft:calm:test:tuned:AbCdEfG2"
SOFT = "ft:tiny:test:soft:AbCdEfG3"
ASK = [{"role": "user", "content": "what colour is the sea?"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """`tiny` and an adapter over it, `large` of another shape, `other` with two tokens exchanged, an encoder."""
    root = tmp_path_factory.mktemp("recipes")
    model = kit.make_model(root / "tiny")
    home = kit.make_home(root / "home", model)
    kit.make_model(home.models / "large", seed=7, hidden_size=96, num_hidden_layers=3, vocab_size=520)
    recipe_kit.add_tuned(home, kit.make_adapter(root / "adapter", model, 3), TUNED)
    calm = tiny.build_tiny_model(home.models / "calm")
    recipe_kit.add_tuned(home, kit.make_adapter(root / "calm-adapter", calm, 3, base="calm"), CALM_TUNED)
    other = home.models / "other"
    shutil.copytree(model, other)
    data = read_json(other / "tokenizer.json")
    vocab = data["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    write_json(other / "tokenizer.json", data)
    recipe_kit.add_encoder(home)
    return home


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_kit.finish_here(monkeypatch)


@pytest.fixture(scope="module")
def engine(home: Home) -> Engine:
    """Small chunks: the models of a proxy are ready with a prompt at different steps."""
    return Engine(home, dtype="float32", threads=1, limits=Limits(chunk_tokens=64))


@pytest.fixture(scope="module")
def nets(home: Home) -> list[Any]:
    """large, tuned and small, as transformers and peft compute them."""
    tuned = home.runs / "ftjob-AbCdEfG1" / "result"
    small = home.models / "tiny"
    return [kit.hf_model(home.models / "large"), kit.hf_adapted(small, tuned), kit.hf_model(small)]


def proxy(home: Home, alpha: float = 0.7, model: str = "large", small: str = "tiny") -> Path:
    return make(home, {"name": "proxy", "tuned": TUNED, "small": small, "alpha": alpha}, model)


@torch.inference_mode()
def formula(nets: list[Any], alpha: float, prompt: list[int], n: int) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy tokens and, at each, the log-probabilities of large + alpha * (tuned - small), in float64."""
    tokens, logps = list(prompt), []
    for _ in range(n):
        large, tuned, small = (net(torch.tensor([tokens])).logits[0, -1].double() for net in nets)
        v = min(len(large), len(small))
        logits = large[:v] + alpha * (tuned[:v] - small[:v])
        logps.append(logits.log_softmax(-1))
        tokens.append(int(logits.argmax()))
        if tokens[-1] == EOS:
            return tokens[len(prompt) : -1], logps
    return tokens[len(prompt) :], logps


def chat(folder: Path | None = None, **options: Any) -> dict[str, Any]:
    where = {"base": kit.BASE} if folder is None else {"artefact": str(folder)}
    return {**where, "messages": ASK, "temperature": 0.0, "max_tokens": 16, **options}


def text(log: list[dict[str, Any]]) -> str:
    return log[-1]["choices"][0]["text"]


# --- proxy-tuning ----------------------------------------------------------------------------------------------------


def test_a_proxy_is_the_formula(home: Home, engine: Engine, nets: list[Any]) -> None:
    """Prompts of many lengths at once, beside requests to the three models alone."""
    folder = proxy(home)
    prompts = [kit.random_prompt(n, n) for n in (1, 17, 64, 65, 150)]
    requests = [kit.ask(p, 16, artefact=str(folder)) for p in prompts]
    beside = [{**kit.ask(prompts[2], 16), "base": base} for base in ("tiny", "large")]
    logs = kit.run_all(engine, [*requests, *beside], spread=1)
    wanted = [formula(nets, 0.7, p, 16)[0] for p in prompts]
    assert [kit.tokens(log) for log in logs[: len(prompts)]] == wanted
    assert wanted[1] != formula(nets, 0.0, prompts[1], 16)[0]
    alone = [kit.answer(engine, r) for r in (*requests, *beside)]
    assert [kit.tokens(log) for log in logs] == alone


def test_small_as_large_is_the_tuned_model(home: Home, engine: Engine) -> None:
    """alpha = 1 and small = large: the tuned model's own tokens, and its log-probabilities to 1e-5."""
    recipe = {"name": "proxy", "tuned": CALM_TUNED, "small": "calm"}
    folder, own = make(home, recipe, "calm"), Path(_place(home, CALM_TUNED))
    prompt = kit.random_prompt(40, 4)
    logs = [kit.run_all(engine, [kit.ask(prompt, 30, artefact=str(f), logprobs=20)])[0] for f in (folder, own)]
    assert kit.tokens(logs[0]) == kit.tokens(logs[1]) != kit.answer(engine, kit.ask(prompt, 30, base="calm"))
    assert len(set(kit.tokens(logs[0]))) > 5
    for ours, theirs in zip(*(log[1:-1] for log in logs), strict=True):
        assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=1e-5)
        pairs = zip(ours["top_logprobs"], theirs["top_logprobs"], strict=True)
        assert all(a["logprob"] == pytest.approx(b["logprob"], abs=1e-5) for a, b in pairs)


def test_log_probabilities_are_of_the_combined_logits(home: Home, engine: Engine, nets: list[Any]) -> None:
    prompt = kit.random_prompt(30, 9)
    log = kit.run_all(engine, [kit.ask(prompt, 12, artefact=str(proxy(home)), logprobs=3)])[0]
    _, logps = formula(nets, 0.7, prompt, 12)
    for event, logp_V in zip(log[1:-1], logps, strict=False):
        assert event["logprob"] == pytest.approx(float(logp_V[event["token_id"]]), abs=1e-4)
        best = logp_V.topk(3).values.tolist()
        assert [t["logprob"] for t in event["top_logprobs"]] == pytest.approx(best, abs=1e-4)


def test_a_soft_prompt_as_the_tuned_model(home: Home, engine: Engine, tmp_path: Path) -> None:
    """Its virtual tokens stand in front of one of the three sequences only."""
    from peft import PromptTuningConfig, get_peft_model

    small = home.models / "tiny"
    torch.manual_seed(5)
    net = get_peft_model(kit.hf_model(small), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7))
    net.save_pretrained(tmp_path / "soft")
    tuned = recipe_kit.add_tuned(home, kit.write_artefact(tmp_path / "soft", "adapter", "tiny"), SOFT)
    folder = make(home, {"name": "proxy", "tuned": tuned, "small": "tiny", "alpha": 1.5}, "large")
    nets = [kit.hf_model(home.models / "large"), kit.hf_adapted(small, Path(_place(home, tuned))), kit.hf_model(small)]
    prompts = [kit.random_prompt(n, n) for n in (3, 70)]
    logs = kit.run_all(engine, [kit.ask(p, 12, artefact=str(folder)) for p in prompts])
    wanted = [formula(nets, 1.5, p, 12)[0] for p in prompts]
    assert [kit.tokens(log) for log in logs] == wanted
    assert wanted != [formula(nets, 0.0, p, 12)[0] for p in prompts]


def test_sampling_stop_and_choices_of_a_proxy(home: Home, engine: Engine) -> None:
    """Choices draw from the same logits with their own numbers; a stop text cuts; usage counts a token once."""
    folder = str(proxy(home))
    raw = kit.ask([5, 6, 7], 20, artefact=folder, temperature=1.0, seed=3, n=3, logit_bias={EOS: -100})
    log, again = kit.run_all(engine, [raw, raw])
    assert log[-1] == again[-1]
    assert len({tuple(kit.tokens(log, i)) for i in range(3)}) == 3
    assert log[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 60, "total_tokens": 63}
    whole = log[-1]["choices"][1]["text"]
    stop = next(w for i in range(len(whole) // 2, len(whole)) if "�" not in (w := whole[i : i + 2]))
    cut = kit.run_all(engine, [{**raw, "stop": [stop]}])[0][-1]["choices"][1]
    assert cut["text"] == whole[: whole.index(stop)] and cut["finish_reason"] == "stop"


def test_a_proxy_that_is_aborted_leaves_nothing(home: Home, engine: Engine) -> None:
    log: list[Any] = []
    number = engine.add_request(parse_request(kit.ask([5, 6, 7], 50, artefact=str(proxy(home)))), log.append)
    for _ in range(3):
        engine.step()
    assert engine.stats()["running"] == 3
    engine.abort(number)
    assert engine.stats()["running"] == 0 and engine.stats()["kv_bytes"] == 0
    assert all(m.idle for m in engine.artefacts.models.values())


def test_a_failure_in_one_model_leaves_other_answers_alone(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The large model breaks after the small ones have spoken for the same answer."""
    engine = Engine(home, dtype="float32", threads=1)
    prompt = kit.random_prompt(9, 1)
    wanted = kit.answer(engine, kit.ask(prompt, 12))
    broken, plain = [], []
    engine.add_request(parse_request(kit.ask(prompt, 12, artefact=str(proxy(home)))), broken.append)
    engine.add_request(parse_request(kit.ask(prompt, 12)), plain.append)
    engine.step()
    large = next(m for k, m in engine.artefacts.models.items() if "/large@" in k)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr(large.net, "forward", fail)
    while engine.step():
        pass
    assert broken[-1]["type"] == "error" and "no more" in broken[-1]["error"]["message"]
    assert kit.tokens(plain) == wanted
    assert engine.stats()["kv_bytes"] == 0


@pytest.mark.parametrize("limits", [Limits(max_running=2), Limits(max_running=4), Limits(max_models=2)])
def test_little_room_is_enough(home: Home, nets: list[Any], limits: Limits) -> None:
    """Three sequences belong together: they start together or wait, and nobody waits for ever."""
    engine = Engine(home, dtype="float32", threads=1, limits=limits)
    prompts = [kit.random_prompt(n, n) for n in (5, 9, 12)]
    folder = str(proxy(home))
    logs = kit.run_all(engine, [kit.ask(p, 8, **o) for p in prompts for o in ({}, {"artefact": folder})])
    assert [kit.tokens(log) for log in logs[1::2]] == [formula(nets, 0.7, p, 8)[0] for p in prompts]


def test_more_models_than_may_stay_loaded(home: Home) -> None:
    engine = Engine(home, dtype="float32", threads=1, limits=Limits(max_models=1))
    with pytest.raises(UserError, match="needs 2 models at once, and at most 1"):
        engine.add_request(parse_request(kit.ask([5], 8, artefact=str(proxy(home)))), lambda e: None)


def test_other_vocabularies_are_refused(home: Home) -> None:
    with pytest.raises(UserError, match="'other' and 'ft:tiny:test:tuned:AbCdEfG1' have different vocabularies"):
        proxy(home, model="other")


# --- prompts, examples, documents ------------------------------------------------------------------------------------


def test_a_prompt_template_is_the_conversation_written_by_hand(home: Home, engine: Engine) -> None:
    folder = make(home, {"name": "prompt", "system": "Be {brief}.", "template": '{"q": "{input}"}'}, "tiny")
    turns = [
        {"role": "system", "content": "You are kind."},
        {"role": "user", "content": "{input} twice"},
        {"role": "assistant", "content": "Yes {input}."},
        {"role": "user", "content": "why?"},
    ]
    by_hand = [
        {"role": "system", "content": "Be {brief}.\n\nYou are kind."},
        {"role": "user", "content": '{"q": "{input} twice"}'},
        {"role": "assistant", "content": "Yes {input}."},
        {"role": "user", "content": '{"q": "why?"}'},
    ]
    logs = kit.run_all(engine, [chat(folder, messages=turns), chat(messages=by_hand)])
    assert logs[0] == logs[1] and len(text(logs[0])) > 5
    assert turns[1]["content"] == "{input} twice"  # the client's own list is not changed


def test_random_examples_are_the_same_for_all_and_of_the_seed(home: Home, engine: Engine, tmp_path: Path) -> None:
    rows = tiny.sft_rows(12)
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    prompts = []
    for seed in (0, 0, 1):
        folder = make(home, {"name": "few_shot", "k": 3, "seed": seed, "system": "S."}, "tiny", [data])
        prompts.append([_followed(engine, folder, said) for said in ("one", "two")])
    assert prompts[0] == prompts[1] != prompts[2]
    first, second = prompts[0]
    assert first[:-1] == second[:-1] and first[0] == {"role": "system", "content": "S."}
    shown = [row["messages"][1:] for row in rows]  # without their system message
    taken = [first[1:-1][i:] for i in range(len(first)) if first[1:-1][i : i + 2] in [s[:2] for s in shown]]
    assert len(taken) == 3 and first[-1] == {"role": "user", "content": "one"}


def _followed(engine: Engine, folder: Path, said: str) -> list[dict[str, Any]]:
    """The conversation that the model below is asked."""
    asked = parse_request(chat(folder, messages=[{"role": "user", "content": said}]))
    return list(engine.recipes.follow(asked).asked.messages or [])


def test_similar_examples_are_the_nearest_by_mean_pooling(home: Home, engine: Engine, tmp_path: Path) -> None:
    """transformers' model and the formula in float64 as the reference; the most similar stands last."""
    rows = tiny.sft_rows(20)
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    recipe = {"name": "few_shot", "k": 4, "by": "similarity", "encoder": recipe_kit.ENCODER}
    folder = make(home, recipe, "tiny", [data])
    keys = [[m["content"] for m in row["messages"] if m["role"] == "user"][-1] for row in rows]
    for said in ("Question 7: what colour is fresh snow?", "Are you sure?", "mice"):
        vectors = reference_vectors(home, [*keys, said])
        best = torch.sort(vectors[:-1] @ vectors[-1], descending=True, stable=True).indices[:4].tolist()
        wanted = [m for i in reversed(best) for m in rows[i]["messages"] if m["role"] != "system"]
        assert _followed(engine, folder, said)[:-1] == wanted


@torch.inference_mode()
def reference_vectors(home: Home, texts: list[str]) -> torch.Tensor:
    from transformers import AutoModel, AutoTokenizer

    folder = home.models / recipe_kit.ENCODER
    net, tokenizer = AutoModel.from_pretrained(folder).double(), AutoTokenizer.from_pretrained(folder)
    out = []
    for said in texts:
        given = tokenizer(said, truncation=True, max_length=net.config.max_position_embeddings, return_tensors="pt")
        hidden = net(**given).last_hidden_state[0].mean(0)
        out.append(hidden / hidden.norm())
    return torch.stack(out)


def test_vectors_do_not_depend_on_company(home: Home) -> None:
    """Texts of many lengths, padded together or alone, also one that is cut and one without tokens."""
    from tunewright.engine.encoder import Encoder

    encoder = Encoder(home.models / recipe_kit.ENCODER)
    texts = ["word " * n for n in (1, 2, 5, 30, 200)] + ["", "a"]
    together = encoder.encode(texts)
    torch.testing.assert_close(together, torch.cat([encoder.encode([t]) for t in texts]), atol=1e-6, rtol=0)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(len(texts)))
    torch.testing.assert_close(together[:5].double(), reference_vectors(home, texts[:5]), atol=1e-6, rtol=0)


def test_retrieval_shows_its_passages(home: Home, engine: Engine, tmp_path: Path) -> None:
    recipe = {"name": "retrieval", "k": 2, "encoder": recipe_kit.ENCODER, "passage_chars": 100, "system": "S."}
    folder = make(home, recipe, "tiny", [recipe_kit.documents(tmp_path / "animals")])
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [r["source"] for r in rows] == ["cats.md", "dogs.txt"]
    log = kit.run_all(engine, [chat(folder, messages=[{"role": "user", "content": "who {passages} barks?"}])])[0]
    contexts = log[-1]["extra"]["contexts"]
    assert sorted(contexts) == sorted(r["key"] for r in rows) and contexts[0].startswith(("# Cats", "A dog"))
    shown = f"[1] {contexts[0]}\n\n[2] {contexts[1]}"
    by_hand = [
        {"role": "system", "content": "S."},
        {
            "role": "user",
            "content": f"Passages:\n\n{shown}\n\nAnswer with their help, where they say something about it: "
            "who {passages} barks?",
        },
    ]
    plain = kit.run_all(engine, [chat(messages=by_hand)])[0]
    assert text(log) == text(plain) and log[-1]["usage"] == plain[-1]["usage"]


def test_the_index_is_made_once(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving encodes the question only."""
    from tunewright.engine.encoder import Encoder

    folder = make(
        home,
        {"name": "retrieval", "encoder": recipe_kit.ENCODER},
        "tiny",
        [recipe_kit.documents(tmp_path / "animals")],
    )
    seen: list[list[str]] = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, texts: (seen.append(list(texts)), encode(self, texts))[1])
    engine = Engine(home, dtype="float32", threads=1)
    kit.run_all(engine, [chat(folder), chat(folder)])
    assert seen == [[ASK[0]["content"]]] * 2


def test_a_recipe_s_decoding_stands_between_the_request_s_and_the_model_s(home: Home, engine: Engine) -> None:
    folder = make(home, {"name": "prompt", "system": "S."}, "tiny", decoding={"max_tokens": 3, "temperature": 0})
    raw = {k: v for k, v in chat(folder, logit_bias={EOS: -100}).items() if k not in ("max_tokens", "temperature")}
    short, longer = kit.run_all(engine, [raw, {**raw, "max_tokens": 7}])
    assert (short[-1]["usage"]["completion_tokens"], longer[-1]["usage"]["completion_tokens"]) == (3, 7)


# --- mixture of agents -----------------------------------------------------------------------------------------------


def test_a_mixture_is_its_parts_one_by_one(home: Home, engine: Engine) -> None:
    """Two layers of three proposers, one of them a recipe; usage is the sum of all seven answers."""
    prompt = name_of(make(home, {"name": "prompt", "system": "Be brief."}, "tiny"))
    options = {"proposers": ["tiny", TUNED, prompt], "layers": 2, "max_tokens": 9, "template": "Others: {proposals}"}
    folder = make(home, {"name": "mixture", **options}, "large")
    log = kit.run_all(engine, [chat(folder, max_tokens=20)])[0]
    sources = [{"base": "tiny"}, {"base": None, "artefact": _place(home, TUNED)}]
    sources.append({"base": None, "artefact": _place(home, prompt)})
    said, usage = [], []
    for _ in range(2):
        before = said
        done = [kit.run_all(engine, [chat(messages=_asked(before), **s) | {"max_tokens": 9}])[0] for s in sources]
        said, usage = [text(d) for d in done], usage + [d[-1]["usage"] for d in done]
    last = kit.run_all(engine, [chat(messages=_asked(said), base="large", max_tokens=20)])[0]
    assert text(log) == text(last) and kit.tokens(log) == kit.tokens(last)
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert log[-1]["usage"][key] == sum(u[key] for u in [*usage, last[-1]["usage"]])
    names = ["tiny", TUNED, prompt]
    assert log[-1]["extra"]["proposals"] == [{"model": m, "text": t} for m, t in zip(names, said, strict=True)]


def _place(home: Home, name: str) -> str:
    from tunewright.core.run import find_artefact

    return str(find_artefact(home, name))


def _asked(before: list[str]) -> list[dict[str, Any]]:
    shown = "\n\n".join(f"[{n}] {t.strip()}" for n, t in enumerate(before, 1))
    return [{"role": "system", "content": f"Others: {shown}"}, *ASK] if before else ASK


def test_mixtures_run_beside_each_other_and_can_be_stopped(home: Home, engine: Engine) -> None:
    folder = make(home, {"name": "mixture", "proposers": ["tiny", "tiny"], "max_tokens": 6}, "tiny")
    alone = kit.run_all(engine, [chat(folder, seed=1, temperature=1.0)])[0]
    together = kit.run_all(engine, [chat(folder, seed=1, temperature=1.0), chat(), chat(folder, seed=2)], spread=2)
    assert together[0][-1] == alone[-1]
    first, second = alone[-1]["extra"]["proposals"]
    assert first["text"] != second["text"]  # the same model, other draws
    log: list[Any] = []
    number = engine.add_request(parse_request(chat(folder)), log.append)
    engine.step()
    engine.abort(number)
    assert not engine.step() and engine.stats()["kv_bytes"] == 0 and not engine.mixing and not log


def test_a_mixture_fails_with_its_part_and_only_it(home: Home, engine: Engine) -> None:
    """The proposals make the aggregator's prompt too long: an error event, and the neighbour goes on."""
    long = {"name": "mixture", "proposers": ["tiny"] * 4, "max_tokens": 120}
    folder = make(home, long, "tiny")
    raw = chat(folder, logit_bias={EOS: -100}, seed=1, temperature=2.0)
    wanted = kit.run_all(engine, [chat(max_tokens=150, logit_bias={EOS: -100})])[0]
    ask = {**raw, "messages": [{"role": "user", "content": "word " * 90}]}
    broken, plain = kit.run_all(engine, [ask, chat(max_tokens=150, logit_bias={EOS: -100})])
    assert broken[-1]["type"] == "error" and broken[-1]["error"]["code"] == "context_length_exceeded"
    assert plain == wanted and not engine.mixing and engine.stats()["kv_bytes"] == 0


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_recipes_in_a_circle_are_refused_when_made_and_when_served(home: Home, engine: Engine) -> None:
    """Names are new when a recipe is made, so only a changed file can do it."""
    first = make(home, {"name": "prompt", "system": "S."}, "tiny")
    second = make(home, {"name": "prompt", "system": "S."}, name_of(first))
    change(first, base=name_of(second))
    with pytest.raises(UserError, match="round in a circle"):
        engine.add_request(parse_request(chat(second)), lambda e: None)
    with pytest.raises(SpecError, match="round in a circle"):
        make(home, {"name": "prompt", "system": "S."}, name_of(second))
    itself = make(home, {"name": "mixture", "proposers": ["tiny"]}, "tiny")
    change(itself, recipe={"name": "mixture", "proposers": [name_of(itself)]})
    with pytest.raises(UserError, match="round in a circle"):
        engine.add_request(parse_request(chat(itself)), lambda e: None)


def change(folder: Path, **fields: Any) -> None:
    """Another artefact.json, as somebody would write who knows what the manifest is for."""
    write_json(folder / ARTEFACT, {**read_json(folder / ARTEFACT), **fields})
    (folder / MANIFEST).unlink()


def test_a_damaged_recipe_is_not_served(home: Home, engine: Engine, tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sft_rows(5))
    folder = make(home, {"name": "few_shot", "k": 2}, "tiny", [data])
    (folder / "rows.jsonl").write_text((folder / "rows.jsonl").read_text().replace("colour", "color"))
    with pytest.raises(CheckpointError, match=r"rows\.jsonl was changed"):
        engine.add_request(parse_request(chat(folder)), lambda e: None)


def test_a_model_that_went_away_is_named(home: Home, engine: Engine) -> None:
    inner = make(home, {"name": "prompt", "system": "S."}, "tiny")
    outer, name = make(home, {"name": "prompt", "system": "T."}, name_of(inner)), name_of(inner)
    shutil.rmtree(inner)
    with pytest.raises(ModelNotFound, match=f"needs the model '{name}', which does not exist any more"):
        engine.add_request(parse_request(chat(outer)), lambda e: None)


def test_raw_prompts_and_missing_questions(home: Home, engine: Engine) -> None:
    folder = make(home, {"name": "prompt", "system": "S."}, "tiny")
    with pytest.raises(UserError, match="send 'messages', not 'prompt'"):
        engine.add_request(parse_request(kit.ask("x", artefact=str(folder))), lambda e: None)
    with pytest.raises(UserError, match="needs a user message"):
        only = [{"role": "system", "content": "x"}]
        engine.add_request(parse_request(chat(folder, messages=only)), lambda e: None)


def test_a_proxy_over_a_recipe_is_refused(home: Home) -> None:
    below = name_of(make(home, {"name": "prompt", "system": "S."}, "tiny"))
    with pytest.raises(SpecError, match=r"is a recipe \(prompt\); logits can be added of models only"):
        proxy(home, model=below)


def test_a_recipe_over_a_proxy(home: Home, engine: Engine, nets: list[Any]) -> None:
    below = name_of(proxy(home))
    folder = make(home, {"name": "prompt", "system": "S."}, below)
    tokenizer = Tokenizer.load(home.models / "large")
    prompt = tokenizer.encode_chat([{"role": "system", "content": "S."}, *ASK])
    log = kit.run_all(engine, [chat(folder, max_tokens=12)])[0]
    assert kit.tokens(log) == formula(nets, 0.7, prompt, 12)[0]
