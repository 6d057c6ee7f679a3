"""Formatting changed nothing: every code cell has the syntax tree that it has in another commit.

python tools/same_code.py            the working tree against HEAD
python tools/same_code.py COMMIT     a commit against its parent
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout


def cells(text: str, path: str) -> dict[str, str]:  # cell id (or the path of a .py file): syntax tree
    if not path.endswith(".ipynb"):
        return {path: tree(text)}
    code = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    directives = {c["id"]: [s for s in c["source"] if s.startswith("#|")] for c in code}
    return {c["id"]: f"{directives[c['id']]} {tree(''.join(c['source']))}" for c in code}


def tree(source: str) -> str:  # magics are no Python: such a cell must be the same to the letter
    try:
        found = ast.parse(source)
    except SyntaxError:
        return source
    for node in ast.walk(found):  # the formatter may indent a docstring anew
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node, clean=False
        ):
            node.body[0].value.value = ast.get_docstring(node)
    return ast.dump(found)


def main() -> None:
    new = sys.argv[1] if len(sys.argv) > 1 else None
    old = f"{new}~" if new else "HEAD"
    names = git("ls-tree", "-r", "--name-only", old, "nbs", "tests", "tools").split("\n")
    count, wrong = 0, []
    for path in (n for n in names if n.endswith((".ipynb", ".py"))):
        before = cells(git("show", f"{old}:{path}"), path)
        after = cells(git("show", f"{new}:{path}") if new else open(path, encoding="utf-8").read(), path)
        count += len(before)
        wrong += [f"{path}: {i}" for i in before.keys() | after.keys() if before.get(i) != after.get(i)]
    print(f"{count} pieces of code compared; other than before: {', '.join(wrong) or 'none'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
