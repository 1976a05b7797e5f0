"""The only place that loads models through transformers: safetensors, no remote code, quietly.

`materialise` brings a model into the store once, `load_model` opens a folder.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from tunewright.core.durable import Lock, commit_folder, sha256_file, write_json
from tunewright.core.errors import Busy, OutOfMemory, UserError
from tunewright.core.home import Home
from tunewright.models import gguf
from tunewright.models.catalogue import ModelInfo, check_config, resolve
from tunewright.models.heads import Head, auto_class, head_names
from tunewright.models.probe import presume_layout, settle_layout
from tunewright.models.stored import stored_weights
from tunewright.ops.quant import NONE, quantise
from tunewright.ops.runtime import derive_seed, quiet

Progress = Callable[[str, int, int], None]
COUNT_FROM_PADDING = {"roberta", "xlm-roberta", "camembert", "mpnet"}
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*"]
HUB_FILES += ["special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*", "LICENSE*"]


def no_progress(phase: str, done: int, total: int) -> None:
    """The default progress callback."""


def materialise(name: str, home: Home, progress: Progress = no_progress, *, allow_paths: bool = True) -> Path:
    """The folder with the model's safetensors and tokenizer, made first if need be.

    A folder given as a path is used where it is. Everything else ends up under home.models, committed at once, with a
    source.json that says where it came from; a second process waits for the first.
    progress(phase, done, total) is told of long phases.
    Raises ModelNotFound for an unknown name, UserError for files that cannot or must not be used.
    """
    info = resolve(name, home, allow_paths=allow_paths)
    if info.folder is not None:
        check_folder(info.folder)
        return info.folder
    final = home.models / info.store_name
    with _waiting_lock(home.models / f".{info.store_name}.lock", progress):
        if not (final / "config.json").is_file():
            commit_folder(final, lambda tmp: _fill(tmp, info, progress))
    return final


def check_folder(folder: Path) -> None:
    """Raise UserError if the folder cannot be loaded safely and completely."""
    check_config(folder)
    if not any(folder.glob("*.safetensors")):
        other = sorted(p.name for ext in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(ext))
        raise UserError(
            f"The model '{folder.name}' has no *.safetensors weights"
            + (f", only {', '.join(other[:3])}, a format that can run code when opened. " if other else ". ")
            + "Convert it once with transformers' save_pretrained(), on a machine where you trust the file.",
            param="model",
        )
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"The model '{folder.name}' has no tokenizer.json. Save its fast tokenizer there with "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(folder).",
            param="model",
        )


def context_length(folder: Path) -> int:
    """Tokens that the model can attend to, from its config."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    positions = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
    # RoBERTa and its kin count positions from after the padding token's
    return positions - config.pad_token_id - 1 if config.model_type in COUNT_FROM_PADDING else positions


def load_model(
    folder: Path, dtype: torch.dtype = torch.float32, head: Head | None = None, quantization: str = NONE
) -> nn.Module:
    """The model in a folder, in `dtype`, in eval mode, without cache and without the architecture's dropout.

    head: a head for whole rows instead of the LM head; its weights are drawn from its seed if the folder has none.
    quantization: `none`, or how the linear layers are held (a key of ops.quant.CODINGS); embeddings, norms and heads
    are not. The model's attention is set so that it runs packed, or padded where it must (`layouts.layout_of` says
    which). Raises UserError if the architecture cannot be trained here, or if weights are missing.
    """
    check_folder(folder)
    # "auto": the weights are views of the file, so a quantised model is never there in full
    model, report = _open(folder, dtype if quantization == NONE else "auto", head)
    new = () if head is None else tuple(f"{name}." for name in head_names(model))
    missing = (k for k in map(str, report["missing_keys"]) if not (new and k.startswith(new)))
    other = (f"{name} of {list(has)}, not {list(said)}" for name, has, said in report["mismatched_keys"])
    wrong = sorted([*missing, *other])
    if wrong:
        raise UserError(
            f"The weights of '{folder.name}' do not fit its config.json: {len(wrong)} tensors are missing or have "
            f"another shape, first {wrong[0]}.",
            param="model",
        )
    if quantization != NONE:
        _quantise(model, quantization, dtype, head)
    model.config.use_cache = False
    model.name_or_path = model.config.name_or_path = str(folder)
    model.eval()
    settle_layout(model, scores=head is not None)
    return model


def bare_model(folder: Path, head: Head | None = None) -> nn.Module:
    """The modules of the model in a folder, on meta tensors: no weights, whatever its size. For names and shapes.

    Raises UserError if transformers cannot make such a model.
    """
    with _clear_errors(folder), quiet(), torch.random.fork_rng(), torch.device("meta"):
        config = _config(folder, head)
        model = auto_class(head, config).from_config(config)
    model.name_or_path = str(folder)
    presume_layout(model)
    return model


def _quantise(model: Any, name: str, dtype: torch.dtype, head: Head | None) -> None:
    """Quantise the linear layers below the head, and bring the rest to `dtype` in memory of its own."""
    heads = [model.get_output_embeddings()] if head is None else [model.get_submodule(n) for n in head_names(model)]
    quantise(model, name, dtype, {m for top in heads if top is not None for m in top.modules()})
    for p in model.parameters():
        p.data = p.data.to(dtype, copy=True)
    model.config.dtype = dtype


