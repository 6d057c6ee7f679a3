"""Tests, tools, solutions and experiments import from the new modules."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from rewrite import ROOT, imports, objects


def main() -> None:
    for path in [*(ROOT / "tests").glob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "README.md"]:
        if path.name == "mini_ea3e120.py":
            continue

        def say(text):
            return print(f"{path.name}: {text}")

        text = path.read_text(encoding="utf-8")
        new = imports(objects(text, say), say)
        if "patch(monkeypatch" in new and path.name != "planting.py":
            if found := re.search(r"^from planting import (.*)$", new, re.M):
                if "patch" not in found[1]:
                    new = new.replace(found[0], f"from planting import patch, {found[1]}", 1)
            else:
                new = re.sub(
                    r"^(import pytest\n)", r"\1from planting import patch\n", new, count=1, flags=re.M
                )
        if new != text:
            path.write_text(new, encoding="utf-8")
    for path in [*(ROOT / "nbs/solutions").glob("*.ipynb"), *(ROOT / "nbs/experiments").glob("*.ipynb")]:

        def say(text):
            return print(f"{path.name}: {text}")

        book = json.loads(path.read_text(encoding="utf-8"))
        for c in book["cells"]:
            s = "".join(c["source"])
            c["source"] = imports(objects(s, say) if c["cell_type"] == "code" else s, say).splitlines(
                keepends=True
            )
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
