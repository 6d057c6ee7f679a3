"""A stage of FlexTok, small, as a program: for tests that kill it, or start it on two processes.

The last line is json: losses, and a hash of the weights.

python tests/long_run.py STAGE FOLDER|- [key=value …] (FOLDER: with checkpoints; -: without)
"""

import json
import os
import sys
from dataclasses import replace
from functools import partial

import torch

from flextok_edu.ar_training import Tokens, train_ar
from flextok_edu.engine.config import PRESETS, StageConfig, TrunkConfig, VAEConfig
from flextok_edu.engine.files import weights_hash
from flextok_edu.engine.tensors import seed_everything
from flextok_edu.data.datasets import ImageSet
from flextok_edu.tokenizer import FlexTok
from flextok_edu.training import train_tokenizer
from flextok_edu.engine.distributed import Distributed
from flextok_edu.engine.long_run import long_run
from flextok_edu.engine.trainer import Callback, Trainer
from flextok_edu.vae import VAE
from flextok_edu.vae_training import train_vae

TRUNK = dict(width=32, head_dim=16)
SMALL = replace(
    PRESETS["micro"], vae=VAEConfig(latent_channels=4, channels=(16, 16), layers=1, groups=4, attention=False)
)
SMALL = replace(
    SMALL,
    vae_loss=replace(
        SMALL.vae_loss, perceptual=0.0, adversarial=0.1, adversarial_start=0.3, learned_logvar=True
    ),
    ar=replace(SMALL.ar, length=8, width=32, head_dim=16, depth=2),
    tokenizer=replace(
        SMALL.tokenizer,
        registers=8,
        encoder=TrunkConfig(depth=1, **TRUNK),
        decoder=TrunkConfig(depth=2, **TRUNK),
        budget_distribution="powers_of_two",
    ),
)


def stage(name, steps=20, batch=8, optimizer="adamw", trainer=None, precision=None, device="cpu"):
    """Train it on noise: (model, log)."""
    config = StageConfig(steps=steps, batch=batch, lr=3e-3, warmup=3, ema=0.9, optimizer=optimizer)
    p = replace(SMALL, train_vae=config, train_tokenizer=config, train_ar=config)
    g = torch.Generator().manual_seed(0)
    data = ImageSet(
        torch.randint(0, 256, (40, 3, 16, 16), generator=g, dtype=torch.uint8),
        torch.arange(40)[:, None] % 12,
        tuple(map(str, range(12))),
        "noise",
    )
    seed_everything(0)
    if name == "vae":
        return train_vae(data, p, progress=False, trainer=trainer, precision=precision, device=device)
    vae = VAE(p.vae).eval().to(device)
    if name == "tokenizer":
        return train_tokenizer(
            data, vae, p, progress=False, trainer=trainer, precision=precision, device=device
        )
    tokens = Tokens(torch.randint(0, 1000, (40, 8), generator=g), data.labels[:, 0], data.classes)
    return train_ar(
        tokens,
        FlexTok(p.tokenizer, vae).eval().to(device),
        p,
        progress=False,
        trainer=trainer,
        precision=precision,
        device=device,
    )


def own_hash(model):
    return weights_hash(model.own_state() if hasattr(model, "own_state") else model)


def main(name, folder, *options):
    options = {k: json.loads(v) for k, v in (a.split("=", 1) for a in options)}
    plan = {k: options.pop(k) for k in ("steps", "batch", "optimizer") if k in options}
    if "save" in options:
        options["steps"] = options.pop("save")
    torch.set_num_threads(1)

    class Looking(Callback):
        def step(self, training, backend, looked):
            self.optimizers = training.optimizers

    looking = Looking()
    if folder == "-":
        trainer = Trainer(Distributed("cpu", **options), callbacks=[looking])
    else:
        plan_ = {"stage": name} | plan
        trainer = long_run(folder, device="cpu", recipe=plan_, callbacks=[looking], **options)
    model, log = stage(name, trainer=trainer, **plan)
    if trainer.backend.rank == 0:
        dealt = any(
            isinstance(getattr(o, "divided", None), partial)
            for opts in looking.optimizers.values()
            for o in opts
        )  # does Muon share its work?
        print(
            json.dumps({"world": trainer.backend.world, "dealt": dealt, "log": log, "hash": own_hash(model)}),
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
