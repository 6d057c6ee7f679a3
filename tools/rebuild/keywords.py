"""Settings that were given by position are given by name; train functions take `trainer=`, `compile=`, `terms=`."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

BY_NAME = {  # function: names of its old positions; those before the first "" stay positional
    "detokenize": "ids,,steps guidance seed noise apg first_index",
    "decode_latents": "ids noise,,steps guidance apg seed first_index",
    "generate": "labels length,,guidance temperature seed first_index top_k top_p seeds",
    "sample_images": "ar tok labels budget,,steps guidance ar_guidance temperature seed first_index top_k top_p seeds",
    "train_vae": "data preset feature_extractor,,seed device flip precision progress trainer vae part",
    "train_tokenizer": "data vae preset,,seed device flip precision compile progress terms trainer",
    "fit_tokenizer": "tok data config part,,seed device flip precision compile progress terms trainer",
    "train_ar": "data tok preset,,seed device precision compile progress trainer ar",
    "train_classifier": "data config,,seed device progress every trainer",
    "fit": "objectives loader steps ema,,precision device label every progress trainer",
}
KEYWORDS = {"use_compiler": "compile", "engine": "trainer"}
TRAIN = {"train_vae", "train_tokenizer", "fit_tokenizer", "train_ar", "train_classifier", "fit"}


def changed(text: str) -> str:
    quiet = "\n".join("#" + s[1:] if s.startswith(("%", "!")) else s for s in text.split("\n"))
    try:
        tree = ast.parse(quiet)
    except SyntaxError:
        return text
    starts = [0]
    for line in text.encode().split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    edits: list[tuple[int, int, str]] = []

    def at(line: int, column: int) -> int:
        return starts[line - 1] + column

    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if name not in BY_NAME or any(isinstance(a, ast.Starred) for a in node.args):
            continue
        if name == "generate" and isinstance(node.func, ast.Name):
            continue
        stay, new = (part.split() for part in BY_NAME[name].split(",,"))
        for value, key in zip(node.args[len(stay) :], new):
            if key == "terms":
                continue
            if (
                key == "steps"
                and isinstance(value, (ast.Name, ast.Attribute))
                and "sampling" in ast.unparse(value)
            ):
                key = "sampling"  # already one object
            edits.append((at(value.lineno, value.col_offset), 0, f"{key}="))
        for k in node.keywords:
            place = at(k.lineno, k.col_offset)
            if name in TRAIN and k.arg in KEYWORDS:
                edits.append((place, len(k.arg), KEYWORDS[k.arg]))
            if name in TRAIN and k.arg == "repa":
                value = at(k.value.lineno, k.value.col_offset)
                end = at(k.value.end_lineno, k.value.end_col_offset)
                edits += [(place, len(k.arg), "terms"), (value, 0, "["), (end, 0, "]")]
    out = text.encode()
    for place, length, new in sorted(set(edits), reverse=True):
        out = out[:place] + new.encode() + out[place + length :]
    return out.decode()


def main() -> None:
    for name in sys.argv[1:]:
        path = Path(name)
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            book = json.loads(text)
            for c in book["cells"]:
                if c["cell_type"] == "code":
                    c["source"] = changed("".join(c["source"])).splitlines(keepends=True)
            new = json.dumps(book, indent=1, ensure_ascii=False) + "\n"
        else:
            new = changed(text)
        if new != text:
            path.write_text(new, encoding="utf-8")
            print(name)


if __name__ == "__main__":
    main()
