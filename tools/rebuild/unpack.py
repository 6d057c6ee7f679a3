"""`a, b = x, y` as two statements, where the formatter had to break it or it is long: one thing a line."""

from __future__ import annotations

import ast
import json
import tokenize
import io
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONG = 88


def names(node) -> set[str]:
    return {ast.unparse(n) for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute, ast.Subscript))}


def segment(lines: list[str], node) -> str:
    if node.lineno == node.end_lineno:
        return lines[node.lineno - 1].encode()[node.col_offset : node.end_col_offset].decode()
    first = lines[node.lineno - 1].encode()[node.col_offset :].decode()
    last = lines[node.end_lineno - 1].encode()[: node.end_col_offset].decode()
    return "\n".join([first, *lines[node.lineno : node.end_lineno - 1], last])


def unpacked(text: str) -> str:
    if "# fmt: off" in text:
        return text
    while True:
        try:
            tree = ast.parse(text)
        except SyntaxError:
            return text
        lines = text.split("\n")
        comments = {
            t.start[0]: t
            for t in tokenize.generate_tokens(io.StringIO(text).readline)
            if t.type == tokenize.COMMENT
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Assign) or len(node.targets) != 1:
                continue
            target, value = node.targets[0], node.value
            if (
                not isinstance(target, ast.Tuple)
                or not isinstance(value, ast.Tuple)
                or len(target.elts) != len(value.elts)
            ):
                continue
            if any(isinstance(e, ast.Starred) for e in (*target.elts, *value.elts)):
                continue
            line = lines[node.lineno - 1]
            if node.lineno == node.end_lineno and len(line) <= LONG:
                continue
            if line[: node.col_offset].strip():
                continue
            set_ = set()
            clash = False
            for t, v in zip(target.elts, value.elts):
                clash |= bool(set_ & names(v)) or any(
                    ast.unparse(t) != s and s.startswith(ast.unparse(t) + ".") for s in set_
                )
                set_ |= {ast.unparse(t)}
                # what is assigned earlier must not be the object that a later value is taken from
                clash |= any(ast.unparse(t) in names(w) for w in value.elts[value.elts.index(v) + 1 :])
            if clash:
                continue
            rows = range(node.lineno, node.end_lineno + 1)
            said = [comments[r] for r in rows if r in comments]
            indent = " " * node.col_offset
            new = []
            used = set()
            for t, v in zip(target.elts, value.elts):
                body = segment(lines, v)
                note = ""
                for r in range(v.lineno, v.end_lineno + 1):
                    if r in comments:
                        used.add(r)
                if v.end_lineno in comments and node.lineno != node.end_lineno:
                    note = "  " + comments[v.end_lineno].string
                new.append(
                    f"{indent}{segment(lines, t)} = {body}{note}"
                    if "\n" not in body
                    else f"{indent}{segment(lines, t)} = ({body}){note}"
                )
            left = [c.string for c in said if c.start[0] not in used or node.lineno == node.end_lineno]
            new[0:0] = [indent + c for c in left]
            lines[node.lineno - 1 : node.end_lineno] = "\n".join(new).split("\n")
            break
        else:
            return text
        text = "\n".join(lines)


def main() -> None:
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        book = json.loads(path.read_text(encoding="utf-8"))
        for c in book["cells"]:
            if c["cell_type"] == "code":
                c["source"] = unpacked("".join(c["source"])).splitlines(keepends=True)
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
