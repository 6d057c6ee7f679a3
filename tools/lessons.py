"""What a lesson asks of a reader, counted: cells before the first picture, lines of code, words, minutes.

    python tools/lessons.py                  a table on the screen
    python tools/lessons.py --readme [LOG]   the table of lessons in README.md, written anew; running times
                                             from what tools/kernel.py printed, if its output is given

Minutes: 200 words a minute and 15 lines of code, formatted as they stand, without the exercises.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
BUILT = {
    "00_start": "nothing yet: you play with a trained model, and meet a stand-in without learning",
    "01_scenes": "ToyScenes: procedural pictures with known answers",
    "02_features": "frozen feature extractors for losses and metrics; the attribute classifier",
    "03_vae": "the autoencoder, its four losses, its critic",
    "03b_vae_training": "the loop of stage 0",
    "04_fsq": "finite scalar quantisation",
    "05_transformer": "attention, SwiGLU, adaLN-zero, positions",
    "06_registers": "register tokens, the causal mask, nested dropout",
    "07_flow": "rectified flow, samplers, guidance",
    "08_networks": "the encoder and the flow decoder",
    "08_tokenizer": "FlexTok itself: in thirty plain lines, then as the class of the package",
    "09_short_cuts": "the same pictures for less arithmetic: four equalities",
    "10_objective": "what a tokenizer learns from: the flow loss, zero-noise regression, REPA",
    "11_training": "the loop of stage 1, first in fifteen lines",
    "12_sampling": "from logits to a token: temperature, top-k, top-p",
    "13_ar": "the GPT that writes tokens",
    "13b_ar_training": "pictures as ids, and the loop of stage 2",
    "13c_text": "cross-attention to a text encoder: pictures for sentences",
    "14_evaluation": "quality against token count; metrics, and what each of them misses",
    "14b_baselines": "what flexible tokens cost, beside fixed lengths, a dropped tail and a grid",
    "15_search": "best of n, and a beam over beginnings of lists: judge a picture before it is written",
    "16_budgets": "how many tokens a picture needs: a search that keeps its promise, and a head that guesses",
    "17_released": "released FlexTok and VAE checkpoints, in and out",
}  # lesson: what one builds


@dataclass
class Lesson:
    """Counts of one notebook."""

    name: str
    first_picture: int  # number of the cell with the first computed picture, from 0
    cells: int
    code: int  # lines
    words: int
    pictures: int
    module: str

    @property
    def minutes(self) -> int:
        """To read it, without the exercises."""
        return round(self.words / 200 + self.code / 15)


def is_picture(output: dict) -> bool:
    """Whether a reader sees it as a picture."""
    return bool({"image/png", "image/jpeg"} & output.get("data", {}).keys())


def read(path: Path) -> Lesson:
    """Count a notebook; the frame (badge, setup) and directives are not counted."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = words = pictures = 0
    first, module = len(cells), ""
    for i, cell in enumerate(cells):
        text = "".join(cell["source"])
        if cell["id"] in ("colab-badge", "colab-setup"):
            continue
        if cell["cell_type"] == "markdown":
            words += len(re.sub(r"!\[.*?\]\(.*?\)", "", text.split("## Exercises")[0]).split())
            continue
        if found := re.match(r"#\| default_exp (\S+)", text):
            module = found[1]
        code += sum(bool(line.strip()) and not line.startswith("#|") for line in text.splitlines())
        shown = sum(map(is_picture, cell["outputs"]))
        pictures += shown
        first = min(first, i if shown else len(cells))
    return Lesson(path.stem, first, len(cells), code, words, pictures, module)


def seconds(log: str) -> dict[str, float]:
    """Running times from the output of tools/kernel.py."""
    found = re.findall(r"^nbs/(\w+)\.ipynb\s+\d+ cells\s+([\d.]+) s", log, flags=re.MULTILINE)
    return {name: float(time) for name, time in found}


def table(times: dict[str, float]) -> str:
    """For the README."""
    rows = ["| lesson | you build | module | read | run |", "|---|---|---|---|---|"]
    for lesson in map(read, LESSONS):
        title = re.sub(r"^\d+[a-z]?_", "", lesson.name).replace("_", " ")
        module = f"`{lesson.module}`" if lesson.module else ""
        run = f"{max(1, round(times[lesson.name]))} s" if lesson.name in times else ""
        link = f"[{title}](nbs/{lesson.name}.ipynb)"
        rows.append(f"| {link} | {BUILT[lesson.name]} | {module} | {lesson.minutes} min | {run} |")
    return "\n".join(rows)


def main() -> None:
    if "--readme" not in sys.argv:
        print(f"{'lesson':18} first picture  cells  pictures  code  words  minutes")
        for n in map(read, LESSONS):
            print(
                f"{n.name:18} {n.first_picture:13} {n.cells:6} {n.pictures:9} {n.code:5} {n.words:6} "
                f"{n.minutes:8}"
            )
        return
    logs = [a for a in sys.argv[1:] if a != "--readme"]
    times = seconds(Path(logs[0]).read_text(encoding="utf-8")) if logs else {}
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    pattern = r"LESSONTABLE|\| lesson \| you build \|.*?(?=\n\n)"
    after = re.sub(pattern, lambda _: table(times), before, count=1, flags=re.DOTALL)
    readme.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
