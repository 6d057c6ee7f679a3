"""The words of names.py, put into notebooks, tests and tools: token by token in code, in backticks in text.

What is a name in code is renamed where it is defined and where it is imported; strings, comments and texts follow
where the name stands in backticks, or is unmistakable (CamelCase, or with an underscore inside).
"""

from __future__ import annotations

import ast
import io
import json
import re
import sys
import tokenize
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from names import ATTRIBUTES, LOCAL, NAMES, PHRASES, ROOMS

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / "nbs"
EVERYWHERE = {
    o: n
    for table in NAMES.values()
    for o, n in table.items()
    if re.search(r"[a-z][A-Z]|[a-z]_[a-z]|[A-Z]_[A-Z]", o)
}


def alias(module: str) -> str:
    return module.replace(".", "_")


def imported(code: str) -> dict[str, str]:
    """{name as used: new name} for what this code imports from the package."""
    found = {}
    for module, old in re.findall(r"from flextok_edu\.([\w.]+) import (\([^)]*\)|[^\n;\"']+)", code):
        for item in re.sub(r"#[^\n]*", "", old.strip("()")).split(","):
            name, _, other = item.strip().partition(" as ")
            if name in NAMES.get(module, {}) and not other:
                found[name] = NAMES[module][name]
    return found


def code(text: str, names: dict[str, str], local: dict[str, str]) -> str:
    """One piece of Python, renamed token by token."""
    quiet = "\n".join("# MAGIC " + s if s.lstrip().startswith(("%", "!")) else s for s in text.split("\n"))
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(quiet).readline))
    except (tokenize.TokenError, IndentationError):
        return text
    lines = quiet.split("\n")
    edits = []
    for i, t in enumerate(tokens):
        before = tokens[i - 1].string if i else ""
        after = tokens[i + 1].string if i + 1 < len(tokens) else ""
        if t.type == tokenize.NAME:
            new = None
            if before == "." and i > 1 and tokens[i - 2].string in ALIASES:
                new = NAMES[ALIASES[tokens[i - 2].string]].get(t.string)
            if (
                new is None
                and t.string in ATTRIBUTES
                and (before in (".", "def"))
                and (after == "(" or t.string not in CALLED)
            ):
                new = ATTRIBUTES[t.string]
            if new is None and t.string in local:
                new = local[t.string]
            if new is None and before != "." and t.string in names:
                keyword = after == "=" and in_call(tokens, i)
                new = None if keyword else names[t.string]
            if new and new != t.string:
                edits.append((t.start, t.end, new))
        elif t.type in (tokenize.STRING, tokenize.COMMENT) or t.type == getattr(
            tokenize, "FSTRING_MIDDLE", -1
        ):
            new = words(t.string, names)
            if t.string[1:-1] in LOCAL["*"]:  # "law" of a parametrised test
                new = t.string[0] + LOCAL["*"][t.string[1:-1]] + t.string[0]
            elif t.string[1:-1] in names and re.match(
                r"_?[A-Z][a-z]", t.string[1:-1]
            ):  # an annotation in quotes
                new = t.string[0] + names[t.string[1:-1]] + t.string[0]
            elif t.string[1:-1] == "players":
                new = t.string[0] + "objectives" + t.string[0]
            if t.type == tokenize.STRING and "f" in re.match(r"\w*", t.string)[0].lower():
                new = fstring(new, names | local)
            if new != t.string:
                edits.append((t.start, t.end, new))
    for (r, c), (r2, c2), new in reversed(edits):
        head, tail = lines[r - 1][:c], lines[r2 - 1][c2:]
        lines[r - 1 : r2] = (head + new + tail).split("\n")
    return "\n".join(s.replace("# MAGIC ", "", 1) if s.startswith("# MAGIC ") else s for s in lines)


def in_call(
    tokens, i: int
) -> bool:  # whether token i stands inside round brackets: then `x=` names an argument
    depth = 0
    for t in reversed(tokens[:i]):
        if t.string in ")]}":
            depth += 1
        elif t.string in "([{":
            if depth == 0:
                return t.string == "("
            depth -= 1
    return False


