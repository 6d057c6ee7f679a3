"""The notebooks of COMMIT, moved into lessons and reference shelves: cells keep their ids and their text.

What is written anew: titles, `default_exp`, and the cells of imports.
"""

from __future__ import annotations

import ast
import builtins
import json
import subprocess
import symtable
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cells import CELLS
from heads import HEADS, LESSONS, TALES
from setups import SETUP_IMPORTS, SETUPS
from rewrite import PLACE, ROOT, imports, place, targets

BASE = "48e55befab81c8c8984ae1388c430666c44bccd2"
ROOMS = (
    "00_core 01_data 01b_sources 02_features 03_vae 04_fsq 05_transformer 06_registers 07_flow 08_tokenizer "
    "09_ar 10_evaluate 11_train 11b_cache 13_released 15_pipeline 15b_commands 16_cost 17_zoo"
).split()
WHOLE = {
    "03_vae": "vae",
    "04_fsq": "fsq",
    "05_transformer": "transformer",
    "06_registers": "registers",
    "07_flow": "flow",
    "08_tokenizer": "tokenizer",
    "09_ar": "ar",
}
LONGEST = 60
SOLUTIONS = {
    "00_core": "00_start",
    "01_data": "01_scenes",
    "01b_sources": "data/opening",
    "09_ar": "11_ar",
    "10_evaluate": "14_evaluation",
    "11_train": "10_training",
    "11b_cache": "io/build",
    "13_released": "17_released",
    "15_pipeline": "apps/run",
    "15b_commands": "apps/session",
    "16_cost": "apps/bench",
    "17_zoo": "apps/explore",
}


