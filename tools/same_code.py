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
    for node in ast.walk(found):  # the formatter may indent a docstring anew, and cut a long literal in two
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            node.value.value = " ".join(node.value.value.split())
        if isinstance(node, ast.JoinedStr):
            node.values = joined(node.values)
    return ast.dump(found)


def joined(values: list) -> list:  # neighbouring texts of an f-string as one
    out: list = []
    for v in values:
        if isinstance(v, ast.Constant) and out and isinstance(out[-1], ast.Constant):
            v = ast.Constant(out.pop().value + v.value)
        out.append(v)
    return out


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
