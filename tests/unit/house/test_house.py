"""The rules of the house: who imports whom, what is packaged, how long files and folders are, what names stand for."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardc.runtime

ROOT = Path(__file__).parents[3]
CODE = {ROOT / "shardc": "shardc", ROOT / "passes": "shardc.passes", ROOT / "runtime": "shardc.runtime"}
LONGEST = 400
"""Lines of a file of Python."""

FULLEST = 20
"""Tracked files that stand in one folder, besides those of its own folders."""

HELPERS = {
    "checks": "what tests judge by",
    "samples": "models and programs that tests compile",
    "samples/calls": "sample calls of operators",
    "opinfo": "the run over torch's database of operators, which `make opinfo` starts",
    "gpu": "the device that its tests run on",
    "zoo": "the models of the zoo",
    "distributed": "the scripts that its tests start",
    "distributed/beside": "the same, of users' programs beside one device",
    "distributed/start": "the same, that give models their values",
    "distributed/calibration": "the same, that measure a cluster",
}
"""Folders of tests/ with Python files that are neither tests nor conftest.py, and what these are."""

# Room → the rooms that it may import, besides itself and `shardc.errors`, which everybody but the runtime may raise.
MAY_IMPORT = {
    "runtime": set[str](),
    "errors": {"runtime"},
    "options": {"runtime", "ir", "cost"},
    "solver": set[str](),
    "ir": {"runtime"},
    "capture": {"runtime", "ir"},
    "rules": {"runtime", "ir", "capture"},
    "cost": {"runtime", "ir"},
    "analysis": {"runtime", "ir", "rules", "cost"},
    "planning": {"runtime", "ir", "options", "rules", "cost", "solver", "analysis"},
}
MAY_IMPORT["source"] = {*MAY_IMPORT["analysis"], "analysis", "planning"}
MAY_IMPORT["passes"] = {*MAY_IMPORT["planning"], "planning", "capture", "source"}
MAY_IMPORT["explain"] = {*MAY_IMPORT["planning"], "planning", "passes", "source"}
MAY_IMPORT["inspect"] = {*MAY_IMPORT["explain"], "explain"}
MAY_IMPORT["top"] = {*MAY_IMPORT["inspect"], "inspect", "capture"}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package by its import name, each once, at its real path."""
    for folder, prefix in CODE.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if prefix == "shardc" and parts[0] in ("passes", "runtime"):
                continue  # the links
            yield ".".join((prefix, *parts)).removesuffix(".__init__"), path


MODULES = dict(modules())


def exported(path: Path) -> set[str]:
    """What a module names in `__all__`."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def room(module: str) -> str:
    """The room of a module: `shardc.rules.families.contraction` → `rules`."""
    part = module.split(".")[1]
    return part if part in MAY_IMPORT else "top"


COLLECTIVES = {name for path in (ROOT / "runtime/collectives").glob("*.py") for name in exported(path)} - {"wait"}
ASKING = ("passes", "cost", "analysis", "planning", "ir")


def imports(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a file imports, also inside functions and under TYPE_CHECKING."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if base == "shardc" or full in MODULES else base


@pytest.mark.parametrize("name", [name for name in MODULES if name != "shardc"])
def test_import_direction(name: str) -> None:
    allowed = MAY_IMPORT[room(name)] | {room(name)} | ({"errors"} if room(name) != "runtime" else set())
    for line, imported in imports(name, MODULES[name]):
        if imported == "shardc" or not imported.startswith("shardc."):
            assert imported != "shardc", f"{name}:{line} imports the whole package; import the module that it needs"
            continue
        assert room(imported) in allowed, f"{name}:{line} is in {room(name)!r} and may not import {imported}"


def test_runtime_imports_torch_numpy_and_the_standard_library_only() -> None:
    known = {*sys.stdlib_module_names, "torch", "numpy"}  # numpy: torch computes with few unsigned integers
    for name, path in MODULES.items():
        if room(f"{name}.") == "runtime":
            for line, imported in imports(name, path):
                fine = imported.split(".")[0] in known or imported.startswith("shardc.runtime")
                assert fine, f"{name}:{line} imports {imported}"


def quoted_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string of a file that is the name of a collective."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Constant) and node.value in COLLECTIVES:
            yield node.lineno, node.value


@pytest.mark.parametrize("name", [name for name in MODULES if name != "shardc" and room(name) in ASKING])
def test_collectives_are_asked_and_not_told_by_name(name: str) -> None:
    """Hardware files name them; `shardc/cost/collectives.py` looks those names up, and quotes none itself."""
    for line, quoted in quoted_names(MODULES[name]):
        raise AssertionError(f"{name}:{line} quotes {quoted!r}; take the object from shardc.runtime.collectives")


def test_the_names_of_collectives_are_known_here() -> None:
    assert {"all_gather", "all_reduce", "all_reduce_bucket", "permute", "shard", "to_partial"} <= COLLECTIVES


@pytest.mark.parametrize("part", ["collectives", "kernels"])
def test_what_generated_code_may_call_is_said_once_and_found(part: str) -> None:
    """Each module says it in `__all__`; the runtime exports it from there, and lists it nowhere."""
    listed = (ROOT / "runtime/__init__.py").read_text()
    for name in (name for name in MODULES if name.startswith(f"shardc.runtime.{part}.")):
        module = importlib.import_module(name)
        for callable_name in module.__all__:
            assert getattr(shardc.runtime, callable_name) is getattr(module, callable_name)
            assert callable_name in shardc.runtime.__all__
            explicit = callable_name in ("Part", "wait")  # people import these
            assert explicit or not re.search(rf"\b{callable_name}\b", listed.split('"""')[2]), callable_name