def fstring(text: str, table: dict[str, str]) -> str:
    """The expressions in an f-string (before Python 3.12 it is one token)."""

    def inner(m: re.Match) -> str:
        e = re.sub(r"(?<![\w.\"'])[A-Za-z_]\w*\b(?![\"'])", lambda n: table.get(n[0], n[0]), m[0])
        e = re.sub(r"\.([A-Za-z_]\w*)\b", lambda n: "." + local_attribute(n[1], table), e)
        return e

    return re.sub(r"\{[^{}]+\}", inner, text)


def local_attribute(name: str, table: dict[str, str]) -> str:
    return ATTRIBUTES[name] if name in ATTRIBUTES and name not in CALLED else table.get(name, name)


def words(text: str, names: dict[str, str]) -> str:
    """Names in backticks, unmistakable names, phrases, rooms."""
    table = EVERYWHERE | names
    text = re.sub(
        r"`([^`\n]*)`",
        lambda m: (
            "`"
            + re.sub(r"\b[A-Za-z_]\w*\b", lambda n: table.get(n[0], ATTR_TEXT.get(n[0], n[0])), m[1])
            + "`"
        ),
        text,
    )
    text = re.sub(r"(?<![\w.])[A-Za-z_]\w*\b", lambda n: EVERYWHERE.get(n[0], n[0]), text)
    for old, new in PHRASES:
        text = re.sub(old, new, text)
    return text


def rooms(text: str, mark: str = "") -> str:
    """Rooms by name; `mark` is what stands around a name."""

    def named(m: re.Match) -> str:
        found = re.sub(r"\d\d[a-z]?", lambda n: mark + ROOMS[n[0]] + mark, m[2])
        first = ROOMS[re.search(r"\d\d[a-z]?", m[2])[0]]
        return (
            ("The lesson " if (NBS / "x").parent and first in LESSONS else "The notebook ") + found
            if m[1] == "R"
            else found
        )

    return re.sub(r"\b([Rr])ooms? ((?:\d\d[a-z]?(?:, | and | or )?)*\d\d[a-z]?)\b", named, text)


LESSONS = "start scenes features vae fsq transformer registers flow tokenizer training ar evaluation released".split()
CALLED = {"parts", "draw", "places"}  # only with brackets: other things have the same name
ATTR_TEXT = {}
ALIASES = {}
for _m in NAMES:
    ALIASES[alias(_m)] = _m
    ALIASES[_m.split(".")[-1]] = _m


def main() -> None:
    notebooks = [p for p in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    for path in notebooks:
        book = json.loads(path.read_text(encoding="utf-8"))
        cells = book["cells"]
        module = next(
            (
                c["source"][0].split()[-1]
                for c in cells
                if c["source"] and c["source"][0].startswith("#| default_exp")
            ),
            None,
        )
        whole = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        names = imported(whole) | NAMES.get(module, {})
        local = LOCAL["*"] | LOCAL.get(module, {}) | LOCAL.get(path.stem, {})
        for c in cells:
            s = "".join(c["source"])
            if c["cell_type"] == "code":
                new = rooms(code(s, names, local))
            else:
                new = rooms(words(s, names), "*")
            c["source"] = new.splitlines(keepends=True)
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in [*sorted((ROOT / "tests").glob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]:
        if path.name in ("mini_ea3e120.py",):
            continue
        text = path.read_text(encoding="utf-8")
        new = rooms(code(text, imported(text), LOCAL["*"] | LOCAL.get(path.stem, {})))
        new = re.sub(
            r'(patch\(\s*monkeypatch,\s*|setattr\(\s*)(\w+),(\s*)"(\w+)"',
            lambda m: f'{m[1]}{m[2]},{m[3]}"{NAMES.get(ALIASES.get(m[2], ""), {}).get(m[4], m[4])}"',
            new,
        )
        if new != text:
            ast.parse(new)
            path.write_text(new, encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        path.write_text(rooms(words(path.read_text(encoding="utf-8"), {}), "*"), encoding="utf-8")


if __name__ == "__main__":
    main()
