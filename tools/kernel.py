"""Run notebooks in a real Jupyter kernel, cell by cell, as a reader does with "Run All".

    python tools/kernel.py             all notebooks but the studies
    python tools/kernel.py fsq files   the notebooks of this name, with their solutions
    python tools/kernel.py FILE.ipynb  one notebook
    python tools/kernel.py --save fsq  the same, and what the cells put out is written into the notebooks
                                       that ran whole (then: nbdev_clean)

`nbdev_test` needs no kernel, and differs from one: it skips cells with `#| eval: false`, has no event loop
and no messages for widgets, and draws without the inline backend. Printed for each notebook: code cells,
seconds, and whatever a reader would stumble over: errors, text on stderr, cells whose outputs are of another
kind than the committed ones. Exit status 1 if a cell fails or hangs. The client is the blocking one: the
asynchronous client of nbclient now and then sleeps until its time limit.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from jupyter_client.manager import start_new_kernel

ROOT = Path(__file__).resolve().parent.parent
KINDS = (
    "image/png",
    "image/jpeg",
    "application/vnd.jupyter.widget-view+json",
    "text/html",
    "text/markdown",
    "text/latex",
    "text/plain",
)  # of several, a front end shows the first


@dataclass
class Result:
    """What happened in one notebook."""

    cells: int = 0  # code cells that ran
    seconds: float = 0.0  # of these cells, without the start of the kernel
    failed: str = ""  # the error, or that a cell hung; empty if all is well
    stderr: list[str] = field(default_factory=list)  # "cell: text"
    other: list[str] = field(default_factory=list)  # "cell: committed kinds of output -> the kernel's"


def kinds(outputs: list[dict]) -> list[str]:
    """What a reader sees: streams by their name (once), everything else by its richest form; progress bars
    are no output.
    """
    found = []
    for o in outputs:
        if o["output_type"] == "stream":
            found.append(o["name"])
        elif o["output_type"] == "error":
            found.append("error")
        else:
            kind = next((k for k in KINDS if k in o["data"]), "other")
            # a bar of tqdm
            if not (kind.startswith("application/vnd") and "%|" in "".join(o["data"].get("text/plain", ""))):
                found.append(kind)
    return sorted(k for i, k in enumerate(found) if k not in ("stdout", "stderr") or k not in found[:i])


def stored(outputs: list[dict]) -> list[dict]:
    """Outputs as a notebook keeps them: one piece for neighbouring texts, no stderr, and no widgets (their
    state is not kept, so that a reader would see nothing of them).
    """
    kept = []
    for o in outputs:
        if (
            o["output_type"] == "stream"
            and o["name"] == "stdout"
            and kept
            and kept[-1]["output_type"] == "stream"
        ):
            kept[-1]["text"] += o["text"]
        elif o["output_type"] == "stream":
            kept += (
                [{"output_type": "stream", "name": "stdout", "text": o["text"]}]
                if o["name"] == "stdout"
                else []
            )
        elif o["output_type"] in ("display_data", "execute_result") and not any(
            k.startswith("application/vnd.jupyter.widget") for k in o["data"]
        ):
            kept.append(
                {"output_type": o["output_type"], "data": o["data"], "metadata": o["metadata"]}
                | ({"execution_count": None} if o["output_type"] == "execute_result" else {})
            )
    return kept


def run(notebook: Path, limit: float = 300.0, save: bool = False) -> Result:
    """All code cells in a new kernel, in the notebook's folder, up to the first error.

    `limit`: seconds that one cell may take; `save`: keep what they put out, if all ran.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "MPLBACKEND")} | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    }
    whole = json.loads(notebook.read_text(encoding="utf-8"))
    cells = [c for c in whole["cells"] if c["cell_type"] == "code"]
    result, found = Result(), []
    manager, client = start_new_kernel(
        startup_timeout=120,
        cwd=str(notebook.parent),
        env=env,
        extra_arguments=["--HistoryManager.enabled=False", "--log-level=40"],
    )
    try:
        if save:  # figures sharp enough for today's screens
            client.execute_interactive(
                "%config InlineBackend.figure_format = 'retina'",
                timeout=limit,
                output_hook=lambda message: None,
            )
        for i, cell in enumerate(cells):
            outputs, began = [], time.perf_counter()

            def hook(message):
                kind, content = message["header"]["msg_type"], message["content"]
                if kind in ("stream", "display_data", "execute_result", "error"):
                    outputs.append({"output_type": kind, **content})

            try:
                client.execute_interactive(
                    "".join(cell["source"]), allow_stdin=False, timeout=limit, output_hook=hook
                )
            except TimeoutError:
                result.failed = f"cell {i} ran for more than {limit:.0f} s"
            result.cells += 1
            result.seconds += time.perf_counter() - began
            if text := "".join(
                o["text"] for o in outputs if o["output_type"] == "stream" and o["name"] == "stderr"
            ).strip():
                result.stderr.append(f"cell {i}: {text}")
            for o in outputs:
                if o["output_type"] == "error":
                    result.failed = f"cell {i}: {o['ename']}: {o['evalue']}"
            if result.failed:
                break
            before, now = kinds(cell["outputs"]), [k for k in kinds(outputs) if k != "stderr"]
            if before != now:
                result.other.append(
                    f"cell {i}: {', '.join(before) or 'nothing'} -> {', '.join(now) or 'nothing'}"
                )
            found.append(stored(outputs))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    if save and not result.failed:
        for cell, outputs in zip(cells, found):
            cell["outputs"] = outputs
        temporary = notebook.with_name(f".{notebook.name}.new")
        nbformat.write(nbformat.from_dict(whole), temporary)
        temporary.replace(notebook)
    return result


def main() -> None:
    names = [n for n in sys.argv[1:] if n != "--save"]
    files = [Path(n).resolve() for n in names if n.endswith(".ipynb")]
    names = [n for n in names if not n.endswith(".ipynb")]
    if names or not files:
        found = [f for f in sorted((ROOT / "nbs").rglob("*.ipynb")) if "experiments" not in f.parts]
        files += [f for f in found if not names or {f.stem, f.stem.lstrip("0123456789_")} & {*names}]
    if not files:
        sys.exit(f"no notebook is called {' or '.join(names)}")
    bad = 0
    for f in files:
        result = run(f, save="--save" in sys.argv)
        bad += bool(result.failed)
        print(
            f"{f.relative_to(ROOT) if f.is_relative_to(ROOT) else f!s:32} {result.cells:3} cells "
            f"{result.seconds:6.1f} s  {result.failed or 'ok'}",
            flush=True,
        )
        for line in [f"stderr, {s[:400]}" for s in result.stderr] + [f"outputs, {s}" for s in result.other]:
            print("    " + line.replace("\n", "\n    "), flush=True)
    if bad:
        sys.exit(f"{bad} of {len(files)} notebooks failed")
    print(f"all {len(files)} notebooks ran in a real kernel")


if __name__ == "__main__":
    main()
