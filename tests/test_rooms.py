"""The rules of the house, held by reading the imports: see docs/development.md."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ROOT / "scripts"
MODULES = sorted(path for path in SCRIPTS.rglob("*.py") if path.name != "__init__.py")
MAY_IMPORT = {  # room -> rooms, besides itself
    "running": set(),
    "scans": {"running"},
    "diffusion": {"running"},
    "training": {"running", "scans", "diffusion"},
    "sampling": {"running", "scans", "diffusion"},
    "evaluation": {"running", "scans", "diffusion"},
    "release": {"running", "diffusion"},
    "page": {"running", "diffusion", "sampling"},
}


def imports_of(source: str) -> set[str]:
    """Full names of the modules that a source imports, at its top or within functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports say the full name"
            found.add(node.module)
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def broken_rules(room: str, source: str) -> list[str]:
    """What a module of a room imports and must not."""
    names = imports_of(source)
    others = {name.split(".")[1] for name in names if name.startswith("scripts.")} - {room}
    broken = sorted(others - MAY_IMPORT[room])
    if room == "diffusion" and any(name.split(".")[0] == "ignite" for name in names):
        broken.append("ignite")
    return broken


def named(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_every_module_lies_in_a_room():
    assert {path.parent.relative_to(SCRIPTS).as_posix() for path in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_module_keeps_the_rules(path):
    source = path.read_text()
    assert broken_rules(path.parent.name, source) == []
    assert len(source.splitlines()) <= 400
    first = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0]
    assert first[:1].isupper() and first.endswith((".", ":")), "a module begins with a sentence that says what it holds"


@pytest.mark.parametrize(
    "room, source, broken",
    [
        ("running", "from scripts.scans.find import stem", ["scans"]),
        ("diffusion", "import ignite.distributed as idist", ["ignite"]),
        ("diffusion", "def f():\n    from ignite.engine import Engine", ["ignite"]),
        ("training", "import scripts.sampling.run", ["sampling"]),
        ("evaluation", "from scripts.training import records", ["training"]),
        ("release", "from scripts.diffusion.weights import load_weights", []),
    ],
)
def test_a_broken_rule_is_found(room, source, broken):
    assert broken_rules(room, source) == broken


def test_no_imports_go_round():
    names = set(map(named, MODULES))
    graph = {named(path): imports_of(path.read_text()) & names - {named(path)} for path in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(names)  # raises CycleError


def test_programs_that_copy_bundles_leave_no_room_out():
    """The zoo and MONAI Label's and Deploy's users copy a bundle without its data, outputs and caches, by name."""
    rooms = {path.name for path in SCRIPTS.rglob("*") if path.is_dir()}
    assert not rooms & {"data", "output", "outputs", "eval", "models", "logs"}
