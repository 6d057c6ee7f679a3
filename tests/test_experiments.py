"""The studies in nbs/experiments and the solutions in nbs/solutions run: all their code, at `micro`, in a
clean process and an empty folder.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STUDIES = sorted((ROOT / "nbs" / "experiments").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "nbs" / "solutions").rglob("*.ipynb"))


def source(cell):
    return "".join(cell["source"])


def read(notebook):
    """The cells, looked at: a title alone, committed outputs, no error, nothing exported, not too large."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    if cells[0]["cell_type"] == "raw":
        assert "skip_exec: true" in source(cells.pop(0))
    title = source(cells[0]).strip().splitlines()
    assert (
        cells[0]["cell_type"] == "markdown"
        and len(title) == 2
        and title[0].startswith("# ")
        and title[1].startswith("> ")
    )
    code = [c for c in cells if c["cell_type"] == "code"]
    assert not [c for c in code if "#| export" in source(c)] and any(c["outputs"] for c in code)
    assert (
        not [o for c in code for o in c["outputs"] if o["output_type"] == "error"]
        and notebook.stat().st_size < 1_500_000
    )
    return cells


def run(notebook, cells, folder, limit):
    """All code of a notebook as a program."""
    (folder / "program.py").write_text(
        "\n\n".join(source(c) for c in cells if c["cell_type"] == "code"), encoding="utf-8"
    )
    result = subprocess.run(
        [sys.executable, "program.py"],
        capture_output=True,
        text=True,
        timeout=limit,
        cwd=folder,
        env={
            **os.environ,
            "FLEXTOK_SIZE": "micro",
            "IN_TEST": "1",
            "PYTHONPATH": str(ROOT),
            "MPLBACKEND": "Agg",
            "TQDM_DISABLE": "1",
        },
    )
    assert result.returncode == 0, (notebook.name, result.stdout[-1500:], result.stderr[-3000:])


def test_there_are_studies_and_solutions():
    assert STUDIES


@pytest.mark.parametrize("notebook", STUDIES, ids=lambda f: f.stem)
def test_study(notebook, tmp_path):
    cells = read(notebook)
    assert '"raw"' in notebook.read_text(encoding="utf-8")[:200], (
        "nbdev_test must not run it at full size: skip_exec"
    )
    code = "".join(source(c) for c in cells if c["cell_type"] == "code")
    assert "FLEXTOK_SIZE" in code or ".json" in code, "a knob for the size; or it draws what a tool measured"
    run(notebook, cells, tmp_path, 900)


@pytest.mark.parametrize(
    "notebook", SOLUTIONS, ids=lambda f: f.relative_to(ROOT / "nbs/solutions").as_posix()
)
def test_solutions(notebook, tmp_path):
    room = ROOT / "nbs" / notebook.relative_to(ROOT / "nbs" / "solutions")
    assert room.exists() and "Exercises" in room.read_text(encoding="utf-8")
    run(notebook, read(notebook), tmp_path, 600)
