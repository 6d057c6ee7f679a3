"""The house's own rules: what may import what, how large its parts are, and which notebook each module comes
from.
"""

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIB, NBS = ROOT / "flextok_edu", ROOT / "nbs"
LAYERS = (
    "engine",
    "data",
    "lessons",
    "systems",
    "evaluation",
    "io",
    "apps",
)  # each may import itself and those before it
DOORS = {
    "__init__",
    "core",
    "released",
    "pipeline",
    "data.__init__",
}  # written by hand: old names that go on to work
MODULES = {
    ".".join(f.relative_to(LIB).with_suffix("").parts): f
    for f in sorted(LIB.rglob("*.py"))
    if f.name != "_modidx.py"
}
OURS = {m: f for m, f in MODULES.items() if m not in DOORS and not m.endswith("__init__")}


def layer(module: str) -> int:
    head = module.split(".")[0]
    return LAYERS.index(head if head in LAYERS else "lessons")


def imported(path: Path) -> list[tuple[str, str, bool]]:
    """(module, name, at the top) of all that a module imports from the package, also inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    package = ".".join(path.relative_to(LIB).with_suffix("").parts[:-1])
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            assert not (
                isinstance(node, ast.Import) and any(a.name.startswith("flextok_edu") for a in node.names)
            )
            continue
        name = node.module or ""
        if node.level == 1 and package:
            name = f"{package}.{name}"
        elif not node.level:
            if not name.startswith("flextok_edu"):
                continue
            name = name.removeprefix("flextok_edu").lstrip(".")
        found += [(name, a.name, id(node) in top) for a in node.names]
    return found


GRAPH = {m: imported(f) for m, f in OURS.items()}


@pytest.mark.parametrize("module", OURS)
def test_imports_go_downward(module):
    wrong = [(m, n) for m, n, _ in GRAPH[module] if m not in OURS or layer(m) > layer(module)]
    assert not wrong, f"{module} may not import these: {wrong}"


def test_no_circle():
    done, path = set(), []

    def visit(module):
        assert module not in path, "a circle: " + " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for other, _, _ in GRAPH[module]:
            visit(other)
        path.pop()
        done.add(module)

    for module in OURS:
        visit(module)


@pytest.mark.parametrize("module", OURS)
def test_no_private_name_crosses(module):
    wrong = [(m, n) for m, n, _ in GRAPH[module] if n.startswith("_")]
    assert not wrong, f"{module} imports private names: {wrong}"


@pytest.mark.parametrize("module", OURS)
def test_modules_are_small(module):
    assert len(OURS[module].read_text(encoding="utf-8").splitlines()) <= 400


def test_each_module_has_its_notebook():
    source = {}
    for notebook in NBS.rglob("*.ipynb"):
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            if text.startswith("#| default_exp "):
                module = text.split()[2]
                assert module not in source, f"{notebook} and {source[module]} both write {module}"
                source[module] = notebook
            elif text.startswith("#| export"):
                assert text.splitlines()[0].strip() == "#| export", f"{notebook}: one notebook, one module"
    assert source.keys() == OURS.keys()


def test_cells_are_short():
    """60 formatted lines; a table may be longer, a class up to 130, and FlexTok as long as it is."""
    long = []
    for notebook in NBS.rglob("*.ipynb"):
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "code" and len(text.splitlines()) > 60:
                body = ast.parse(text).body
                most = 130 if isinstance(body[0], ast.ClassDef) and body[0].name != "FlexTok" else 1000
                if (
                    len(body) > 1
                    or not isinstance(body[0], (ast.ClassDef, ast.Assign))
                    or len(text.splitlines()) > most
                ):
                    long.append(f"{notebook.relative_to(NBS)} {cell['id']}: {len(text.splitlines())}")
    assert not long, "\n".join(long)
