"""Links between notebooks, after the move: `[data](01_data.ipynb)` in any folder points to where its subject is now."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / "nbs"
NOW = {
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
    "16_cost": "apps/cost",
    "17_zoo": "apps/explore",
}
SOLVED = {"16_cost": "apps/bench"}  # where the exercises are, if not there


def name(path: str) -> str:  # "08_tokenizer": "tokenizer"
    return re.sub(r"^\d+b?_", "", Path(path).stem)


def new_link(text: str, target: str, here: Path) -> str:
    base = next(
        (f for f in ("experiments", "solutions") if NBS / f in here.parents), ""
    )  # links were made there
    folder, _, old = os.path.normpath(f"{base}/{target}".strip("/")).removesuffix(".ipynb").rpartition("/")
    if (NBS / folder / f"{old}.ipynb").exists() and old not in NOW:
        folder, old = "", f"{folder}/{old}".strip("/")
    goal = (SOLVED.get(old) if folder == "solutions" else None) or NOW.get(old, old)
    path = NBS / folder / f"{goal}.ipynb"
    if not path.exists():
        raise SystemExit(f"{here}: no {path} for [{text}]({target})")
    if text == old:
        text = name(goal)
    return f"[{text}]({os.path.relpath(path, here.parent)})".replace(os.sep, "/")


LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)*(?:nbs/)?(?:solutions/|experiments/)?\w+\.ipynb)\)")


def main() -> None:
    for path in sorted(NBS.rglob("*.ipynb")):
        book = json.loads(path.read_text(encoding="utf-8"))
        for c in book["cells"]:
            if c["cell_type"] == "markdown":
                s = LINK.sub(lambda m: new_link(m[1], m[2], path), "".join(c["source"]))
                c["source"] = s.splitlines(keepends=True)
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    s = readme.read_text(encoding="utf-8")
    s = LINK.sub(lambda m: new_link(m[1], m[2].removeprefix("nbs/"), readme), s)
    readme.write_text(s, encoding="utf-8")


if __name__ == "__main__":
    main()
