"""Rows of flextok_bench for tools/gpu_check.sh, each a process: one that fails or hangs ends alone.

python tools/gpu_bench.py ROWS FOLDER DEVICE SECONDS EACH

ROWS: a file; a line is a name, then the words of flextok_bench. FOLDER gets NAME.json and NAME.log. SECONDS:
for all of them; EACH: for one. The status is 1 if a row failed; one for which no time is left says so.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path


def row(words: list[str], file: Path, device: str) -> None:
    """In a process of its own."""
    from flextok_edu.apps.bench import bench_main

    with open(file.with_suffix(".log"), "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    bench_main([*words, "--device", device, "--out", str(file)])


def main(rows: str, folder: str, device: str, seconds: str, each: str) -> int:
    """How many rows failed."""
    began, failed = time.monotonic(), 0
    import flextok_edu.apps.bench  # noqa: F401  # once, for all: it takes seconds

    # forked before anybody speaks to the GPU
    context = multiprocessing.get_context("fork")
    for name, *words in filter(None, map(str.split, Path(rows).read_text().splitlines())):
        limit = min(float(each), float(seconds) - (time.monotonic() - began))
        if limit < 1:
            print(f"{name}: no time left", flush=True)
            continue
        file, start = Path(folder) / f"{name}.json", time.monotonic()
        process = context.Process(target=row, args=(words, file, device))
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
        ended = "done" if process.exitcode == 0 else f"FAILED ({process.exitcode})"
        failed += process.exitcode != 0
        if file.with_suffix(".log").exists():
            print(*file.with_suffix(".log").read_text().splitlines()[-12:], sep="\n")
        print(f"{name}: {ended} after {time.monotonic() - start:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    sys.exit(min(1, main(*sys.argv[1:])))
