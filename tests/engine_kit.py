"""What the engine's tests share: a data folder with tiny models, adapters made by peft, and answers as plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from tunewright.core.durable import write_json
from tunewright.core.home import Home
from tunewright.core.run import ARTEFACT, Artefact
from tunewright.engine.engine import Engine, Event
from tunewright.engine.request import parse_request

BASE = "tiny"


def make_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """The tiny model with larger random weights: its answers vary instead of repeating one token."""
    return tiny.build_tiny_model(folder, seed, **{"initializer_range": 0.3, **changes})


def make_home(root: Path, model: Path) -> Home:
    """A data folder in which `model` answers to the name `tiny`."""
    home = Home(root).ensure()
    tiny.install_tiny_model(home.root, BASE, built=model)
    return home


def write_artefact(folder: Path, kind: str, base: str | None, **changes: Any) -> Path:
    record = Artefact(kind=kind, name="ft:tiny:test::abcdefgh", base=base, tuner={}, step=1, **changes)
    write_json(folder / ARTEFACT, record.model_dump(mode="json"))
    return folder


def make_adapter(folder: Path, model: Path, seed: int, base: str = BASE, **options: Any) -> Path:
    """A random adapter of peft over `model`, strong enough to change the answers, as an artefact over `base`."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **options}
    net: Any = get_peft_model(hf_model(model), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, p in net.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            p.data.normal_(0, 0.3)
    net.save_pretrained(folder)
    return write_artefact(folder, "adapter", base)


def hf_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def hf_adapted(model: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(hf_model(model), adapter).eval()


def reference(net: Any, prompt: list[int], n: int) -> list[int]:
    """What transformers' generate answers greedily, without the end token."""
    eos = net.generation_config.eos_token_id
    with torch.inference_mode():
        out = net.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        )
    new = out[0, len(prompt) :].tolist()
    ends = {eos} if isinstance(eos, int) else set(eos)
    return new[:-1] if new[-1] in ends else new


def random_prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 400, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(prompt: list[int] | str, most: int | None = 24, **options: Any) -> dict[str, Any]:
    """A greedy request for at most `most` tokens, as plain data."""
    where = {} if "artefact" in options else {"base": BASE}
    return {**where, "prompt": prompt, "max_tokens": most, "temperature": 0.0, **options}


def run_all(engine: Engine, requests: list[dict[str, Any]], spread: int = 0) -> list[list[Event]]:
    """The events of each request, all run together. spread: steps between two arrivals."""
    logs: list[list[Event]] = [[] for _ in requests]
    for raw, log in zip(requests, logs, strict=True):
        engine.add_request(parse_request(raw), log.append)
        for _ in range(spread):
            engine.step()
    while engine.step():
        pass
    return logs


def tokens(log: list[Event], index: int = 0) -> list[int]:
    """The token ids of one choice."""
    return [e["token_id"] for e in log if e["type"] == "token" and e["index"] == index]


def answer(engine: Engine, raw: dict[str, Any]) -> list[int]:
    """The token ids of one request run alone."""
    return tokens(run_all(engine, [raw])[0])
