"""What each addition to the paper's recipe is worth at `tiny`: one tokenizer a variant, same scenes, same
order, same noise, same number of images.

    python tools/ablate_tiny.py OUT.json
        all variants, one after the other (a quarter of an hour each on one core at 80 GFLOP/s)
    python tools/ablate_tiny.py OUT.json "no norm before FSQ" --steps 100
        one of them, shorter

A finished variant is in the file as soon as it is done, and is not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from flextok_edu.engine.compiler import compiler_works
from flextok_edu.engine.config import preset
from flextok_edu.engine.files import write_text
from flextok_edu.engine.tensors import from_uint8, seed_everything
from flextok_edu.data.scenes import ToyScenes
from flextok_edu.evaluation.metrics import image_scores
from flextok_edu.evaluation.report import versions
from flextok_edu.data.features import AttributeClassifier, read_accuracy
from flextok_edu.tokenizer import FlexTok
from flextok_edu.training import Latents, cache_latents, fit_tokenizer
from flextok_edu.vae import VAE

VARIANTS = {  # name: changes of the tokenizer's configuration; changes of its training
    "as in the preset": ({}, {}),
    "no zero-noise regression": ({"zero_noise": 0.0}, {}),
    "no norm before FSQ": ({"norm_before_fsq": False}, {}),
    "AdamW, 2e-3": ({}, {"optimizer": "adamw", "lr": 2e-3}),
    "powers of two, not half full": ({"budget_distribution": "powers_of_two"}, {}),
}
COUNTS = (1, 4, 8, 32)


@torch.no_grad()
def measure(tok: FlexTok, images: torch.Tensor, labels: torch.Tensor, reader: AttributeClassifier) -> dict:
    """Held-out scenes through 1, 4, 8 and 32 tokens: what is read from them, and the error."""
    e, found = preset("tiny").evaluate, {}
    x = from_uint8(images)
    ids = torch.cat([tok.tokenize(part) for part in x.split(250)])
    for k in COUNTS:
        back = torch.cat(
            [
                tok.detokenize(part[:, :k], steps=e.steps, guidance=e.guidance, seed=0, first_index=250 * i)
                for i, part in enumerate(ids.split(250))
            ]
        )
        found[str(k)] = {
            "mae": float(image_scores(back, x)["mae"].mean()),
            **{name: float(share) for name, share in read_accuracy(reader, back, labels).items()},
        }
    position_words = [len(column.unique()) for column in ids.T]
    return {"tokens": found, "words": sum(position_words) / len(position_words)}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("out", type=Path)
    options.add_argument("variants", nargs="*", default=list(VARIANTS), help=", ".join(VARIANTS))
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--scenes", type=int, default=20_000)
    o = options.parse_args()
    unknown = [name for name in o.variants if name not in VARIANTS]
    if unknown:
        options.error(f"no variant {unknown[0]!r}: choose from {', '.join(VARIANTS)}")
    done = json.loads(o.out.read_text(encoding="utf-8")) if o.out.exists() else {}
    p, vae, reader = preset("tiny"), VAE.from_pretrained("tiny"), AttributeClassifier.from_pretrained("tiny")
    images, _ = ToyScenes("train", p.image_size, p.level, length=o.scenes).render(progress=True)
    latents = Latents(*cache_latents(vae, images))
    held, labels = ToyScenes("val", p.image_size, p.level, length=1000).render(progress=False)
    for name in o.variants:
        how = {"steps": o.steps, "batch": o.batch, "scenes": o.scenes}
        if done.get(name, {}).get("how") == how:
            print(f"{name}: done before")
            continue
        changes, stage = VARIANTS[name]
        seed_everything(0)
        tok = FlexTok(replace(p.tokenizer, **changes), vae)
        config = replace(p.train_tokenizer, steps=o.steps, batch=o.batch, ema=0.99, **stage)
        began = time.process_time()
        tok, log = fit_tokenizer(tok, latents, config, compile=compiler_works(), progress=True)
        seconds = time.process_time() - began
        done[name] = {
            "how": how,
            "seconds": seconds,
            "versions": versions(),
            **measure(tok, held, labels, reader),
            "log": [
                {
                    k: round(v, 5) if isinstance(v, float) else v
                    for k, v in row.items()
                    if k in ("step", "flow", "regression", "regression_full", "codebook_usage")
                }
                for row in log
            ],
        }
        write_text(o.out, json.dumps(done, indent=1))
        print(
            f"{name}: {seconds:.0f} s, "
            + "; ".join(
                f"{k} tokens: " + ", ".join(f"{n} {v:.3f}" for n, v in row.items())
                for k, row in done[name]["tokens"].items()
            )
            + f"; {done[name]['words']:.0f} words a position",
            flush=True,
        )


if __name__ == "__main__":
    main()
