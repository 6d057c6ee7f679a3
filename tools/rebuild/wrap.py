"""Long messages, comments and docstrings in lines of 110 characters; no name and no value changes.

A comment that does not fit beside its code stands above it; a message is written as adjacent literals.
"""

from __future__ import annotations

import ast
import io
import json
import re
import sys
import textwrap
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST = 110
FIRST = "--first" in sys.argv  # parameters before comments; `ruff format` comes between


def tokens_of(text: str):
    return list(tokenize.generate_tokens(io.StringIO(text).readline))


def last_parameter(text: str) -> str:
    """`x=1):  # about x` as a parameter on a line of its own, with its comment."""
    lines = text.split("\n")
    try:
        tokens = tokens_of(text)
    except (tokenize.TokenError, IndentationError):
        return text
    heads = {t.start[0] for t in tokens if t.type == tokenize.NAME and t.string == "def"}
    for i in range(len(lines) - 1, 0, -1):
        found = re.fullmatch(r"(\s*)\):(\s*)(# .*)", lines[i])
        if not found:
            continue
        j = i - 1
        while j >= 0 and not lines[j].strip():
            j -= 1
        if not any(h - 1 < i for h in heads) or not re.match(r"\s*(async )?def |\s*class ", opener(lines, i)):
            continue
        body = lines[j]
        if "#" in body or not body.strip():
            continue
        lines[j] = body.rstrip().rstrip(",") + f",  {found[3]}"
        lines[i] = f"{found[1]}):"
    return "\n".join(lines)


def opener(
    lines: list[str], i: int
) -> str:  # the line with less indentation's twin: where this bracket was opened
    indent = len(lines[i]) - len(lines[i].lstrip())
    for j in range(i - 1, -1, -1):
        s = lines[j]
        if s.strip() and len(s) - len(s.lstrip()) == indent and s.rstrip().endswith("("):
            return s
        if s.strip() and len(s) - len(s.lstrip()) < indent:
            return ""
    return ""


