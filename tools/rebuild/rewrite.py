"""Imports of the old modules become imports of the new ones: in code, in programs inside strings, in text."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

from modules import WHERE

OLD = (
    "core data sources features vae fsq transformer registers flow tokenizer ar "
    "evaluate train cache released pipeline commands cost zoo"
).split()
ROOT = Path(__file__).resolve().parents[2]
COMMIT = "952a2a768f6b9aa33dec33e34f403ff4b352e3ba"


def old_module(name: str) -> ast.Module:
    show = subprocess.run(
        ["git", "show", f"{COMMIT}:flextok_edu/{name}.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return ast.parse(show.stdout)


def targets(node) -> list[str]:  # names that a statement defines
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        found = node.targets if isinstance(node, ast.Assign) else [node.target]
        flat = [e for t in found for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
        return [e.id for e in flat if isinstance(e, ast.Name) and e.id != "__all__"]
    return []


DEFINED, IMPORTED = {}, {}
for _name in OLD:
    _tree = old_module(_name)
    DEFINED[_name] = list(dict.fromkeys(x for n in _tree.body for x in targets(n)))
    IMPORTED[_name] = {
        a.asname or a.name: (n.module.removeprefix("flextok_edu."), a.name)
        for n in _tree.body
        if isinstance(n, ast.ImportFrom) and (n.level or n.module.startswith("flextok_edu."))
        for a in n.names
    }
PLACE = {}
for _new, _parts in WHERE.items():
    for _old, _names in _parts.items():
        for _x in DEFINED[_old] if _names == "*" else _names.split():
            assert _x in DEFINED[_old] and (_old, _x) not in PLACE, (_new, _x)
            PLACE[_old, _x] = _new
assert not [(m, x) for m in OLD for x in DEFINED[m] if (m, x) not in PLACE]


def place(old: str, name: str) -> str | None:  # where `name` of an old module lives now
    while (old, name) not in PLACE:
        if name not in IMPORTED.get(old, {}):
            return None
        old, name = IMPORTED[old][name]
    return PLACE[old, name]


FROM = re.compile(
    r"(?P<lead>^[ \t]*)?from flextok_edu\.(?P<old>\w+) import (?P<names>\([^)]*\)|\w[\w ,]*\w|\w)", re.M
)


def imports(text: str, report=print) -> str:
    """`from flextok_edu.core import fit, show` as one import for each new module."""

    def new(found: re.Match) -> str:
        old = found["old"]
        if old not in OLD:
            return found[0]
        groups: dict[str, list[str]] = {}
        for item in re.sub(r"#[^\n]*", "", found["names"].strip("()")).split(","):
            if item := item.strip():
                module = place(old, item.split(" as ")[0].strip())
                if module is None:
                    report(f"UNKNOWN {old}.{item}")
                    return found[0]
                groups.setdefault(module, []).append(item)
        lead = found["lead"]
        joint = "; " if lead is None else "\n" + lead
        return (lead or "") + joint.join(
            f"from flextok_edu.{m} import {', '.join(n)}" for m, n in sorted(groups.items())
        )

    return FROM.sub(new, text)


def alias(module: str) -> str:
    return module.replace(".", "_")


def objects(text: str, report=print) -> str:
    """`import flextok_edu.core as core` and every `core.fit`, `setattr(core, "fit", …)` below it."""
    known: dict[str, str] = {}
    used: set[str] = set()
    for line in re.finditer(
        r"^[ \t]*import (flextok_edu\.\w+ as \w+(?:, flextok_edu\.\w+ as \w+)*)", text, re.M
    ):
        for part in line[1].split(", "):
            old, name = re.fullmatch(r"flextok_edu\.(\w+) as (\w+)", part).groups()
            if old in OLD:
                known[name] = old
    for line in re.finditer(r"^[ \t]*from flextok_edu import ([\w, ]+)$", text, re.M):
        for part in line[1].split(","):
            old, _, name = part.strip().partition(" as ")
            if old in OLD:
                known[name or old] = old
    if not known:
        return text
    keep: set[str] = set()

    def attribute(found: re.Match) -> str:
        name, what = found[1], found[2]
        module = place(known[name], what)
        if module is None:
            report(f"NOT MOVED {name}.{what}")
            keep.add(name)
            return found[0]
        used.add(module)
        return f"{alias(module)}.{what}"

    def patch(found: re.Match) -> str:
        call, name, what = found[1], found[2], found[3]
        module = place(known[name], what)
        if module is None:
            report(f"NOT MOVED {call}({name}, {what!r}")
            keep.add(name)
            return found[0]
        used.add(module)
        head = "patch(monkeypatch, " if call == "monkeypatch.setattr(" else call
        return f'{head}{alias(module)}, "{what}"'

    names = "|".join(map(re.escape, known))
    text = re.sub(
        rf'(monkeypatch\.setattr\(|\bm\.setattr\(|\bpatch\.setattr\(|\bsetattr\()\s*({names}),\s*"(\w+)"',
        patch,
        text,
    )
    text = re.sub(rf"(?<![\w.\"'])({names})\.(\w+)\b(?!\.py)", attribute, text)
    new = "\n".join(f"import flextok_edu.{m} as {alias(m)}" for m in sorted(used))
    first = True

    def head(found: re.Match) -> str:
        nonlocal first
        out, first = (new if first else ""), False
        return found[1] + ("\n" + found[1]).join(out.splitlines()) if out else found[1] + "pass"

    pattern = rf"^([ \t]*)(?:import flextok_edu\.\w+ as \w+(?:, flextok_edu\.\w+ as \w+)*|from flextok_edu import (?:{names}|{'|'.join(OLD)})(?:[\w, ]*))$"
    text = re.sub(pattern, head, text, flags=re.M)
    return re.sub(r"^pass\n", "", text, flags=re.M)
