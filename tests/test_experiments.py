"""The studies in nbs/experiments run: all their code, at `micro`, in a clean process and an empty folder."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STUDIES = sorted((ROOT / "nbs" / "experiments").glob("*.ipynb"))


def test_there_are_studies():
    assert STUDIES


@pytest.mark.parametrize("notebook", STUDIES, ids=lambda f: f.stem)
def test_study(notebook, tmp_path):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert cells[0]["cell_type"] == "raw" and "skip_exec: true" in "".join(cells[0]["source"]), "nbdev_test must not run it at full size"
    title = "".join(cells[1]["source"]).strip().splitlines()
    assert cells[1]["cell_type"] == "markdown" and len(title) == 2 and title[0].startswith("# ") and title[1].startswith("> ")
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    assert not [source for source in code if "#| export" in source] and any(c.get("outputs") for c in cells)
    assert not [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"] and notebook.stat().st_size < 1_500_000
    assert any("FLEXTOK_SIZE" in source for source in code), "a knob for the size"
    (tmp_path / "study.py").write_text("\n\n".join(code), encoding="utf-8")
    result = subprocess.run([sys.executable, "study.py"], capture_output=True, text=True, timeout=300, cwd=tmp_path,
                            env={**os.environ, "FLEXTOK_SIZE": "micro", "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "TQDM_DISABLE": "1"})
    assert result.returncode == 0, (result.stdout[-1500:], result.stderr[-3000:])
