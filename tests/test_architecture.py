"""The structure of the package: imports run downwards, public names resolve, and Trainer is extended in public."""

import ast
import importlib
import pkgutil
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from transformers import Trainer

import clip_po
from clip_po.trainer import ContrastivePOTrainer

PACKAGE = Path(clip_po.__file__).parent
PACKAGES = ["clip_po", *(m.name for m in pkgutil.walk_packages([str(PACKAGE)], "clip_po.") if m.ispkg)]


def module_name(file):
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file):
    """Modules of the package that a file imports when it is imported, without those for type checkers alone."""
    tree = ast.parse(file.read_text())
    only_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and id(node) not in only_types]
    found = set()
    for node in nodes:
        if node.module and node.module.split(".")[0] == "clip_po":
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in below if name in MODULES} or {node.module}
    return found


MODULES = {module_name(file): file for file in PACKAGE.rglob("*.py")}
IMPORTS = {name: imports_of(file) for name, file in MODULES.items()}


def test_there_is_no_import_circle():
    try:
        list(TopologicalSorter(IMPORTS).static_order())
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def reached(name):
    """All modules that a module imports, directly or not."""
    found, todo = set(), [name]
    while todo:
        for module in IMPORTS[todo.pop()] - found:
            found.add(module)
            todo.append(module)
    return found


@pytest.mark.parametrize(
    ("below", "above"),
    [
        ("clip_po.losses", "clip_po"),
        ("clip_po.evaluation", "clip_po.trainer"),
        ("clip_po.data", "clip_po.trainer"),
        ("clip_po.hub", "clip_po.evaluation"),
        ("clip_po.trainer", "clip_po.concept"),
        ("clip_po.trainer", "clip_po.cli"),
        ("clip_po.evaluation", "clip_po.cli"),
    ],
)
def test_imports_run_downwards(below, above):
    modules = [name for name in MODULES if name == below or name.startswith(f"{below}.")]
    up = {m for name in modules for m in reached(name) - {*modules} if m == above or m.startswith(f"{above}.")}
    assert not up, f"{below} imports {sorted(up)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_name_is_hidden_by_a_module_of_the_same_name(package):
    """An imported module becomes an attribute of its package, in the place of what is loaded when it is used."""
    names = set(getattr(importlib.import_module(package), "__all__", ()))
    assert not {name for name in names if f"{package}.{name}" in MODULES}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_of_a_package_resolves(package):
    module = importlib.import_module(package)
    assert module.__doc__
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None


def test_the_trainer_extends_transformers_by_public_methods():
    own = {name for name in vars(ContrastivePOTrainer) if callable(getattr(Trainer, name, None))}
    overridden = {name for name in own if name in vars(Trainer)} - {"__init__"}
    assert {name for name in overridden if name.startswith("_")} == {"_save", "_save_checkpoint"}
    assert len(overridden) <= 16
    assert ContrastivePOTrainer.__mro__[1] is Trainer


def test_the_private_methods_that_are_overridden_exist():
    """They are not public API of transformers: a release that changes them must fail here first."""
    assert [*Trainer._save.__code__.co_varnames[:3]] == ["self", "output_dir", "state_dict"]
    assert [*Trainer._save_checkpoint.__code__.co_varnames[:3]] == ["self", "model", "trial"]
