"""What is loaded: base models with adapters over them, and whole models; the least recently used idle one goes first.

An adapter that is plain LoRA, or a soft prompt, shares its base with everything else that runs there. Any other
adapter is merged (or, a bottleneck, put) into a copy of the base, and served like a whole model. A delta is set in a
copy of the base that shares every tensor it does not change with what is loaded of that base already.
"""

from __future__ import annotations

import gc
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunewright.core.durable import MANIFEST, check_folder, read_json
from tunewright.core.errors import ModelNotFound, UserError
from tunewright.core.home import Home
from tunewright.core.ids import parse_model_name
from tunewright.core.run import ARTEFACT, base_of, find_artefact, read_artefact
from tunewright.data.tokenizer import Tokenizer
from tunewright.engine import attention, linear, soft
from tunewright.engine.kv_cache import KVCache
from tunewright.engine.scheduler import Limits
from tunewright.models.layouts import PACKED, layout_of
from tunewright.models.loader import load_model, materialise
from tunewright.tuners.bottleneck import insert_saved, is_bottleneck
from tunewright.tuners.delta import apply_delta, is_delta, read_delta

_TOKENIZERS = 16


@dataclass(frozen=True)
class Target:
    """Everything a request needs to know about the weights it asks for, before they are loaded.

    folder: the model's own weights. adapter: peft files or a delta to apply over them; merged: into a copy, not beside
    it.
    key, adapter_key: change when the files do. context: tokens that fit; virtual: how many a soft prompt takes of them.
    decoding: the artefact's defaults.
    """

    folder: Path
    key: str
    adapter: Path | None
    adapter_key: str
    merged: bool
    tokenizer: Tokenizer
    context: int
    virtual: int
    decoding: dict[str, Any]


@dataclass(eq=False)
class Model:
    """A loaded model. adapters: key -> bytes, least recently used first. pins: running sequences by adapter key.

    prefixes: what a sequence's cache begins with, of the adapters that are soft prompts.
    differs: names of the tensors that are not its base's; None if that is not known.
    """

    net: nn.Module
    routing: linear.Routing
    kv: KVCache
    differs: frozenset[str] | None
    adapters: OrderedDict[str, int] = field(default_factory=OrderedDict)
    pins: Counter[str] = field(default_factory=Counter)
    prefixes: dict[str, soft.Prefix] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        return not any(self.pins.values())


