"""The reader that judges pictures of `tiny-text`, trained on scenes half of which are drawn apart.

python tools/train_judge.py FOLDER [STEPS]

Half of its scenes are ordinary, in the other half no attribute tells another, so that it does not take an
unusual picture for a usual one. Prints how it reads both kinds of held-out scenes; fifteen minutes on a core.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from flextok_edu import ToyScenes
from flextok_edu.data.datasets import ImageSet
from flextok_edu.data.features import read_accuracy
from flextok_edu.engine.config import StageConfig
from flextok_edu.engine.tensors import from_uint8
from flextok_edu.evaluation.readers import ReaderConfig, labelled_scenes, train_reader

SCENES, HELD_OUT = 40_000, 2000  # of each half


def both(split: str, count: int, seed: int) -> tuple[ImageSet, ImageSet]:  # ordinary; drawn apart
    scenes = ToyScenes(split, 64, 2, length=count, seed=seed)
    return labelled_scenes(scenes), labelled_scenes(scenes, apart=True)


def main(folder: str, steps: str = "2500") -> None:
    usual, apart = both("train", SCENES, 5)
    images, labels = torch.cat([usual.images, apart.images]), torch.cat([usual.labels, apart.labels])
    data = ImageSet(
        images, labels, usual.classes, f"{usual.source}; and {apart.source}", scenes=True, rule="scenes"
    )
    config = StageConfig(steps=int(steps), batch=64, lr=2e-3, optimizer="muon", ema=0.995)
    reader, log = train_reader(data, ReaderConfig("attention", 96, 3), config, seed=5, every=50)
    reader.save_pretrained(Path(folder))
    for each in both("val", HELD_OUT, 6):
        print(
            each.source,
            {a: round(x, 3) for a, x in read_accuracy(reader, from_uint8(each.images), each.labels).items()},
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
