"""Notebooks in a real Jupyter kernel, as a reader runs them (`nbdev_test` uses none).

The two shortest rooms here; `python tools/kernel.py` runs all.
"""

import importlib.util
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("flextok_kernel_tool", ROOT / "tools" / "kernel.py")
kernel = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = kernel  # its dataclass looks itself up
_spec.loader.exec_module(kernel)


@pytest.mark.parametrize("room", ["04_fsq", "05_transformer"])
def test_room(room):
    result = kernel.run(ROOT / "nbs" / f"{room}.ipynb", limit=120)
    assert not result.failed and not result.stderr and not result.other, result
    assert result.cells > 30


def notebook(path, *cells):
    """A notebook of code cells, with nothing committed."""
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells]), path)
    return path


def test_what_only_a_kernel_does(tmp_path):
    """Skipped by nbdev_test, or an error there: cells that are not evaluated, tasks, the kernel itself.

    A widget has its messages, and a picture is drawn inline.
    """
    result = kernel.run(
        notebook(
            tmp_path / "a.ipynb",
            "#| eval: false\nran = True",
            "assert ran",
            "import asyncio; task = asyncio.create_task(asyncio.sleep(0))",
            "import ipywidgets; s = ipywidgets.IntSlider(3); seen = []; s.observe(seen.append, 'value'); "
            "s.value = 7; assert len(seen) == 1 and s.comm.kernel is not None\ns",
            "import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()",
            "import os, flextok_edu; assert 'IN_TEST' not in os.environ; get_ipython().kernel",
        )
    )
    assert not result.failed and result.cells == 6 and not result.stderr, result
    assert result.other == [
        "cell 3: nothing -> application/vnd.jupyter.widget-view+json",
        "cell 4: nothing -> image/png",
        "cell 5: nothing -> text/plain",
    ]


def test_faults_are_seen(tmp_path):
    """An error ends the run, text on stderr is reported, a cell that hangs is given up, and so is one that
    waits for an answer.
    """
    result = kernel.run(
        notebook(tmp_path / "a.ipynb", "import sys; print('careful', file=sys.stderr)", "1 / 0", "2")
    )
    assert (
        result.cells == 2
        and result.failed.startswith("cell 1: ZeroDivisionError")
        and result.stderr == ["cell 0: careful"]
    )
    assert (
        kernel.run(notebook(tmp_path / "b.ipynb", "import time; time.sleep(60)"), limit=1).failed
        == "cell 0 ran for more than 1 s"
    )
    assert (
        "StdinNotImplementedError" in kernel.run(notebook(tmp_path / "c.ipynb", "input('your name?')")).failed
    )
