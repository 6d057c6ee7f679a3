"""Measure the shipped `tiny-text`, and write its card: python tools/ship_text.py [--judge FOLDER]

With --judge a reader of tools/train_judge.py takes the place of the one that judges. Prompts and counts are
those of tools/generation_study.py, and 24 usual pairs; the rows of README.md are printed too.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from generation_study import COUNTS, LOOK, counted, measure_model, measure_reconstructions, readers, tokenizer

from flextok_edu import ARModel
from flextok_edu.apps.zoo import halved, rounded
from flextok_edu.apps.zoo_ar import ar_card
from flextok_edu.engine.files import weights_hash, write_text
from flextok_edu.engine.hub import shipped_models
from flextok_edu.engine.models import save_model
from flextok_edu.evaluation.prompts import wanted_attributes
from flextok_edu.evaluation.readers import SceneReader
from flextok_edu.text import read_texts

USUAL = (  # two of each kind
    *("red boat", "white boat", "yellow star", "white star", "green tree", "orange tree", "red house"),
    *("blue house", "pink flower", "purple flower", "orange fish", "blue fish", "red car", "blue car"),
    *("red mushroom", "white mushroom", "purple balloon", "pink balloon", "blue snowman", "red snowman"),
    *("green cactus", "purple cactus", "yellow sun", "orange sun"),
)
ROWS = {  # of the card: prompts of the study
    "usual pairs": "usual",
    "as held-out scenes": "colour",
    "any kind and colour": "any pair",
    "pairs never seen": "held out",
    "with place and light": "light",
    "with a second object": "full",
    "(held-out scenes, reconstructed)": "reconstructed",
}
HEADS = {name: name.replace("_", " ") for name in ("kind", "colour", "main", "place", "light")}
HEADS |= {"main": "kind and colour"} | {f"second_{x}": f"second {x}" for x in ("kind", "colour")}
HEADS["relation"] = "relation"
TEXT = """A text-conditional AR model for the tokenizer of `tiny`: ToyScenes at 64 px, asked in the words of \
their captions ("a red boat on the sea at night, a small yellow star above it"), shorter or longer. 3 M \
parameters, features of the sentence encoder all-MiniLM-L6-v2 (extra `text`). It never saw the words blue \
boat, red flower, pink star, orange mushroom, purple fish, green car (their pictures were left out of its \
training; the tokenizer saw such pictures). It knows no other words than those of ToyScenes. Rare pairs of \
kind and colour succeed less often than usual ones. Of the second object it gets the place, hardly the kind: \
32 tokens of `tiny` do not hold that (last rows). `reader` and `judge` are classifiers that read seven \
attributes of such pictures (64 px, level 2): one to guide a search, and another one, of another build and \
trained on other scenes, to judge it. In half of the judge's training scenes colour, place and light were \
drawn apart, so that it does not take an unusual picture for a usual one. The table: 200 samples a row, \
guidance 2, 5 decoder steps with guidance 2, read by the judge."""


@torch.no_grad()
def usual(ar: ARModel, tok, judge: SceneReader) -> dict:
    texts = [f"{'an' if pair[0] in 'aeiou' else 'a'} {pair}" for pair in (*USUAL * 9,)][:200]
    ids, wanted = ar.generate(read_texts(ar, texts), guidance=2.0), [wanted_attributes(t) for t in texts]
    return {k: counted(judge, tok.detokenize(ids[:, :k], LOOK, seed=0), wanted) for k in COUNTS}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--judge", type=Path)
    given, place = p.parse_args(), shipped_models()["tiny-text"]
    told = json.loads((place / "model.json").read_text(encoding="utf-8"))
    if given.judge:
        judge, after = (SceneReader.from_pretrained(given.judge) for _ in range(2))
        hashed = weights_hash(rounded(after))
        save_model(place / "judge", halved(judge), judge.config, loaded=hashed)
        told["readers"]["judge"] = hashed
    tok, ar, judge = tokenizer(), ARModel.from_pretrained("tiny-text"), readers()["judge"]
    found = measure_model(ar, tok, judge, 200) | {"usual": usual(ar, tok, judge)}
    found["reconstructed"] = measure_reconstructions(tok, judge, 200)["full"]
    rows = []
    for name, prompts in ROWS.items():
        share = {k: {a: x[0] / x[1] for a, x in found[prompts][k].items() if x[1]} for k in COUNTS}
        print(f"| {name} | " + " | ".join(f"{share[k]['main']:.2f}" for k in COUNTS) + " |")
        for k in (1, 4, 32):
            cells = {head: f"{share[k][a]:.2f}" if a in share[k] else "" for a, head in HEADS.items()}
            rows.append({"prompts": name, "tokens": k, **cells})
    told["measured"] = rows
    write_text(place / "model.json", json.dumps(told, indent=1))
    config = asdict(ar.config)
    write_text(place / "README.md", ar_card("tiny-text", told | {"config": config}, TEXT, rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
