"""Train the shipped model `mini` (128 px, all stages) on one GPU within a given time, with the package as of commit ea3e120.

usage: OUT=folder python mini.py cuda|cpu SECONDS [VAE_SECONDS AR_SECONDS]     PYTHONPATH: the package of that commit

The tokenizer gets what the others leave of SECONDS. What it leaves in $OUT: weights_N.safetensors (names begin with
vae. tok. ar. classifier.; parameters in float16, buffers as they are), logs.json (preset, facts and thinned log of each
stage, effect of the rounding), table.json, reconstructions.png, samples.png. Weights and logs are whole after every stage.

What differs from `flextok_run --device cuda` of that commit: every trained part is rounded to float16 at once, so that
the next stage learns from the weights that are shipped; noise of training is drawn on the GPU (not named by seed and
index); the VAE's encoder and decoder may be compiled; step counts follow from seconds.
"""
import hashlib
import json
import mmap
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

T0 = time.perf_counter()
CHOICE = Path("/tmp/mini_choice.json")  # what an earlier, short run on this machine found to be faster
SIZE, LEVEL = 128, 2
GPU = __name__ == "__main__" and sys.argv[1] == "cuda"
SHORT = GPU and float(sys.argv[2]) < 300  # a try: what is faster, does all of it run
COUNTS = {"train": 100_000, "val": 5000, "other": 5000}
if SHORT or not GPU:
    COUNTS = {"train": 20_000, "val": 1000, "other": 1000} if GPU else {"train": 300, "val": 64, "other": 64}
WORKERS = 15 if GPU else 2
PARTS = {"train": ("train", 0), "val": ("val", 0), "other": ("val", 1)}  # split and seed of the scenes


def note(*a):
    print(f"[{time.perf_counter() - T0:6.1f}]", *a, flush=True)


def left() -> float:
    return float(sys.argv[2]) - (time.perf_counter() - T0)


# scenes are drawn by other processes into memory that they share with this one
SHARED = {name: (mmap.mmap(-1, n * 3 * SIZE ** 2), mmap.mmap(-1, n * 4 * 8)) for name, n in COUNTS.items()}