def test_importing_the_runtime_loads_nothing_of_the_compiler() -> None:
    program = """
import sys
import torch
before = set(sys.modules)
import shardc.runtime
print(*sorted(name for name in set(sys.modules) - before if not name.startswith("shardc.runtime")))
print(*sorted({"z3", "scipy", "transformers"} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded, foreign = ran.stdout.split("\n")[:2]
    assert [name for name in loaded.split() if name.startswith("shardc.")] == []
    assert foreign == ""


@pytest.mark.parametrize("name", ["passes", "runtime"])
def test_bare_import_is_refused(name: str) -> None:
    ran = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode != 0
    assert f"import shardc.{name}" in ran.stderr


def test_public_names_resolve() -> None:
    import shardc

    for name in shardc.__all__:
        assert getattr(shardc, name) is not None
    assert set(shardc.__all__) <= set(dir(shardc))
    with pytest.raises(AttributeError, match="shardc' has no attribute 'shards'"):
        _ = shardc.shards  # type: ignore[attr-defined]


def test_what_fails_on_a_rank_is_an_error_of_ours() -> None:
    from shardc.errors import ShardcError

    assert ShardcError is shardc.runtime.ShardcError and issubclass(shardc.runtime.RankError, ShardcError)


def test_the_submodule_constrain_does_not_hide_the_function() -> None:
    program = "import shardc.ir.constrain; from shardc import constrain; assert callable(constrain), constrain"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_package_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    homes = {name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in MODULES.items()}
    assert sorted(declared) == sorted(homes)
    for package in homes:
        assert package in MODULES, f"{package} has no __init__.py"


def tracked() -> list[Path]:
    """The files of the repository; without git, of its folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode == 0:
        names = listed.stdout.split("\0")
        return [ROOT / name for name in names if name and (ROOT / name).is_file()]
    skipped = {".venv", ".git", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    return [path for path in ROOT.rglob("*") if path.is_file() and not skipped & set(path.parts)]


SOURCES = [path for path in tracked() if path.suffix == ".py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST, f"{path} has {lines} lines; split it by what its parts do"


def test_no_folder_is_too_full() -> None:
    files = Counter(path.parent.relative_to(ROOT) for path in tracked())
    full = {str(folder): count for folder, count in files.items() if count > FULLEST}
    assert full == {}, f"group the files of a folder that holds more than {FULLEST}"
    entries = {path.relative_to(ROOT).parts[1] for path in tracked() if path.is_relative_to(ROOT / "tests")}
    assert len(entries) <= FULLEST, "group the helpers of the tests"


def test_every_folder_of_helpers_is_declared() -> None:
    """Tests import helpers from declared folders only, so that a test file is where it is looked for."""
    tests = ROOT / "tests"
    python = [path for path in SOURCES if path.is_relative_to(tests) and path.name != "conftest.py"]
    helpers = {str(path.parent.relative_to(tests)) for path in python if not path.name.startswith("test_")}
    assert helpers == set(HELPERS)


def test_no_class_is_defined_twice() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    several = {name: modules for name, modules in places.items() if len(modules) > 1}
    assert not several, f"give each its own name: {several}"


def test_no_machine_paths_in_tracked_files() -> None:
    place = re.compile(r"(?<![\w.$}])/(?:root|home|work|opt|Users)/[\w.-]|file:/{2}")
    found: list[str] = []
    for path in tracked():
        text = path.read_bytes().decode("utf-8", "ignore")
        found += [f"{path.relative_to(ROOT)}: {hit[0]}" for hit in place.finditer(text)]
    assert found == []


def test_constraints_hold_versions_only() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+( ; .+)?", line), line