def git_json(path: str) -> dict:
    return json.loads(
        subprocess.run(
            ["git", "show", f"{BASE}:{path}"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    )


def free_names(code: str) -> set[str]:
    """Names that a piece of code looks up in its module (or in builtins)."""
    code = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!")))
    found: set[str] = set()

    def walk(table):
        for s in table.get_symbols():
            if table.get_type() == "module":
                if s.is_referenced():
                    found.add(s.get_name())
            elif s.is_global() and s.is_referenced():
                found.add(s.get_name())
        for child in table.get_children():
            walk(child)

    walk(symtable.symtable(code, "cell", "exec"))
    return found - set(dir(builtins))


def assigned(code: str) -> set[str]:
    code = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!")))
    table = symtable.symtable(code, "cell", "exec")
    found = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}

    def inner(t):  # `global x` in functions
        for c in t.get_children():
            found.update(s.get_name() for s in c.get_symbols() if s.is_declared_global() and s.is_assigned())
            inner(c)

    inner(table)
    return found


def import_names(code: str) -> dict[str, str]:
    """Imported name: the statement that imports it."""
    found = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for a in node.names:
                found[a.asname or a.name.split(".")[0]] = (
                    "import " + a.name + (f" as {a.asname}" if a.asname else "")
                )
        elif isinstance(node, ast.ImportFrom):
            for a in node.names:
                found[a.asname or a.name] = f"from {node.module} import {a.name}" + (
                    f" as {a.asname}" if a.asname else ""
                )
    return found


def only_imports(code: str) -> bool:
    body = ast.parse(code).body
    return bool(body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)


def import_cell(statements: list[str]) -> str:
    """Statements as one sorted block: plain imports on one line, then from-imports, the package's own last."""
    plain = sorted(
        s
        for s in statements
        if s.startswith("import ") and " as " not in s and not s.startswith("import flextok_edu")
    )
    renamed = sorted(s for s in statements if s.startswith("import ") and s not in plain)
    froms = defaultdict(set)
    for s in statements:
        if s.startswith("from "):
            module, name = s[5:].split(" import ")
            froms[module].add(name)
    lines = []
    standard = [s[7:] for s in plain if s[7:].split(".")[0] in sys.stdlib_module_names]
    if standard:
        lines.append("import " + ", ".join(standard))
    std_from = [m for m in sorted(froms) if m.split(".")[0] in sys.stdlib_module_names]
    lines += [f"from {m} import {', '.join(sorted(froms[m]))}" for m in std_from]
    others = [s for s in plain if s[7:] not in standard] + [s for s in renamed if "flextok_edu" not in s]
    other_from = [m for m in sorted(froms) if m not in std_from and not m.startswith("flextok_edu")]
    block = sorted(others) + [f"from {m} import {', '.join(sorted(froms[m]))}" for m in other_from]
    if block:
        lines += ([""] if lines else []) + block
    own = [
        f"from {m} import {', '.join(sorted(froms[m]))}" for m in sorted(froms) if m.startswith("flextok_edu")
    ]
    own += [s for s in renamed if "flextok_edu" in s]
    if own:
        lines += ([""] if lines else []) + own
    return "\n".join(lines)


def pieces(source: str, old: str) -> list[tuple[str, str]]:
    """An export cell cut between statements: (module, text)."""
    body, lines = ast.parse(source).body, source.splitlines()
    directive = lines[0] if lines[0].startswith("#|") else ""
    cut, start = [], 1 if directive else 0
    for i, node in enumerate(body):
        names = targets(node)
        last = i == len(body) - 1
        end = len(lines) if last else node.end_lineno
        module = PLACE.get((old, names[0])) if names else None
        if module is None:
            used = [PLACE[old, n] for n in free_names(ast.unparse(node)) if (old, n) in PLACE]
            module = used[-1] if used else (cut[-1][0] if cut else None)
        cut.append((module, "\n".join(lines[start:end]).strip("\n")))
        start = end
    joined: list[tuple[str, str]] = []
    for module, text in cut:
        if joined and joined[-1][0] == module and len((joined[-1][1] + text).splitlines()) + 3 <= LONGEST:
            before = joined[-1][1]
            gap = (
                "\n\n\n"
                if any(t.startswith(("def ", "class ", "@")) for t in (text, *before.splitlines()[-1:]))
                or "def " in before
                else "\n"
            )
            joined[-1] = (module, before + gap + text)
        else:
            joined.append((module, text))
    return [(m, f"#| export\n{t}") for m, t in joined]


def main() -> None:
    out: dict[str, list] = defaultdict(list)  # module or lesson: cells
    origin: dict[str, list[str]] = defaultdict(list)  # which old rooms
    old_imports: dict[str, dict[str, str]] = {}
    titles, metadata = {}, None
    for room in ROOMS:
        book = git_json(f"nbs/{room}.ipynb")
        metadata = metadata or book
        old = WHOLE.get(room) or room.split("_", 1)[1]
        old = {"evaluate": "evaluate"}.get(old, old)
        cells, moved = book["cells"], CELLS.get(room, {})
        found: dict[str, str] = {}
        kinds = []
        for c in cells:
            s = "".join(c["source"])
            code = c["cell_type"] == "code"
            if code and s.startswith("#| default_exp"):
                kinds.append("skip")
            elif code and s.startswith("#| export") and only_imports(s):
                found |= import_names(s)
                kinds.append("skip")
            elif code and not s.startswith("#| export"):
                found |= import_names(s) if "# Where the package is missing" not in s else {}
                kinds.append("skip" if "# Where the package is missing" in s or only_imports(s) else "code")
            elif s.startswith("[![open in Colab]") or "# Where the package is missing" in s:
                kinds.append("skip")
            elif code and s.startswith("#| export"):
                kinds.append("export")
            else:
                kinds.append("code" if code else "text")
        old_imports[room] = found
        titles[room] = "".join(cells[0]["source"])
        kinds[0] = "skip"
        parts = {i: pieces("".join(c["source"]), old) for i, c in enumerate(cells) if kinds[i] == "export"}
        previous = None
        for i, c in enumerate(cells):
            s = "".join(c["source"])
            if kinds[i] == "skip":
                continue
            if kinds[i] == "export":
                for n, (module, text) in enumerate(parts[i]):
                    new = dict(
                        c, id=c["id"] if n == 0 else f"{c['id']}-{n}", source=text.splitlines(keepends=True)
                    )
                    out[module].append((room, "export", new))
                    previous = module
                continue
            if i in moved:
                goal = moved[i]
            elif room in WHOLE:
                goal = WHOLE[room]
            else:
                after = next((parts[j][0][0] for j in range(i, len(cells)) if kinds[j] == "export"), None)
                goal = (after or previous) if kinds[i] == "text" else (previous or after)
            out[goal].append((room, kinds[i], dict(c)))
    written = []
    for goal, cells in out.items():
        written.append(write(goal, cells, old_imports, titles, metadata))
    print(len(written), "notebooks")
    for room in ROOMS:
        path = ROOT / "nbs" / f"{room}.ipynb"
        if path not in written:
            path.unlink(missing_ok=True)
    for old, new in SOLUTIONS.items():
        goal = ROOT / "nbs/solutions" / f"{new}.ipynb"
        goal.parent.mkdir(exist_ok=True)
        source = ROOT / "nbs/solutions" / f"{old}.ipynb"
        if source.exists():
            source.rename(goal)


def write(goal, cells, old_imports, titles, metadata):
    room_module = {r: (WHOLE.get(r) or r.split("_", 1)[1]) for r in ROOMS}
    problems = []

    def say(text):
        problems.append(text)

    defined: set[str] = set()
    for _, kind, c in cells:
        if kind == "export":
            defined |= assigned("".join(c["source"]))
    need, example_need = {}, {}

    def resolve(name, room):
        if (room_module[room], name) in PLACE:
            module = PLACE[room_module[room], name]
            return None if module == goal else f"from flextok_edu.{module} import {name}"
        statement = old_imports[room].get(name)
        if statement and statement.startswith("from flextok_edu."):
            old, rest = statement[len("from flextok_edu.") :].split(" import ")
            base, _, new = rest.partition(" as ")
            module = place(old, base)
            if module is None:
                return statement
            return None if module == goal else f"from flextok_edu.{module} import {rest}"
        return statement

    ready = set(defined)
    for room, kind, c in cells:
        if kind == "text":
            continue
        s = imports("".join(c["source"]), say)
        if s != "".join(c["source"]):
            c["source"] = s.splitlines(keepends=True)
        names = free_names(s)
        if kind == "export":
            for n in sorted(names - defined):
                if statement := resolve(n, room):
                    need[n] = statement
                else:
                    say(f"export {c['id']}: {n}")
    seen = set(defined) | set(need)
    if goal in SETUPS:
        for n in sorted(free_names(SETUPS[goal]) - seen - assigned(SETUPS[goal])):
            example_need[n] = SETUP_IMPORTS[n]
        seen |= assigned(SETUPS[goal]) | set(example_need)
    for room, kind, c in cells:
        if kind == "text" or kind == "export":
            continue
        s = "".join(c["source"])
        for n in sorted(free_names(s) - seen - assigned(s)):
            if statement := resolve(n, room):
                example_need[n] = statement
                seen.add(n)
            else:
                say(f"example {c['id']}: {n}")
        for n in sorted((free_names(s) & assigned(s)) - seen):  # used before it is assigned?
            pass
        seen |= assigned(s)
    lesson = goal in LESSONS or goal in TALES
    name = LESSONS.get(goal) or TALES.get(goal) or goal.replace(".", "/")
    path = ROOT / "nbs" / f"{name}.ipynb"
    slug = name.replace("/", "-")
    if lesson:
        title, intro = next(titles[r] for r, _, _ in cells), ""
    else:
        head = HEADS[goal]
        title, intro = f"# {head[0]}\n> {head[1]}", head[2]

    def md(i, s):
        return {
            "cell_type": "markdown",
            "id": f"{slug}-{i}",
            "metadata": {},
            "source": s.splitlines(keepends=True),
        }

    def code(i, s):
        return {
            "cell_type": "code",
            "execution_count": None,
            "id": f"{slug}-{i}",
            "metadata": {},
            "outputs": [],
            "source": s.splitlines(keepends=True),
        }

    top = [md("title", title)]
    rest = [c for _, _, c in cells]
    kinds = [k for _, k, _ in cells]
    at = 0
    if intro:
        top.append(md("intro", intro))
    if lesson or not intro:
        while (
            at < len(rest)
            and kinds[at] == "text"
            and not "".join(rest[at]["source"]).startswith("## ")
            or (at < 2 and kinds[at] == "text" and lesson and goal == "start")
        ):
            top.append(rest[at])
            at += 1
    if goal not in TALES:
        top.append(code("exp", f"#| default_exp {goal}"))
    if need:
        top.append(code("imports", "#| export\n" + import_cell(sorted(set(need.values())))))
    if example_need:
        top.append(code("example-imports", import_cell(sorted(set(example_need.values())))))
    if goal in SETUPS:
        top.append(code("start", SETUPS[goal].rstrip()))
    book = {"cells": top + rest[at:], "metadata": metadata["metadata"], "nbformat": 4, "nbformat_minor": 5}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for p in problems:
        print(f"{name}: {p}")
    return path


if __name__ == "__main__":
    main()
