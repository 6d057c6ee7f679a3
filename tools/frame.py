"""Every notebook opens in Colab, and installs the package where it is missing.

Puts the badge and the setup cell below the title.

python tools/frame.py           write them where they are missing or old
python tools/frame.py --check   exit status 1 if any notebook lacks them
"""

from __future__ import annotations

import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ConfigParser(delimiters=["="])
CONFIG.read(ROOT / "settings.ini", encoding="utf-8")
REPO = CONFIG["DEFAULT"]["git_url"].removeprefix("https://github.com/")
BRANCH = CONFIG["DEFAULT"]["branch"]

BADGE = "[![open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{repo}/blob/{branch}/{path})"
SETUP = """#| hide
# Where the package is missing (Colab, a bare Jupyter): install it, from a clone around this notebook if any
import importlib.util, pathlib, subprocess, sys

if importlib.util.find_spec("flextok_edu") is None:
    around = (pathlib.Path.cwd(), *pathlib.Path.cwd().parents)
    clone = next((str(p) for p in around if (p / "settings.ini").exists()), None)
    hub = "flextok_edu[{extras}] @ git+https://github.com/{repo}"
    what = ["-e", f"{{clone}}[{extras}]"] if clone else [hub]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *what], check=True)"""

NEEDS_TEXT = ("13c_text",)  # lessons, and their solutions, that need more extras than all do


def frame(path: Path) -> bool:
    """Put both cells into a notebook. Returns whether it changed."""
    notebook = nbformat.read(path, 4)
    before = nbformat.writes(notebook)
    extras = "metrics,text" if path.stem in NEEDS_TEXT else "metrics"
    cells = [c for c in notebook.cells if not c.id.endswith(("-badge", "-setup"))]
    at = 1 + next(i for i, c in enumerate(cells) if c.cell_type == "markdown")
    badge = nbformat.v4.new_markdown_cell(
        BADGE.format(repo=REPO, branch=BRANCH, path=path.relative_to(ROOT).as_posix()), id="colab-badge"
    )
    setup = nbformat.v4.new_code_cell(SETUP.format(repo=REPO, extras=extras), id="colab-setup", metadata={})
    notebook.cells = cells[:at] + [badge, setup] + cells[at:]
    after = nbformat.writes(notebook)
    if after != before and "--check" not in sys.argv:
        nbformat.write(notebook, path)
    return after != before


def main() -> None:
    changed = [
        str(p.relative_to(ROOT))
        for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
        if ".ipynb_checkpoints" not in p.parts and frame(p)
    ]
    if "--check" in sys.argv and changed:
        sys.exit(
            "these notebooks lack the badge or the setup cell (run python tools/frame.py): "
            + ", ".join(changed)
        )
    print("changed:", ", ".join(changed) or "nothing")


if __name__ == "__main__":
    main()