def comment_lines(comment: str, indent: int) -> list[str]:
    return textwrap.wrap(
        comment.lstrip("# ").rstrip(),
        MOST,
        initial_indent=" " * indent + "# ",
        subsequent_indent=" " * indent + "# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def move_comments(text: str) -> str:
    while True:
        lines = text.split("\n")
        tokens = tokens_of(text)
        for t in tokens:
            if t.type != tokenize.COMMENT or t.string.startswith(("#|", "# fmt", "# noqa", "# MAGIC", "#!")):
                continue
            row = t.start[0] - 1
            line = lines[row]
            head = line[: t.start[1]].rstrip()
            cut = bool(re.match(r"\s*\| ", head))  # an annotation that was broken because of its comment
            if len(line) <= MOST and not cut:
                continue
            if not head.strip():
                new = comment_lines(t.string, len(line) - len(line.lstrip()))
                if new == [line]:
                    continue
                lines[row : row + 1] = new
            elif head.lstrip().startswith((")", "]", "}")):
                if head.endswith(":"):
                    body = next((s for s in lines[row + 1 :] if s.strip()), "")
                    lines[row] = head
                    lines[row + 1 : row + 1] = comment_lines(t.string, len(body) - len(body.lstrip()))
                else:  # behind a closing bracket: above the line that opened it
                    j = matching(tokens, t, row)
                    lines[row] = head
                    lines[j:j] = comment_lines(t.string, len(lines[j]) - len(lines[j].lstrip()))
            else:
                j = row
                while re.match(r"\s*(\||and |or |if |else |for )", lines[j]) and inside(tokens, j):
                    j -= 1
                if cut and len(re.sub(r"\s+", " ", " ".join(lines[j : row + 1]).strip())) <= MOST - 10:
                    joined = " ".join(s.strip() for s in lines[j:row]) + " " + head.strip()
                    indent = len(lines[j]) - len(lines[j].lstrip())
                    if len(joined) + indent + 2 + len(t.string) <= MOST:
                        lines[j : row + 1] = [" " * indent + joined + "  " + t.string]
                        break
                indent = len(lines[j]) - len(lines[j].lstrip())
                lines[row] = head
                lines[j:j] = comment_lines(t.string, indent)
            break
        else:
            return text
        text = "\n".join(lines)


def inside(tokens, row: int) -> bool:  # whether this line begins inside brackets
    depth = 0
    for t in tokens:
        if t.start[0] - 1 >= row:
            return depth > 0
        if t.type == tokenize.OP:
            depth += (t.string in "([{") - (t.string in ")]}")
    return False


def matching(tokens, comment, row: int) -> int:  # line of the bracket that is closed first on this line
    stack = []
    for t in tokens:
        if t.type == tokenize.OP and t.string in "([{":
            stack.append(t.start[0] - 1)
        elif t.type == tokenize.OP and t.string in ")]}":
            opened = stack.pop()
            if t.start[0] - 1 == row:
                return opened
    return row


def docstrings(text: str) -> str:
    lines = text.split("\n")
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            d = node.body[0]
            if (
                isinstance(d, ast.Expr)
                and isinstance(d.value, ast.Constant)
                and isinstance(d.value.value, str)
            ):
                if isinstance(node, ast.Module) and len(node.body) == 1:
                    continue
                if any(len(lines[r]) > MOST for r in range(d.lineno - 1, d.end_lineno)):
                    found.append(d)
        if isinstance(node, ast.ClassDef):  # what stands below a field
            found += [
                d
                for d in node.body[1:]
                if isinstance(d, ast.Expr)
                and isinstance(d.value, ast.Constant)
                and isinstance(d.value.value, str)
                and any(len(lines[r]) > MOST for r in range(d.lineno - 1, d.end_lineno))
            ]
    for d in sorted({d.lineno: d for d in found}.values(), key=lambda d: -d.lineno):
        indent = " " * d.col_offset
        raw = "\\" in "".join(lines[d.lineno - 1 : d.end_lineno])
        content = d.value.value
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", content)]
        first, _, rest = paragraphs[0].partition(". ")
        if rest and len(first) + len(indent) + 8 < MOST:
            paragraphs[0:1] = [first + ".", rest]
        wrapped = [
            "\n".join(
                textwrap.wrap(
                    p,
                    MOST,
                    initial_indent=indent,
                    subsequent_indent=indent,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
            for p in paragraphs
        ]
        if len(indent) + 3 + len(paragraphs[0]) > MOST:  # the quotes take room too
            wrapped[0] = "\n".join(
                textwrap.wrap(
                    paragraphs[0],
                    MOST,
                    initial_indent=indent + "   ",
                    subsequent_indent=indent,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
        body = "\n\n".join(wrapped).lstrip()
        more = "\n" in body
        new = indent + ("r" if raw else "") + '"""' + body + ("\n" + indent if more else "") + '"""'
        lines[d.lineno - 1 : d.end_lineno] = new.split("\n")
    return "\n".join(lines)


def split_string(token: str, room: int, first: int) -> list[str]:
    """A one-line literal as several, cut behind spaces outside of braces."""
    prefix = re.match(r"\w*", token)[0]
    quote = token[len(prefix)]
    if token[len(prefix) :].startswith(quote * 3):
        return [token]
    content, is_f = token[len(prefix) + 1 : -1], "f" in prefix.lower()
    pieces, now, depth, i, last = [], "", 0, 0, 0
    words = []
    while i < len(content):
        c = content[i]
        if c == "\\" and "r" not in prefix.lower():
            if content[i + 1] == "N" and content[i + 2] == "{":
                end = content.index("}", i) + 1
            else:
                end = i + 2
            now += content[i:end]
            i = end
            continue
        if is_f and content[i : i + 2] in ("{{", "}}") and depth == 0:
            now += content[i : i + 2]
            i += 2
            continue
        depth += is_f and ((c == "{") - (c == "}"))
        now += c
        if c == " " and depth == 0:
            words.append(now)
            now = ""
        i += 1
    words.append(now)
    line, space = "", first
    for w in words:
        if line and len(line) + len(w) + len(prefix) + 2 > space:
            pieces.append(line)
            line, space = "", room
        line += w
    pieces.append(line)
    plain = prefix.lower().replace("f", "")
    return [
        (prefix if not is_f or re.search(r"[{}]", p) else plain) + quote + p + quote
        for p in pieces
        if p or len(pieces) == 1
    ]


def split_strings(text: str) -> str:
    for _ in range(2000):
        lines, tokens = text.split("\n"), tokens_of(text)
        docs = {
            (n.lineno, n.col_offset)
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Expr) and isinstance(n := node.value, ast.Constant)
        }
        done = True
        depth = 0
        for i, t in enumerate(tokens):
            if t.type == tokenize.OP:
                depth += (t.string in "([{") - (t.string in ")]}")
            if (
                t.type != tokenize.STRING
                or t.start[0] != t.end[0]
                or t.start in docs
                or len(lines[t.start[0] - 1]) <= MOST
            ):
                continue
            line = lines[t.start[0] - 1]
            if len(t.string) < 30 or " " not in t.string:
                continue
            indent = len(line) - len(line.lstrip())
            alone = line[: t.start[1]].strip() == ""
            column = t.start[1] if alone else indent + 4
            pieces = split_string(
                t.string, MOST - column - 2, MOST - (t.start[1] if alone or depth else column) - 2
            )
            if len(pieces) < 2:
                pieces = split_string(t.string, MOST - column - 2, MOST - column - 2)
            if len(pieces) < 2:
                continue
            gap = "\n" + " " * column
            new = gap.join(pieces)
            if not depth:
                new = "(" + gap + new + "\n" + " " * indent + ")"
            lines[t.start[0] - 1] = line[: t.start[1]] + new + line[t.end[1] :]
            done = False
            break
        text = "\n".join(lines)
        if done:
            return text
    return text


def unwrapped(text: str) -> str:
    """A value that stands in brackets only because of its comment."""
    pattern = r"^([ \t]*)(\S[^\n]* = )\(\n((?:[ \t]*# [^\n]*\n)+)[ \t]*([^\n#]+)\n\1\)$"

    def new(m: re.Match) -> str:
        if len(m[1] + m[2] + m[4]) > MOST or re.search(r"\bfor\b|,$", m[4]):
            return m[0]
        comment = " ".join(s.strip().lstrip("# ") for s in m[3].splitlines())
        return "\n".join(comment_lines("# " + comment, len(m[1]))) + f"\n{m[1]}{m[2]}{m[4]}"

    return re.sub(pattern, new, text, flags=re.M)


def wrapped(text: str) -> str:
    quiet = "\n".join("# MAGIC " + s if s.lstrip().startswith(("%", "!")) else s for s in text.split("\n"))
    if "# fmt: off" in quiet or "# Where the package is missing" in quiet:
        return text
    try:
        ast.parse(quiet)
    except SyntaxError:
        return text
    if FIRST:
        return last_parameter(text)
    out = unwrapped(move_comments(quiet))
    out = docstrings(out)
    out = split_strings(out)
    return "\n".join(s.replace("# MAGIC ", "", 1) if s.startswith("# MAGIC ") else s for s in out.split("\n"))


def main() -> None:
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        book = json.loads(path.read_text(encoding="utf-8"))
        for c in book["cells"]:
            if c["cell_type"] == "code":
                s = "".join(c["source"])
                try:
                    c["source"] = wrapped(s).splitlines(keepends=True)
                except Exception as error:
                    print(path, c["id"], repr(error))
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for folder in ("tests", "tools"):
        for path in sorted((ROOT / folder).glob("*.py")):
            text = path.read_text(encoding="utf-8")
            try:
                new = wrapped(text)
            except Exception as error:
                print(path, repr(error))
                continue
            if new != text:
                path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
