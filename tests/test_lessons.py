"""The shape of a lesson: a drawing at its head, a picture early, exercises with asserts, plain words."""

import base64
import json
import re
import struct
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
LESSONS = sorted(NBS.glob("[0-9]*.ipynb"))
FRAME = ("colab-badge", "colab-setup")


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def text(cell: dict) -> str:
    return "".join(cell["source"])


def pictures(cell: dict) -> list[dict]:
    """Outputs of a cell that a reader sees as pictures."""
    return [o for o in cell.get("outputs", ()) if {"image/png", "image/jpeg"} & o.get("data", {}).keys()]


def squeezed(code: str) -> str:
    """Code without what a formatter may change: spaces, line ends, brackets' last commas."""
    return re.sub(r",(?=[)\]}])", "", re.sub(r"\s", "", code)).replace("(", "").replace(")", "")


@pytest.mark.parametrize("notebook", LESSONS, ids=lambda f: f.stem)
def test_drawing_and_picture_come_early(notebook):
    """A diagram among the first cells (that of *start* comes after the play), and a computed picture by the
    twentieth.
    """
    seen = [c for c in cells(notebook) if c["id"] not in FRAME]
    head = seen if notebook.stem == "00_start" else seen[:4]
    drawings = [re.findall(r"\]\(\.\./(docs/diagrams/\w+\.svg)\)", text(c)) for c in head]
    drawings = [name for found in drawings for name in found]
    assert drawings, "no diagram at the head"
    assert all((ROOT / name).exists() for name in drawings)
    assert any(pictures(c) for c in seen[:20]), "no picture in the first twenty cells"


@pytest.mark.parametrize("notebook", LESSONS, ids=lambda f: f.stem)
def test_exercises_have_asserts_and_solutions(notebook):
    """What must pass is given in the lesson, and the solution runs exactly that."""
    prose = "\n".join(text(c) for c in cells(notebook) if c["cell_type"] == "markdown")
    given = re.findall(r"Write it yourself.*?```python\n(.*?)```", prose, flags=re.DOTALL)
    assert given, "nothing to write"
    solution = NBS / "solutions" / notebook.name
    solved = [c for c in cells(solution) if c["cell_type"] == "code"]
    for block in given:
        lines = [line for line in block.splitlines() if line.strip()]
        assert any(line.startswith("assert") for line in lines)
        assert any(squeezed(block) in squeezed(text(c)) for c in solved), (
            f"{solution.name} does not run this:\n{block}"
        )


@pytest.mark.parametrize("notebook", LESSONS, ids=lambda f: f.stem)
def test_figures_are_wide_enough(notebook):
    """620 pixels on the page at least: labels can be read."""
    narrow = []
    for c in cells(notebook):
        for output in pictures(c):
            if "image/png" not in output["data"]:
                continue
            shown = output.get("metadata", {}).get("image/png", {}).get("width")
            size = struct.unpack(">II", base64.b64decode(output["data"]["image/png"])[16:24])
            if (shown or size[0]) < 620:
                narrow.append((c["id"], shown or size[0]))
    assert not narrow


@pytest.mark.parametrize("notebook", LESSONS, ids=lambda f: f.stem)
def test_words(notebook):
    """Lessons are lessons, and tensors are no persons."""
    prose = "\n".join(text(c) for c in cells(notebook) if c["cell_type"] == "markdown")
    found = re.findall(r"[^.\n]*\b(?:rooms?|[Ww]hoever|who does not belong)\b[^.\n]*", prose)
    assert not found, found


@pytest.mark.parametrize("notebook", sorted(NBS.rglob("*.ipynb")), ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_no_placeholders(notebook):
    """A text cell says something: no cell of one word in capitals was left for later."""
    left = [c["id"] for c in cells(notebook) if re.fullmatch(r"[A-Z0-9_]+", text(c).strip())]
    assert not left