def load_body(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model below its head, in eval mode, as transformers runs it: padded rows with an attention mask.

    A pooler that the folder does not have is drawn at random: nothing here reads it. Raises UserError as load_model.
    """
    check_folder(folder)
    model, report = _open(folder, dtype, None, transformers.AutoModel)
    wrong = sorted(k for k in map(str, report["missing_keys"]) if not k.startswith("pooler."))
    if wrong or model.config.is_encoder_decoder:
        why = f"its file lacks {wrong[0]}" if wrong else "it is an encoder-decoder"
        raise UserError(f"'{folder.name}' gives no vectors of texts: {why}.", code="unsupported_model", param="model")
    return model.eval()


def _open(folder: Path, dtype: torch.dtype | str, head: Head | None, opener: Any = None) -> Any:
    """(model, what was loaded) from transformers, its errors turned into ours.

    opener: transformers' class; None: the one that the head asks for.
    """
    with _clear_errors(folder), quiet(), torch.random.fork_rng():
        config = _config(folder, head)
        _without_dropout(config)
        with torch.device("meta"):
            kind = type((opener or auto_class(head, config)).from_config(config))
        torch.manual_seed(derive_seed("head", head.seed if head else 0))
        # in the file's own dtype the weights stay views of it, which come and go with what is read of them
        views = dtype == "auto"
        return kind.from_pretrained(
            folder if views else None,
            config=config,
            state_dict=None if views else stored_weights(folder),
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=head is not None,
        )


def _config(folder: Path, head: Head | None) -> Any:
    more = {} if head is None else head.config
    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **more)


@contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    """transformers' errors within the block turned into ours."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0].replace(str(folder), folder.name)
        if "allocate memory" in str(e) or "out of memory" in str(e):
            raise OutOfMemory(f"The model '{folder.name}' does not fit into memory: {first}") from e
        raise UserError(
            f"The model '{folder.name}' cannot be loaded: {first}", code="unsupported_model", param="model"
        ) from e


def _without_dropout(config: Any) -> None:
    """Set every dropout of the architecture to 0: its draws would depend on how a step is cut into micro-batches."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and value > 0 and ("drop" in name or "jitter" in name):
            setattr(config, name, 0.0)


def _fill(folder: Path, info: ModelInfo, progress: Progress) -> None:
    bring = _from_hub if info.kind == "hub" else _from_gguf if info.location.endswith(".gguf") else _from_folder
    bring(folder, info, progress)
    check_folder(folder)


def _checked(path: Path, info: ModelInfo) -> str:
    """The file's sha256. Raises UserError if it is not the one in the catalogue."""
    sha256 = sha256_file(path)
    if info.sha256 is not None and sha256 != info.sha256:
        raise UserError(
            f"The file {path.name} of {info.source} is not the one that tunewright knows: "
            f"its sha256 is {sha256[:12]}…, expected {info.sha256[:12]}…. "
            "Reinstall the package, or give the file's path if you trust it.",
            code="model_file_changed",
            param="model",
        )
    return sha256


def _from_folder(folder: Path, info: ModelInfo, progress: Progress) -> None:
    """A package that holds a model folder: the named weights file and what lies beside it."""
    path = Path(info.location)
    progress("checking the file", 0, 2)
    sha256 = _checked(path, info)
    progress("copying", 1, 2)
    wanted = (p for pattern in HUB_FILES for p in path.parent.glob(pattern))
    for source in {path, *(p for p in wanted if p.suffix != ".safetensors")}:
        shutil.copyfile(source, folder / source.name)
    _write_record(folder, info, {"sha256": sha256, "file": path.name})


def _from_gguf(folder: Path, info: ModelInfo, progress: Progress) -> None:
    path = Path(info.location)
    progress("checking the file", 0, 3)
    sha256 = _checked(path, info)
    progress("dequantising", 1, 3)
    facts = gguf.convert(path, folder)
    progress("saving", 2, 3)
    _write_record(folder, info, {"sha256": sha256, "file": path.name, **facts})


def _from_hub(folder: Path, info: ModelInfo, progress: Progress) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    progress("downloading", 0, 1)
    try:
        revision = HfApi().model_info(info.location).sha
        snapshot_download(info.location, revision=revision, local_dir=folder, allow_patterns=HUB_FILES)
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, ConnectionError, OSError) as e:
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"The model '{info.location}' could not be downloaded from the hub: {first} "
            "Check the name, the network and, for a gated model, that HF_TOKEN is set.",
            code="model_download_failed",
            param="model",
        ) from e
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    check_config(folder)
    if not (folder / "tokenizer.json").is_file():
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            tokenizer.save_pretrained(folder)
    _write_record(folder, info, {"revision": revision})
    progress("downloading", 1, 1)


def _write_record(folder: Path, info: ModelInfo, facts: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    record = {"name": info.name, "source": info.source, **facts, "context": config.get("max_position_embeddings")}
    write_json(folder / "source.json", record)


@contextmanager
def _waiting_lock(path: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock, waiting for another process that makes the same model."""
    while True:
        try:
            lock = Lock(path)
            break
        except Busy:
            progress("waiting for another process that prepares this model", 0, 1)
            time.sleep(0.2)
    with lock:
        yield
