"""The house: a package imports only what stands above it, and transformers stays where it belongs."""

import ast
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