def pixels(name: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = SHARED[name]
    return np.frombuffer(images, np.uint8).reshape(-1, 3, SIZE, SIZE), np.frombuffer(labels, np.int64).reshape(-1, 4)


def draw_part(name: str, start: int, count: int) -> None:
    from flextok_edu.data import ToyScenes
    split, seed = PARTS[name]
    images, labels = ToyScenes(split, SIZE, LEVEL, seed, start + count).render(start, count)
    all_images, all_labels = pixels(name)
    all_images[start:start + count], all_labels[start:start + count] = images.numpy(), labels.numpy()


def hash_of(name: str) -> str:  # as ImageSet.hash
    images, labels = pixels(name)
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(images)
    digest.update(labels)
    return digest.hexdigest()[:16]


def slim_lite0():
    """EfficientNet-Lite0 up to the block where our eyes are cut: the rest of its weights need not travel."""
    from efficientnet_lite_pytorch import EfficientNet
    from safetensors.torch import load_file
    net = EfficientNet.from_name("efficientnet-lite0")
    found = net.load_state_dict(load_file(Path(__file__).with_name("lite0_block10.safetensors")), strict=False)
    late = [k for k in found.missing_keys if not (k.startswith("_blocks.") and int(k.split(".")[1]) > 10)]
    assert not found.unexpected_keys and {k.split(".")[0] for k in late} <= {"_conv_head", "_bn1", "_fc"}, found
    return net


class Enough(Exception):
    pass


def main() -> None:
    out = Path(os.environ.get("OUT", "mini_out"))
    out.mkdir(exist_ok=True, parents=True)
    dev, half = torch.device(sys.argv[1]), torch.bfloat16 if GPU else None
    vae_seconds, ar_seconds = map(float, sys.argv[3:5]) if len(sys.argv) > 4 else (110., 45.)
    pool, began = ProcessPoolExecutor(WORKERS), time.perf_counter()  # before CUDA: the processes are forked
    few = min(4096, COUNTS["train"])
    jobs = {name: [] for name in ("few", "val", "other", "train")}
    for name, first, last in (("few", 0, few), ("val", 0, COUNTS["val"]), ("other", 0, COUNTS["other"]),
                              ("train", few, COUNTS["train"])):
        step = 256 if GPU else 64
        source = "train" if name == "few" else name
        jobs[name] = [pool.submit(draw_part, source, s, min(step, last - s)) for s in range(first, last, step)]

    import flextok_edu.ar as A
    import flextok_edu.core as C
    import flextok_edu.evaluate as E
    import flextok_edu.features as F
    import flextok_edu.tokenizer as TK
    import flextok_edu.vae as V
    from flextok_edu.core import (ARConfig, Engine, EvalConfig, Preset, StageConfig, TokenizerConfig, TrunkConfig,
                                  VAEConfig, VAELossConfig, from_uint8, grid, weights_hash)
    from flextok_edu.data import KINDS, ImageSet
    from flextok_edu.zoo import _thin, halved, rounding

    F._lite0 = slim_lite0
    named_noise = C.noise_like
    named_forwards = V.VAEEncoder.forward, V.VAEDecoder.forward
    if GPU:  # noise of training is drawn where it is used
        def noise_here(shape, seed, indices, device=None, stream="latents"):
            return torch.randn(len(indices), *shape, device=dev)
        V.noise_like = TK.noise_like = noise_here

    def exactly(on):  # float32 products as on a CPU, or the faster TF32
        torch.set_float32_matmul_precision("highest" if on else "high")
        torch.backends.cudnn.allow_tf32 = not on
    exactly(False)
    compiles = GPU or os.environ.get("MINI_COMPILE") == "1"
    torch._dynamo.config.recompile_limit = 64
    choice = json.loads(CHOICE.read_text()) if CHOICE.exists() else {}

    def stage(steps, batch, cpu_batch, lr, **options):
        return StageConfig(steps, batch if GPU else cpu_batch, lr, **options)

    P = Preset(
        "mini", SIZE, level=LEVEL, train_images=COUNTS["train"],
        vae=VAEConfig(latent_channels=4, channels=(48, 96, 192), layers=1, stem=2, groups=8),
        tokenizer=TokenizerConfig(4, 16, 64, (7, 5, 5, 5, 5), TrunkConfig(192, 6, 2), TrunkConfig(192, 8, 2),
                                  dropout_law="half_full", zero_noise=.5, norm_before_fsq=True),
        ar=ARConfig(vocabulary=4375, length=64, classes=12, width=192, depth=6),
        vae_loss=VAELossConfig(perceptual=.1, adversarial=.02, adversarial_start=.7),
        train_vae=stage(1000, 128, 4, 3e-3, optimizer="muon", ema=.998),
        train_classifier=stage(1500 if GPU else 20, 64, 8, 2e-3, ema=.995),
        train_tokenizer=stage(1000, 1024, 8, 3e-3, optimizer="muon", warmup=100, ema=.998),
        train_ar=stage(1000, 512, 8, 2e-3, optimizer="muon", weight_decay=.05, ema=.998),
        evaluate=EvalConfig(images=COUNTS["val"], samples=1000 if GPU else 24, steps=5, guidance=2., ar_guidance=2.))
    if SHORT:
        P = replace(P, train_classifier=replace(P.train_classifier, steps=200), evaluate=replace(P.evaluate, samples=240))

    class Clock(Engine):  # times a few steps of a training, after some that do not count
        def __init__(self, warm=4, steps=12):
            super().__init__(dev, half)
            self.warm, self.last = (warm, warm + steps) if GPU else (1, 3)

        def end(self, step, log):
            if step in (self.warm, self.last):
                if GPU:
                    torch.cuda.synchronize()
                now = time.perf_counter()
                if step == self.last:
                    self.seconds = (now - self.began) / (self.last - self.warm)
                    raise Enough
                self.began = now

    def pace(what, train):  # seconds a step
        began, clock = time.perf_counter(), Clock()
        try:
            train(clock)
        except Enough:
            pass
        note(f"pace of {what}: {clock.seconds * 1e3:.1f} ms a step ({time.perf_counter() - began:.1f} s to find out)")
        return clock.seconds

    def endless(p, name, **options):
        return replace(p, **{f"train_{name}": replace(getattr(p, f"train_{name}"), steps=10**6, **options)})

    def with_steps(p, name, steps):
        return replace(p, **{f"train_{name}": replace(getattr(p, f"train_{name}"), steps=max(20, int(steps)))})

    kept, stages, facts = {}, {}, {}

    def write_facts():
        about = {"preset": asdict(P), "stages": stages, **facts, "versions": E.versions(),
                 "script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
                 "device": torch.cuda.get_device_name() if GPU else "cpu", "seconds": time.perf_counter() - T0}
        (out / "logs.json").write_text(json.dumps(about))

    def keep(prefix, name, model, state, log, seconds):  # write all that there is
        from safetensors.torch import save_file
        c = getattr(P, f"train_{name}")
        stages[name] = {"log": _thin(log), "stage": {
            "stage": name, "steps": c.steps, "batch": c.batch, "seconds": seconds, "training_seconds": log[-1]["seconds"],
            "images_per_second": c.steps * c.batch / log[-1]["seconds"], "parameters": sum(w.numel() for w in model)}}
        note(name, stages[name]["stage"], {k: round(v, 4) for k, v in log[-1].items()})
        kept.update({f"{prefix}.{k}": v.detach().cpu().contiguous() for k, v in state.items()})
        pieces, size = [{}], 0
        for k, v in kept.items():
            if size + v.nbytes > 14.4e6:
                pieces.append({})
                size = 0
            pieces[-1][k] = v
            size += v.nbytes
        for i, piece in enumerate(pieces):
            save_file(piece, "/tmp/mini_piece.safetensors")
            shutil.move("/tmp/mini_piece.safetensors", out / f"weights_{i}.safetensors")
        write_facts()

    def as_images(name, count, where="cpu"):
        images, labels = (torch.from_numpy(x[:count]) for x in pixels(name))
        split, seed = PARTS[name]
        source = f"ToyScenes {split}, level {LEVEL}, seed {seed}, {SIZE} px"
        return ImageSet(images.to(where), labels.clone(), KINDS, source, True)

    eyes = F.extractor(device=dev)
    [j.result() for j in jobs["few"]]
    note("first scenes drawn")

    # VAE
    def learn_vae(p, data, engine=None):
        return V.train_vae(data, p, eyes, 0, dev, False, half, False, engine=engine)

    def compile_vae(on):
        V.VAEEncoder.forward, V.VAEDecoder.forward = named_forwards
        if on:
            for cls, plain in zip((V.VAEEncoder, V.VAEDecoder), named_forwards):
                fast = torch.compile(plain, dynamic=False)
                cls.forward = lambda self, x, fast=fast, plain=plain: (fast if torch.is_grad_enabled() else plain)(self, x)

    small = as_images("train", few, dev)
    critic_off = replace(P, vae_loss=replace(P.vae_loss, adversarial_start=2.))
    critic_on = replace(P, vae_loss=replace(P.vae_loss, adversarial_start=0.))
    paces = {}
    for on in ([choice["compile_vae"]] if "compile_vae" in choice else [False, True] if compiles else [False]):
        try:
            compile_vae(on)
            paces[on] = pace(f"vae, compiled {on}", lambda e: learn_vae(endless(critic_off, "vae"), small, e))
        except Exception as error:
            note("vae", on, repr(error)[:500])
    fast_vae = min(paces, key=paces.get)
    compile_vae(fast_vae)
    slow = pace("vae with critic", lambda e: learn_vae(endless(critic_on, "vae"), small, e))
    [j.result() for name in ("val", "other", "train") for j in jobs[name]]
    hashes = {name: pool.submit(hash_of, name) for name in COUNTS}
    train, val, other = as_images("train", COUNTS["train"], dev), as_images("val", COUNTS["val"]), as_images("other", COUNTS["other"])
    note(f"all scenes drawn (asked for {time.perf_counter() - began:.1f} s ago):", len(train), len(val), len(other))
    start = P.vae_loss.adversarial_start
    P = with_steps(P, "vae", vae_seconds / (start * paces[fast_vae] + (1 - start) * slow))
    facts["vae_compiled"] = fast_vae
    began = time.perf_counter()
    vae, log = learn_vae(P, train)
    seconds = time.perf_counter() - began
    compile_vae(False)
    exact = {"vae": deepcopy(vae)}

    def rounded(model):  # in place: what the shipped file becomes when it is read
        model.load_state_dict(halved(model))
        return model.eval()

    rounded(vae)
    keep("vae", "vae", list(vae.parameters()), halved(vae), log, seconds)
    x = from_uint8(val.images[:512]).to(dev)
    with torch.no_grad():
        error = torch.cat([vae.decode(vae.encode(b)) for b in x.split(64)]).clamp(-1, 1) - x
    note("vae alone: MAE", float(error.abs().mean() / 2))

    # classifier
    began = time.perf_counter()
    reader, log = F.train_classifier(train, P.train_classifier, 0, dev, False)
    seconds = time.perf_counter() - began
    exact["classifier"] = deepcopy(reader)
    rounded(reader)
    keep("classifier", "classifier", list(reader.parameters()), halved(reader), log, seconds)
    note("reads", F.read_accuracy(reader, from_uint8(val.images[:1000]), val.labels[:1000]))

    # tokenizer
    exactly(True)
    means, stds = TK.cache_latents(vae, train.images)
    exactly(False)
    latents = TK.Latents(means.to(dev), stds.to(dev))
    note("latents cached: mean", float(means.mean()), "std", float(means.std()), "posterior", float(stds.mean()))

    def learn_tok(p, engine=None):
        return TK.train_tokenizer(latents, vae, p, 0, dev, False, half, compiles, False, engine=engine)

    batches = [choice["tokenizer_batch"]] if "tokenizer_batch" in choice else [1024, 512] if GPU else [8]
    tok_paces = {b: pace(f"tokenizer, batch {b}", lambda e, b=b: learn_tok(endless(P, "tokenizer", batch=b), e)) for b in batches}
    batch = batches[-1] if tok_paces[batches[-1]] * batches[0] < tok_paces[batches[0]] * batches[-1] * 1.18 else batches[0]
    tok_seconds = max(10., left() - ar_seconds - (110 if GPU else 25))  # the rest: AR probe and compilation, table, pictures
    P = with_steps(replace(P, train_tokenizer=replace(P.train_tokenizer, batch=batch)), "tokenizer", tok_seconds / tok_paces[batch])
    note("tokenizer: batch", batch, "steps", P.train_tokenizer.steps, "for", tok_seconds, "s")
    if SHORT:
        CHOICE.write_text(json.dumps({"compile_vae": fast_vae, "tokenizer_batch": batch}))
    began = time.perf_counter()
    tok, log = learn_tok(P)
    seconds = time.perf_counter() - began
    TK.noise_like = V.noise_like = named_noise
    exact["tok"] = deepcopy(tok)
    rounded(tok)
    keep("tok", "tokenizer", [w for _, w in tok.own_parameters()], halved(tok, tok.own_state()), log, seconds)
    facts["hashes"] = {"vae": weights_hash(vae), "tokenizer": weights_hash(tok), "classifier": weights_hash(reader)}
    facts["data"] = {name: job.result() for name, job in hashes.items()}
    pool.shutdown()
    write_facts()

    counts, few_tokens = E.token_counts(64), []
    from PIL import Image

    @torch.no_grad()
    def picture_reconstructions():
        v = from_uint8(val.images[:12]).to(dev)
        ids = tok.tokenize(v)
        rows = [v, vae.decode(vae.encode(v)).clamp(-1, 1)] + [tok.detokenize(ids[:, :k], 5, 2., 0) for k in counts]
        few_tokens.extend(round(float((r - v).abs().mean() / 2), 4) for r in rows[1:])
        Image.fromarray(grid(torch.cat(rows).cpu(), len(v))).save(out / "reconstructions.png")
    try:
        picture_reconstructions()
        note("12 pictures: MAE of the VAE, of", counts, "tokens", few_tokens)
    except Exception as error:
        note("pictures failed", repr(error))

    # AR model
    exactly(True)
    with torch.no_grad():
        ids = torch.cat([tok.encode_latents(part) for part in latents.means.split(1000)])  # as `tokenize`: of the posteriors' means
    tokens = A.Tokens(ids, train.labels[:, 0].to(dev), train.classes)
    exactly(False)
    A.Tokens.ids = lambda self, rows: self.all[rows.to(self.all.device)]
    note("tokens: words used", len(ids.unique()), "of", P.tokenizer.vocabulary)

    def learn_ar(p, engine=None):
        return A.train_ar(tokens, tok, p, 0, dev, half, compiles, False, engine=engine)

    each = pace("ar", lambda e: learn_ar(endless(P, "ar"), e))
    P = with_steps(P, "ar", min(ar_seconds, max(10., left() - 75)) / each)
    began = time.perf_counter()
    ar, log = learn_ar(P)
    seconds = time.perf_counter() - began
    exact["ar"] = deepcopy(ar)
    rounded(ar)
    keep("ar", "ar", list(ar.parameters()), halved(ar), log, seconds)
    facts["hashes"]["ar"] = weights_hash(ar)
    write_facts()

    @torch.no_grad()
    def picture_samples():
        rows = [A.sample_images(ar, tok, torch.arange(12), k, 5, 2., 2., 1., 0) for k in (1, 4, 16, 64)]
        more = [A.sample_images(ar, tok, torch.arange(12), 64, 5, 2., 2., 1., s) for s in (1, 2, 3, 4)]
        Image.fromarray(grid(torch.cat(rows + more).cpu(), 12)).save(out / "samples.png")
    try:
        picture_samples()
        note("samples drawn")
    except Exception as error:
        note("samples failed", repr(error))

    # the table, without any of the short cuts
    exactly(True)
    try:
        exact["tok"].vae = vae  # the one that it was trained with
        before = exact["vae"], exact["tok"], exact["ar"], exact["classifier"]
        facts["rounding"] = rounding(before, (vae, tok, ar, reader), from_uint8(val.images[:64]).to(dev))
        note("rounding", facts["rounding"])
        write_facts()
    except Exception as error:
        note("rounding failed", repr(error))
    try:
        plain_scores = E.image_scores

        def scores_here(output, original, batch=125):
            parts = [plain_scores(a.to(dev), b.to(dev)) for a, b in zip(output.split(batch), original.split(batch))]
            return {k: torch.cat([p[k] for p in parts]).cpu() for k in parts[0]}
        E.image_scores = scores_here
        report = E.evaluate_tokenizer(tok, val, other, eyes, P.evaluate, reader, ar, 0, progress=False)
        report.card |= {"train_hash": facts["data"]["train"], "trained_on": train.source, "device": str(dev),
                        "precision": str(half or torch.float32).removeprefix("torch."),
                        "vae_trained_against": "efficientnet_lite0 blocks 2 and 4"}
        replace(report, scores={}).save("/tmp/mini_table")
        shutil.copy("/tmp/mini_table/table.json", out / "table.json")
        print(report, flush=True)
    except Exception as error:
        note("table failed", repr(error))
    write_facts()
    note("done", {f.name: f.stat().st_size for f in sorted(out.iterdir())})


if __name__ == "__main__":
    main()
