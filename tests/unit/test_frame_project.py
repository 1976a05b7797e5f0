"""The frame holds: layers, locked versions, links, commands named in the documents, a first line in each file."""

from __future__ import annotations

import ast
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
from packaging.requirements import Requirement

import tunewright.api.routes

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}


def load_tool(name: str) -> ModuleType:
    spec = spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    return subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(folder / "src")}, capture_output=True, text=True, check=False
    )


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of pyproject.toml and src/, to break in a test."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "static"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_a_new_folder_must_be_given_a_layer(copied: Path) -> None:
    folder = copied / "src" / "tunewright" / "somewhere"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    done = lint_imports(copied)
    assert done.returncode != 0
    assert "somewhere" in done.stdout


def test_an_import_that_points_up_is_refused(copied: Path) -> None:
    with open(copied / "src" / "tunewright" / "core" / "ids.py", "a") as f:
        f.write("\n\ndef up():\n    import tunewright.cli.main\n")
    done = lint_imports(copied)
    assert done.returncode != 0
    assert "core.ids" in done.stdout and "cli" in done.stdout


def test_every_dependency_is_locked_inside_its_range() -> None:
    locked = pins("lock.txt")
    for line in PYPROJECT["project"]["dependencies"]:
        need = Requirement(line)
        assert need.specifier.contains(locked[need.name.lower()]), line
    everything = {**locked, **pins("dev.txt")}
    for line in PYPROJECT["project"]["optional-dependencies"]["dev"]:
        need = Requirement(line)
        assert need.specifier.contains(everything[need.name.lower()]), line


def test_the_two_lock_files_do_not_disagree() -> None:
    assert not set(pins("lock.txt")) & set(pins("dev.txt"))


def test_torch_is_pinned_alike_everywhere() -> None:
    version = pins("lock.txt")["torch"]
    for name in ("Makefile", "requirements/lock.sh"):
        assert re.findall(r"torch==([\d.]+)", (ROOT / name).read_text()) == [version], name


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_of_the_documents_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_named_in_the_documents_exist(path: Path) -> None:
    from tunewright.cli.main import COMMANDS

    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets
    assert set(re.findall(r"^make ([a-z-]+)", text, re.M)) <= targets
    assert set(re.findall(r"(?:^|`|/)tunewright ([a-z]+)\b", text, re.M)) <= set(COMMANDS)


def test_the_two_readmes_have_the_same_parts() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    chinese = chinese.replace("、", ", ")
    for pattern in (r"^```(.*)$", r"^(#+) ", r"^\| (`[^|]*`) \|", r"^  (\w+/)", r"\]\((docs/[^)]*)\)"):
        assert re.findall(pattern, english, re.M) == re.findall(pattern, chinese, re.M), pattern


def test_each_module_says_its_idea_first() -> None:
    for path in sorted((ROOT / "src").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not tree.body or ast.get_docstring(tree), path.relative_to(ROOT)


def test_every_field_of_a_job_spec_is_explained() -> None:
    tool = load_tool("reference")
    assert set(tool.meanings(tool.JobSpec.__doc__)) == set(tool.JobSpec.model_fields)


def test_a_page_that_is_not_up_to_date_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = load_tool("reference")
    row = {"schema": {"properties": {"r": {"type": "integer"}}}, "defaults": {"r": 8}, "card": {}, "doc": "One line."}
    describe = {kind: {"x": row} for kind in ("tuner", "objective", "optimizer", "schedule", "retain")}
    tool.FOLDER = tmp_path
    assert tool.main(["--check"], describe) == 1
    assert tool.main([], describe) == 0
    assert "| `r` | integer | `8` |" in (tmp_path / "job-spec.md").read_text()
    assert tool.main(["--check"], describe) == 0
    describe["tuner"]["x"]["defaults"] = {"r": 9}
    assert tool.main(["--check"], describe) == 1
    assert "make docs" in capsys.readouterr().err


def test_the_data_formats_page_is_up_to_date_and_its_rows_are_valid() -> None:
    from tunewright.core.conversation import Shape
    from tunewright.data.formats import FORMATS

    tool = load_tool("reference")
    text = (tool.FOLDER / "data-formats.md").read_text(encoding="utf-8")
    assert tool.formats_page() == text, "run `make docs`"
    for name in FORMATS:
        found = FORMATS.load(name)
        assert f"```json\n{found.example}\n```" in text
        assert found.convert(json.loads(found.example), 1).shape in get_args(Shape)


def test_the_http_page_lists_every_route_and_no_other() -> None:
    found = set()
    for info in pkgutil.iter_modules(tunewright.api.routes.__path__):
        for route in import_module(f"tunewright.api.routes.{info.name}").router.routes:
            found |= {f"{method} {route.path.replace(':path', '')}" for method in route.methods}
    text = (ROOT / "docs" / "reference" / "http-api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `((?:GET|POST|DELETE) [^`]+)` \|", text, re.M)) == found


def test_exit_codes_are_listed() -> None:
    from tunewright.core import errors

    text = (ROOT / "docs" / "reference" / "exit-codes.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| (\d+) \| `(\w+)`", text, re.M))
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.TunewrightError)]
    assert {str(k.exit_code) for k in kinds} == set(listed)
    assert all(getattr(errors, name).exit_code == int(code) for code, name in listed.items())


def test_long_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "long.py").write_text("x = 1\n" * 401)
    (tmp_path / "src" / "short.py").write_text("x = 1\n" * 400)
    assert load_tool("long_files").long_files(tmp_path) == ["src/long.py: 401 lines"]


def test_a_job_spec_stays_small() -> None:
    from tunewright.core.spec import JobSpec

    assert len(JobSpec.model_fields) <= 45
