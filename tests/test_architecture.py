"""The house: rooms that one can take in, imports that run one way, transformers where it belongs, docstrings."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from torch import nn
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel, Trainer
from transformers.cache_utils import CacheLayerMixin

ROOT = Path(__file__).parents[1] / "byrote"
PACKAGES = "compiled address tables ops memory nn models graft interop data train lab cli".split()  # noqa: SIM905
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if len(path.relative_to(ROOT).parts) > 1)
WITHOUT_TRANSFORMERS = ("address", "tables", "ops", "nn")

OTHERS = (Cache, CacheLayerMixin, GenerationMixin, PreTrainedConfig, PreTrainedModel, Trainer)
PRIVATE = {name for other in OTHERS for name in dir(other) if name[0] == "_" != name[-1]}
PRIVATE -= set(dir(nn.Module))  # torch's
# What a subclass of PreTrainedModel is asked to define.
EXTENSION_POINTS = {"_init_weights", "_no_split_modules", "_skip_keys_device_placement", "_supports_sdpa"}
EXTENSION_POINTS |= {"_keep_in_fp32_modules_strict", "_tied_weights_keys"}


def imports(tree: ast.Module) -> set[str]:
    """Full names of all that a file imports, inside its functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def names_in(tree: ast.Module) -> tuple[set[str], set[str]]:
    """(names and attributes that are used, functions and classes that are defined)"""
    nodes = list(ast.walk(tree))
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {node.id for node in nodes if isinstance(node, ast.Name)}
    return used, {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_and_private_names(file):
    tree, package = ast.parse((ROOT / file).read_text("utf-8")), file.parts[0]
    imported = imports(tree)
    above = PACKAGES[: PACKAGES.index(package) + 1]
    own = {name.split(".")[1] for name in imported if name.startswith("byrote.")}
    assert own <= set(above), f"{file} imports {sorted(own - set(above))}, which is not above {package}"

    theirs = {name for name in imported if name.split(".")[0] == "transformers"}
    assert not (theirs and package in WITHOUT_TRANSFORMERS), f"{file} imports {sorted(theirs)}"

    if file == Path("models/hf.py"):
        return
    allowed = EXTENSION_POINTS if package == "models" else set()
    private = {name for name in theirs if any(part.startswith("_") for part in name.split("."))}
    used, defined = names_in(tree)
    # Without transformers in sight a file that defines a name means its own; with it, it may override theirs.
    private |= (used | defined if theirs else used - defined) & PRIVATE - allowed
    assert not private, f"{file} touches {sorted(private)} of transformers: move it to models/hf.py"


def test_every_package_has_its_place():
    present = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert present <= set(PACKAGES), f"{sorted(present - set(PACKAGES))} is not in the list of packages"


MODULES = {".".join(("byrote", *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}
PUBLIC_CLASSES = [
    (file, node)
    for file in FILES
    for node in ast.parse((ROOT / file).read_text("utf-8")).body
    if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
]


@cache
def imported_files() -> dict[str, set[str]]:
    """Of each module, the modules of byrote that it imports, inside its functions too; a package counts as its door."""
    found = {}
    for module, path in MODULES.items():
        names = imports(ast.parse(path.read_text("utf-8")))
        candidates = {name if name in MODULES else name.rpartition(".")[0] for name in names}
        found[module] = (candidates & MODULES.keys()) - {module}
    return found


def test_a_room_is_taken_in_at_a_glance():
    rooms = {path.parent for path in ROOT.rglob("*.py")}
    counts = {room.relative_to(ROOT): len([p for p in room.glob("*.py") if p.name != "__init__.py"]) for room in rooms}
    assert {str(room): count for room, count in counts.items() if count > 16} == {}
    lengths = {str(file): len((ROOT / file).read_text("utf-8").splitlines()) for file in FILES}
    assert {file: length for file, length in lengths.items() if length > 310} == {}


def test_a_short_file_serves_two():
    """Else it belongs into the file that it serves. Verbs, doors and what a process starts have one place to be."""
    importers = {module: [other for other, its in imported_files().items() if module in its] for module in MODULES}
    short = {
        module
        for module, path in MODULES.items()
        if len(path.read_text("utf-8").splitlines()) < 40
        and path.name not in ("__init__.py", "__main__.py")
        and "cli" not in path.parts
        and "loops" not in path.parts
    }
    assert sorted(module for module in short if len(importers[module]) < 2) == []


def test_no_circle_of_files():
    seen, path = set(), []

    def visit(module):
        if module in path:
            pytest.fail("a circle: " + " -> ".join([*path[path.index(module) :], module]))
        if module not in seen:
            path.append(module)
            for other in sorted(imported_files()[module]):
                visit(other)
            seen.add(path.pop())

    for module in sorted(MODULES.keys() - {"byrote", "byrote.registration"}):  # whose imports wait in functions
        visit(module)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_nobody_asks_a_table_what_it_is(file):
    """Outside of tables/; and nobody imports by a string."""
    for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        assert name not in ("import_module", "__import__"), f"{file}:{node.lineno} imports by a string"
        if name in ("isinstance", "hasattr", "getattr") and file.parts[0] != "tables":
            asked = ast.unparse(node)
            assert "Table)" not in asked and "table," not in asked, f"{file}:{node.lineno} asks a table: {asked}"


def test_the_lower_packages_load_no_transformers():
    code = (
        "import pkgutil, sys, importlib, byrote\n"
        f"for package in {WITHOUT_TRANSFORMERS}:\n"
        "    door = importlib.import_module('byrote.' + package)\n"
        "    for found in pkgutil.walk_packages(door.__path__, door.__name__ + '.'):\n"
        "        if not found.name.endswith('.triton'):\n"
        "            importlib.import_module(found.name)\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "code",
    [
        "import byrote, sys; assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()",
        "import byrote.cli.main, sys; assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()",
        "import byrote; from transformers import AutoConfig; AutoConfig.for_model('byrote_dlcm')",
        "from byrote.models.engram.modeling import EngramModel; from transformers import AutoConfig\n"
        "AutoConfig.for_model('byrote_dlcm')\n"
        "import sys, byrote.train; assert 'numba' not in sys.modules  # it comes with the first loop that runs",
    ],
    ids=["import", "command", "auto", "one-file"],
)
def test_byrote_loads_what_is_asked_for(code):
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("file", "node"), PUBLIC_CLASSES, ids=[f"{file}:{node.name}" for file, node in PUBLIC_CLASSES])
def test_a_public_class_says_what_it_is(file, node):
    assert ast.get_docstring(node), f"{file}: {node.name} has no docstring of its own"
