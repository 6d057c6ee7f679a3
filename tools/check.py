"""Every check of the project, in one command: `make test` (or `python tools/check.py` in an environment with
the extra `dev`).

In step: exporting and cleaning the notebooks changes nothing. No stray module. No undefined name. Every
notebook runs (`nbdev_test`). Every test passes (`pytest`), and pytest's own summary is the last line.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKERS = str(max(1, min(4, os.cpu_count() or 1)))  # processes, one thread each
NBS, LIB = ROOT / "nbs", ROOT / "flextok_edu"
DOORS = ("core.py", "released.py", "pipeline.py")  # written by hand: old names that go on to work
CODE = ["nbs", "flextok_edu", "tests", "tools", "setup.py"]  # what ruff.toml has rules for


def snapshot() -> dict[str, bytes]:
    """The bytes of all notebooks and modules."""
    return {
        str(f.relative_to(ROOT)): f.read_bytes()
        for base in (NBS, LIB)
        for f in sorted(base.rglob("*"))
        if f.suffix in (".ipynb", ".py") and ".ipynb_checkpoints" not in f.parts
    }


def call(*command: str, limit: int = 2700, **env: str) -> None:
    """Run a command in the project's root; stop everything if it fails."""
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, timeout=limit)
    if result.returncode:
        sys.exit(f"FAILED: {' '.join(command)} (exit status {result.returncode})")


def in_step() -> None:
    """The package is the export of the notebooks, and the notebooks are clean."""
    before = snapshot()
    call("nbdev_export")
    call("nbdev_clean")
    after = snapshot()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        sys.exit(
            "FAILED: nbdev_export and nbdev_clean changed these files (now in step; look at them and "
            "commit): " + ", ".join(changed)
        )


def no_stray_module() -> None:
    """Every module names the notebook it comes from, and that notebook exists."""
    for module in sorted(LIB.rglob("*.py")):
        if module.name in ("__init__.py", "_modidx.py") or module.relative_to(LIB).as_posix() in DOORS:
            continue
        lines = module.read_text(encoding="utf-8").splitlines()
        source = next((s.split("../nbs/")[1].split(".ipynb")[0] for s in lines if "../nbs/" in s), None)
        if source is None or not (NBS / f"{source}.ipynb").exists():
            sys.exit(f"FAILED: {module.relative_to(ROOT)} has no notebook (its source: {source})")


def notebooks_run() -> None:
    """All notebooks, one process a core with one thread each (processes with several threads each would
    fight).
    """
    count = len([f for f in NBS.rglob("*.ipynb") if not f.with_name(".notest").exists()])
    if count < 60:
        sys.exit(f"FAILED: only {count} notebooks found in {NBS}")
    call(
        "nbdev_test",
        "--n_workers",
        WORKERS,
        "--timing",
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        TQDM_DISABLE="1",
    )


def main() -> None:
    steps = [
        ("package in step with the notebooks", in_step),
        ("no module without its notebook", no_stray_module),
        ("every notebook opens in Colab", lambda: call(sys.executable, "tools/frame.py", "--check")),
        ("no undefined or unused names", lambda: call("ruff", "check", "--quiet", *CODE)),
        ("formatted", lambda: call("ruff", "format", "--check", "--quiet", *CODE)),
        ("notebooks run", notebooks_run),
    ]
    began = time.time()
    for name, step in steps:
        start = time.time()
        print(f"--- {name} ...", flush=True)
        step()
        print(f"    ok, {time.time() - start:.0f} s", flush=True)
    print("--- tests ...", flush=True)
    # A test takes three minutes at most on two slow cores. One that hangs is named, with the stack of every
    # thread, and gets one more try
    # (once, a whole run in a clean room did not end in 45 minutes, and said nothing of why); a test that
    # fails gets none.
    patience = [
        "--timeout",
        "700",
        "-o",
        "timeout_func_only=true",
        "--reruns",
        "1",
        "--only-rerun",
        "from pytest-timeout",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", WORKERS, "--durations=8", *patience, "tests"],
        cwd=ROOT,
        timeout=4200,
        env={**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )  # tiny models: one thread is as fast, and suffers less beside others
    print(
        f"--- all checks: {time.time() - began:.0f} s" if result.returncode == 0 else "--- tests FAILED",
        file=sys.stderr,
        flush=True,
    )
    sys.exit(result.returncode)


if __name__ == "__main__":
    main()