class Artefacts:
    """Resolves, loads and evicts. Not thread-safe: it belongs to the engine's thread."""

    def __init__(self, home: Home, dtype: torch.dtype, limits: Limits) -> None:
        self.home, self.dtype, self.limits = home, dtype, limits
        self.models: OrderedDict[str, Model] = OrderedDict()
        self._tokenizers: OrderedDict[str, Tokenizer] = OrderedDict()

    def resolve(self, base: str | None, artefact: str | None) -> Target:
        """What a request's names stand for; loads a tokenizer, no weights.

        Raises ModelNotFound, CheckpointError (a damaged artefact) or UserError (a kind that cannot be served).
        """
        if artefact is None:
            return self._target(self._base(str(base)), None, {})
        folder = Path(artefact)
        if not (folder / ARTEFACT).is_file():
            raise ModelNotFound("This model's files are not there any more. List the models again.", param="model")
        record = read_artefact(folder)
        if record.head != "lm":
            raise UserError(
                f"The model '{record.name}' answers with a class or a value of a whole text (head {record.head}); it "
                "writes no text, so no recipe can stand on it. Ask it itself.",
                code="unsupported_model",
                param="model",
            )
        if record.kind == "weights":
            return self._target(folder, None, record.decoding)
        if record.kind == "recipe":
            raise UserError(
                f"The model '{record.name}' is a recipe and has no weights of its own; name the model below it.",
                param="model",
            )
        if record.kind not in ("adapter", "delta"):
            kinds = "adapter, delta, weights or recipe"
            raise UserError(f"A model of kind '{record.kind}' cannot be served; use {kinds}.", param="model")
        return self._target(self._base(base_of(folder, record) or str(base)), folder, record.decoding)

    def acquire(self, target: Target) -> Model | None:
        """The loaded model, pinned; None if it must wait until another model or adapter is idle and can go."""
        model = self.models.get(target.key)
        if model is None:
            if not self._room(self.models, self.limits.max_models, lambda k: self.models[k].idle, self._evict):
                return None
            model = self.models[target.key] = self._load(target)
        if target.adapter_key and target.adapter is not None:
            if target.adapter_key not in model.adapters:
                held = model
                if not self._room(
                    held.adapters,
                    self.limits.max_adapters,
                    lambda k: not held.pins[k],
                    lambda k: self._drop(held, k),
                ):
                    return None
                _verify(target.adapter)
                model.adapters[target.adapter_key] = _add_adapter(model, target.adapter_key, target.adapter)
            model.adapters.move_to_end(target.adapter_key)
        self.models.move_to_end(target.key)
        model.pins[target.adapter_key] += 1
        return model

    def release(self, model: Model, target: Target) -> None:
        model.pins[target.adapter_key] -= 1

    def unload(self, folder: str | None = None) -> int:
        """Forget idle models and adapters: those from `folder`, or all. Returns how many."""
        n = 0
        for key, model in list(self.models.items()):
            for adapter in [a for a in model.adapters if not model.pins[a] and _is_from(a, folder)]:
                self._drop(model, adapter)
                n += 1
            if model.idle and _is_from(key, folder):
                self._evict(key)
                n += 1
        return n

    def _base(self, name: str) -> Path:
        if parse_model_name(name) is not None:
            return find_artefact(self.home, name)
        return materialise(name, self.home)

    def _target(self, folder: Path, adapter: Path | None, decoding: dict[str, Any]) -> Target:
        own = adapter if adapter is not None and (adapter / "tokenizer.json").is_file() else folder
        virtual = 0 if adapter is None or is_delta(adapter) else soft.virtual_tokens(adapter)
        merged = adapter is not None and not virtual and (is_delta(adapter) or not linear.is_plain_lora(adapter))
        key = _stamp(folder, "config.json")
        adapter_key = "" if adapter is None else _stamp(adapter, ARTEFACT)
        config = read_json(folder / "config.json")
        return Target(
            folder,
            f"{key} + {adapter_key}" if merged else key,
            adapter,
            "" if merged else adapter_key,
            merged,
            self._tokenizer(own),
            int(config.get("max_position_embeddings") or 2048),
            virtual,
            decoding,
        )

    def _tokenizer(self, folder: Path) -> Tokenizer:
        key = _stamp(folder, "tokenizer.json")
        if key not in self._tokenizers:
            self._tokenizers[key] = Tokenizer.load(folder)
            if len(self._tokenizers) > _TOKENIZERS:
                self._tokenizers.popitem(last=False)
        self._tokenizers.move_to_end(key)
        return self._tokenizers[key]

    def _load(self, target: Target) -> Model:
        _verify(target.folder)
        net: Any = load_model(target.folder, self.dtype)
        if layout_of(net) != PACKED:
            raise UserError(
                f"Models of this architecture ({type(net).__name__}) can be trained but not served here yet. Open the "
                "folder with transformers or another server.",
                code="unsupported_model",
                param="model",
            )
        net.requires_grad_(False)
        differs: frozenset[str] | None = frozenset()
        if target.merged and target.adapter is not None:
            _verify(target.adapter)
            if is_delta(target.adapter):
                differs = _set_delta(net, target.adapter)
            else:
                net, differs = _put_adapter(net, target.adapter), None
        net.set_attn_implementation(attention.register())
        net.requires_grad_(False)
        routing = linear.prepare(net, [] if differs is None else self._kin(target), differs or frozenset())
        return Model(net.eval(), routing, KVCache(target.context), differs)

    def _kin(self, target: Target) -> list[tuple[nn.Module, frozenset[str]]]:
        """Loaded models of the same base, each with the names of its own tensors."""
        base = target.key.split(" + ")[0]
        found = [m for key, m in self.models.items() if key.split(" + ")[0] == base]
        return [(m.net, m.differs) for m in found if m.differs is not None]

    def _room(self, held: OrderedDict[str, Any], limit: int, is_idle: Any, drop: Any) -> bool:
        """Make room for one more of `held` by dropping the oldest idle one; False if all are in use."""
        if len(held) < limit:
            return True
        for key in held:
            if is_idle(key):
                drop(key)
                return True
        return False

    def _drop(self, model: Model, adapter: str) -> None:
        del model.adapters[adapter]
        model.pins.pop(adapter, None)
        model.prefixes.pop(adapter, None)
        linear.drop_adapter(model.net, adapter)

    def _evict(self, key: str) -> None:
        del self.models[key]
        gc.collect()  # a module graph has cycles; its memory should go now, not some day


def _add_adapter(model: Model, key: str, folder: Path) -> int:
    """Put an adapter beside the model's weights; returns its bytes. Raises CheckpointError if it does not fit."""
    if not soft.virtual_tokens(folder):
        return linear.load_adapter(model.net, key, folder)
    model.routing.parts = []  # of the step before
    model.prefixes[key] = soft.load_prefix(model.net, folder, model.kv.limit)
    return sum(x.numel() * x.element_size() for pair in model.prefixes[key] for x in pair)


def _put_adapter(net: Any, folder: Path) -> Any:
    """The model with a saved adapter: bottlenecks as modules of it, anything of peft's folded into its weights."""
    if is_bottleneck(folder):
        return insert_saved(net, folder)
    from peft import PeftModel  # seldom needed, and its import would double the engine's start

    _untie(net)
    return PeftModel.from_pretrained(net, folder, is_trainable=False).merge_and_unload()


def _set_delta(net: nn.Module, folder: Path) -> frozenset[str]:
    """Set a delta in the model; returns every name of the tensors that it changed (a tied tensor has two)."""
    delta = read_delta(folder)
    apply_delta(net, delta)
    own = {id(p) for name, p in net.named_parameters() if name in delta}
    return frozenset(name for name, p in net.named_parameters(remove_duplicate=False) if id(p) in own)


def _untie(net: Any) -> None:
    """Give the LM head weights of its own: an adapter of the embedding, merged, must not change the head as well."""
    head, embedding = net.get_output_embeddings(), net.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        net.config.tie_word_embeddings = False


def _stamp(folder: Path, file: str) -> str:
    """A folder's identity, which changes when its files are replaced."""
    s = (folder / file).stat()
    return f"{folder.resolve()}@{s.st_mtime_ns}-{s.st_ino}"


def _is_from(key: str, folder: str | None) -> bool:
    return folder is None or any(part.startswith(f"{Path(folder).resolve()}@") for part in key.split(" + "))


def _verify(folder: Path) -> None:
    """Check the hashes of a trained artefact; a base model, often large, was checked when it was stored.

    Raises CheckpointError.
    """
    if (folder / ARTEFACT).is_file() and (folder / MANIFEST).is_file():
        check_folder(folder)
