"""Caches on the disk: killed builders, builders side by side, full disks, foreign and damaged shards, random
access, feeds.
"""

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from planting import patch, planted

import flextok_edu.engine.shards as engine_shards
import flextok_edu.io.build as io_build
import flextok_edu.io.cache_facts as io_cache_facts
import flextok_edu.io.pictures as io_pictures
from flextok_edu.engine.binding import tokenizer_hash
from flextok_edu.engine.shards import DamagedShard, read_header, shard_path, write_shard
from flextok_edu.engine.tensors import from_uint8
from flextok_edu.engine.tokenizers import Tokenizer
from flextok_edu.io.build import (
    CachePlan,
    Recipe,
    build_cache,
    cache_latents_to,
    cache_plan,
    cache_tokens_to,
    latent_recipe,
)
from flextok_edu.io.cache import Cache, LatentCache, TokenCache
from flextok_edu.io.cache_facts import check_rows
from flextok_edu.io.pictures import Pictures, decoded_pictures, pictures_of
from flextok_edu.ar_training import token_batches, train_ar
from flextok_edu.engine.config import PRESETS, StageConfig, TokenizerConfig, TrunkConfig, VAEConfig
from flextok_edu.data.datasets import ImageSet
from flextok_edu.data.keys import picture_key
from flextok_edu.data.learned import leave_out_learned, learned_from
from flextok_edu.tokenizer import FlexTok
from flextok_edu.training import cache_latents, fit_tokenizer, latent_batches
from flextok_edu.vae import VAE

ROOT = Path(__file__).resolve().parent.parent
FACTS = {"kind": "latents", "of": "numbers"}
COUNT, SHARD = 96, 8  # 12 shards


def numbers(start, stop):
    return torch.arange(start, stop), torch.arange(start, stop) % 10


def halves(x):
    return {"latents": x[:, None, None].float() * 0.5 + torch.zeros(1, 1, 500)}


def slow(x):
    time.sleep(0.02)
    return halves(x)


def every_build(folder, encode=halves, load=numbers, facts=FACTS, count=COUNT, **options):
    return build_cache(
        folder,
        Recipe(encode, count, load, facts),
        **{"shard": SHARD, "batch": 4, "progress": False, **options},
    )


def files(folder):
    return {f.name: f.read_bytes() for f in sorted(Path(folder).iterdir()) if f.name != "build.lock"}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    vae = VAE(VAEConfig(latent_channels=4, channels=(16,), layers=1, stem=4, groups=4)).eval()
    vae.latent_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    vae.latent_std.copy_(torch.tensor([0.5, 2.0, 1.0, 0.7]))
    tok = FlexTok(TokenizerConfig(4, 8, 8, (8, 5, 5, 5), TrunkConfig(64, 1), TrunkConfig(64, 1)), vae).eval()
    images = torch.randint(
        0, 256, (50, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return vae, tok, ImageSet(images, torch.arange(50)[:, None] % 7, tuple("abcdefg"), "noise")


# --- processes
# -------------------------------------------------------------------------------------------------


def half_a_file_then_kill(victim):
    """The process dies in the middle of writing one shard."""
    real = engine_shards.save

    def save(tensors, facts):
        whole = real(tensors, facts)
        if f'"index\\": {victim},' not in whole[:2000].decode("latin1"):
            return whole

        class Half(bytes):
            pass

        return Half(whole)

    write = Path.write_bytes

    def write_bytes(self, data):
        if type(data) is bytes:
            return write(self, data)
        with open(self, "wb") as f:
            f.write(data[: len(data) // 2])
            f.flush()
            os.fsync(f.fileno())
            os.kill(os.getpid(), signal.SIGKILL)

    engine_shards.save, Path.write_bytes = save, write_bytes


def work(folder, log, victim=None):
    """What each process of these tests does: build, and write down which shards it encoded."""
    torch.set_num_threads(1)
    if victim is not None:
        half_a_file_then_kill(victim)
    real = io_build._make

    def make(path, facts, index, *rest):
        did = real(path, facts, index, *rest)
        if did:
            with open(log, "a") as f:
                f.write(f"{index}\n")
        return did

    io_build._make = make
    every_build(folder, slow)


@pytest.fixture(scope="module")
def start():
    """Starts `work` in a process that has everything imported: a fork of a clean server."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("no forkserver here")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_cache"])
    patch = pytest.MonkeyPatch()
    # where the server finds what it is to import
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))

    def begin(*arguments):
        process = context.Process(target=work, args=arguments)
        process.start()
        return process

    yield begin
    patch.undo()


def until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.002)


def shards(folder):
    return sorted(folder.glob("latents-*.safetensors"))


def test_killed_again_and_again(start, tmp_path):
    """Three SIGKILLs between writes, one in the middle of a write: nothing finished is made again, and the
    end is byte for byte the undisturbed one.
    """
    every_build(tmp_path / "whole")
    folder = tmp_path / "killed"
    for goal in (1, 4, 6):
        process = start(folder, tmp_path / "log")
        until(lambda: len(shards(folder)) >= goal)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = start(folder, tmp_path / "log", 9)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not shard_path(folder, "latents", 9).exists() and list(folder.glob(".latents-00009*")), (
        "it died while it wrote"
    )
    with pytest.raises(FileNotFoundError, match="not finished: 3 of 12"):
        Cache(folder, {})
    before = {f: f.stat().st_mtime_ns for f in shards(folder)}
    assert every_build(folder) == 12 - len(before) == 3
    assert all(f.stat().st_mtime_ns == t for f, t in before.items())
    assert files(folder) == files(tmp_path / "whole"), "also: no temporary file is left"


def test_three_builders(start, tmp_path):
    """Each shard exactly once; all return with a finished cache."""
    every_build(tmp_path / "whole")
    processes = [start(tmp_path / "shared", tmp_path / f"log{i}") for i in range(3)]
    for p in processes:
        p.join(60)
        assert p.exitcode == 0
    made = [[int(n) for n in log.read_text().split()] for log in sorted(tmp_path.glob("log*"))]
    assert sorted(sum(made, [])) == list(range(12)), made
    assert len(made) > 1, "one builder did everything"
    assert files(tmp_path / "shared") == files(tmp_path / "whole")


def test_a_dead_builder_frees_its_shard(start, tmp_path):
    """One builder dies while it writes; the other, which was started before, makes that shard too."""
    dying, living = (start(tmp_path / "shared", tmp_path / f"log{i}", v) for i, v in enumerate((5, None)))
    dying.join(60), living.join(60)
    assert living.exitcode == 0
    assert len(Cache(tmp_path / "shared", FACTS)) == COUNT and not list(
        (tmp_path / "shared").glob(".latents*")
    )


def test_a_builder_waits_for_what_others_make(start, tmp_path):
    """It goes on past a shard that is claimed, comes back to it, and makes it once it is free."""
    claims = engine_shards.Claims(tmp_path)
    with claims.claim(5 + 1) as ours:
        assert ours
        process = start(tmp_path, tmp_path / "log")
        until(lambda: len(shards(tmp_path)) == 11)
        time.sleep(0.3)
        assert process.is_alive() and not shard_path(tmp_path, "latents", 5).exists()
    process.join(60)
    claims.close()
    assert process.exitcode == 0 and len(shards(tmp_path)) == 12


def test_one_build_a_process(tmp_path):
    gate, inside = threading.Event(), threading.Event()

    def waits(x):
        inside.set()
        gate.wait(10)
        return halves(x)

    thread = threading.Thread(target=every_build, args=(tmp_path, waits))
    thread.start()
    inside.wait(10)
    try:
        with pytest.raises(ValueError, match="this very process"):
            every_build(tmp_path)
    finally:
        gate.set()
        thread.join()
    assert every_build(tmp_path) == 0


def test_memory(tmp_path):
    """A process that reads a whole cache does not hold it."""
    every_build(
        tmp_path, lambda x: {"latents": torch.randn(len(x), 1, 250_000, dtype=torch.float32)}, count=64
    )  # 64 MB
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch; torch.set_num_threads(1)
from flextok_edu.io.cache import Cache
def anon():
    lines = open("/proc/self/status")
    return next(int(l.split()[1]) for l in lines if l.startswith("RssAnon")) / 1024
c = Cache({str(tmp_path)!r}, {{}}); c.take("latents", torch.arange(4)); before = anon()
for rows in torch.randperm(64).split(4): c.take("latents", rows)
print(anon() - before)
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("no /proc")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout) < 32


# --- disks
# -----------------------------------------------------------------------------------------------------


def test_full_disk(tmp_path):
    """A file-size limit stands in for a full disk: an error that says what to do, nothing half-written,
    finished shards kept.
    """
    resource = pytest.importorskip("resource")

    def load(a, b):
        return (torch.arange(a, b), torch.arange(a, b))

    def grows(x):
        return {"latents": torch.zeros(len(x), 1, 100 if x[0] < 40 else 20_000)}

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
            OSError, match="latents-00005.*could not be written.*finished are kept: make room"
        ):
            every_build(tmp_path, grows, load)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "build.lock",
        "cache.json",
        *(f"latents-0000{i}.safetensors" for i in range(5)),
    ]
    assert every_build(tmp_path, grows, load) == 7


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a disk")
def test_really_full_disk(tmp_path):
    """A tmpfs of 1 MB: the plan refuses; told to leave no margin and misled by the first rows, the build
    stops cleanly.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("may not mount")
    try:
        with pytest.raises(OSError, match="make room, choose another disk"):
            every_build(disk / "a", lambda x: {"latents": torch.zeros(len(x), 1, 10_000)})
        with pytest.raises(OSError, match="No space left.*kept"):
            every_build(
                disk / "b", lambda x: {"latents": torch.zeros(len(x), 1, 10 if x[0] < 24 else 10_000)}
            )
        assert 3 <= len(shards(disk / "b")) < 12 and not list((disk / "b").glob(".*")), (
            "finished ones are kept, nothing half-written is left"
        )
        for f in shards(disk / "b"):
            read_header(f)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written to .*choose another folder"):
        every_build(tmp_path / "file" / "cache")


def test_plan(tmp_path):
    plan = cache_plan(tmp_path / "new" / "cache", Recipe(halves, COUNT, numbers, FACTS), SHARD, 4)
    assert (
        (plan.images, plan.missing, plan.shards, plan.row_bytes) == (COUNT, COUNT, 12, 2016)
        and plan.free > 0
        and not (tmp_path / "new").exists()
    )
    every_build(tmp_path)
    shards(tmp_path)[-1].unlink()
    assert cache_plan(tmp_path, Recipe(halves, COUNT, numbers, FACTS), SHARD, 4).missing == 8
    imagenet = CachePlan(1_281_167, 1_281_167, 1252, 16 * 32 * 32 * 4, 1000.0, int(85e9), 0)
    imagenet.check()
    assert "84.0 GB in 1,252 shards" in str(imagenet) and "21 min at 1,000 images/s" in str(imagenet), str(
        imagenet
    )
    with pytest.raises(OSError, match="84.0 GB more, and 2.0 GB should stay free"):
        CachePlan(1_281_167, 1_281_167, 1252, 16 * 32 * 32 * 4, 1000.0, int(85e9), int(2e9)).check()


# --- what is in the folder
# -------------------------------------------------------------------------------------


def test_damage_is_found_and_repaired(tmp_path):
    every_build(tmp_path)
    whole, path = files(tmp_path), shard_path(tmp_path, "latents", 3)
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-100] ^= 1
    for content, verify in (
        (good[:-1], False),
        (good + b"x", False),
        (good[:40], False),
        (b"", False),
        (b"\xff" * 100, False),
        (bytes(flipped), True),
    ):
        path.write_bytes(content)
        with pytest.raises(DamagedShard, match="00003.*build the cache again"):
            Cache(tmp_path, {}, verify)
        assert every_build(tmp_path, verify=verify) == 1 and files(tmp_path) == whole
    path.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 12 shards are missing, the first: latents-00003"):
        Cache(tmp_path, {})
    path.write_bytes(shards(tmp_path)[0].read_bytes())  # a whole shard, in the wrong place
    with pytest.raises(ValueError, match="index: 0 there, 3 here"):
        Cache(tmp_path, {})
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(ValueError, match="delete it and build"):
        every_build(tmp_path)
    (tmp_path / "cache.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no cache"):
        Cache(tmp_path, {})


def test_a_strangers_shard_is_refused_and_kept(tmp_path):
    every_build(tmp_path / "a")
    every_build(tmp_path / "b", facts={**FACTS, "of": "other numbers"})
    stranger, at = shards(tmp_path / "b")[2].read_bytes(), shard_path(tmp_path / "a", "latents", 2)
    at.write_bytes(stranger)
    for what in (lambda: Cache(tmp_path / "a", FACTS), lambda: every_build(tmp_path / "a")):
        with pytest.raises(
            ValueError, match='belongs to another cache: of: "other numbers" there, "numbers" here'
        ):
            what()
    assert at.read_bytes() == stranger
    for other in ({"count": 95}, {"shard": 16}, {"facts": {**FACTS, "of": "x"}}):
        with pytest.raises(ValueError, match="holds another cache"):
            every_build(tmp_path / "b", **other)


def test_equal_shards_are_equal_files(tmp_path):
    """safetensors writes several metadata keys in random order; a process of its own has another order."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport torch; from pathlib import Path; from "
        f"flextok_edu.engine.shards import write_shard\nwrite_shard(Path(sys.argv[1]), {{'b': "
        f"torch.arange(3), 'a': torch.ones(2)}}, {{'z': 1, 'y': 2, 'x': 3}})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "one")], check=True, timeout=300)
    write_shard(tmp_path / "two", {"a": torch.ones(2), "b": torch.arange(3)}, {"x": 3, "y": 2, "z": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert torch.equal(load_file(tmp_path / "two")["b"], torch.arange(3)), (
        "any safetensors reader can open it"
    )


def check_alignment(tmp_path=None):
    """Items that cannot be used leave no hole: latents, label and item of a row belong together."""
    import tempfile

    def load(a, b):
        items = torch.tensor([i for i in range(a, b) if i % 7 and not 24 <= i < 40])
        return items, items % 10, items

    with tempfile.TemporaryDirectory() as folder:
        every_build(folder, load=load)
        c = Cache(folder, FACTS)
        there = torch.tensor([i for i in range(COUNT) if i % 7 and not 24 <= i < 40])
        rows = torch.randperm(len(there))
        assert len(c) == len(there) and torch.equal(c.items, there) and torch.equal(c.labels, there % 10)
        assert torch.equal(c.take("latents", rows)[:, 0], there[rows] * 0.5)
        assert c.take("latents", torch.tensor([], dtype=torch.long)).shape == (0, 500)


def shards_assumed_full(monkeypatch):
    real = Cache.__init__

    def init(self, *a, **k):
        real(self, *a, **k)
        self.starts = torch.arange(len(self.paths) + 1) * self.facts["shard"]

    monkeypatch.setattr(Cache, "__init__", init)


def answer_in_the_order_of_the_shards(monkeypatch):
    real = Cache.take
    monkeypatch.setattr(Cache, "take", lambda self, name, rows: real(self, name, rows.sort().values))


def items_not_kept(monkeypatch):
    real = io_pictures._loaded

    def loaded(found, a, b):
        images, about = real(found, a, b)
        return images, about | {"items": torch.arange(a, a + len(images))}

    patch(monkeypatch, io_pictures, "_loaded", loaded)


test_alignment, test_misalignment_is_caught = planted(
    [
        (check_alignment, shards_assumed_full),
        (check_alignment, answer_in_the_order_of_the_shards),
        (check_alignment, items_not_kept),
    ]
)


@pytest.mark.parametrize(
    "found,message",
    [
        (lambda a, b: numbers(a, b - 1), "must also return the items"),
        (lambda a, b: (*numbers(a, b), torch.arange(b - 1, a - 1, -1)), "ascending"),
        (lambda a, b: (*numbers(a, b), torch.arange(a, b) + 1), "must lie there"),
        (lambda a, b: (torch.arange(a, b), torch.zeros(b - a, 2)), "labels"),
        (lambda a, b: (torch.arange(0), torch.arange(0), torch.arange(0)), "none of the 96 images"),
    ],
)
def test_a_source_that_is_wrong(found, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        every_build(tmp_path, load=found)


def test_labels_of_no_class_are_refused_when_they_are_written(tmp_path):
    """For tokens always, for other things where there are classes; latents of one class `all` do not look at
    labels.
    """
    for facts in ({**FACTS, "classes": ["a", "b"]}, {**FACTS, "kind": "tokens", "classes": ["all"]}):
        with pytest.raises(
            ValueError,
            match="among items 0 .. 7 of the source labels reach from 0 to 7, and there are . classes",
        ):
            every_build(tmp_path / str(len(facts["classes"])), facts=facts)
    every_build(tmp_path / "all", facts={**FACTS, "classes": ["all"]})
    assert Cache(tmp_path / "all", {}).labels.max() == 9


def test_an_encode_that_is_wrong(tmp_path):
    for encode, message in (
        (lambda x: {"latents": torch.zeros(2, 1, 3)}, "2 rows of 'latents' for 4 images"),
        (lambda x: {"latents": torch.full((len(x), 1, 3), 1e6).half()}, "NaN or infinity.*float16.*wider"),
    ):
        with pytest.raises(ValueError, match=message):
            every_build(tmp_path, encode)
    assert not shards(tmp_path)


# --- latents and tokens
# ----------------------------------------------------------------------------------------


def test_latents(models, tmp_path):
    vae, _, data = models
    means, stds = cache_latents(vae, data.images)
    for dtype, close in (
        (torch.float16, dict(rtol=2e-3, atol=1e-3)),
        (torch.float32, dict(rtol=1e-4, atol=1e-5)),
    ):
        c = cache_latents_to(tmp_path / str(dtype), vae, data, dtype, shard=16, batch=5, progress=False)
        rows = torch.tensor([49, 0, 16, 15, 15])
        for got, want in zip(c.latents(rows), (means, stds)):
            assert got.dtype == torch.float32 and torch.allclose(got, want[rows], **close)
        assert torch.equal(c.labels, data.labels[:, 0]) and len(c) == 50
        assert (
            load_file(c.paths[0])["latents"].dtype == dtype
            and shard_path(c.folder, "latents", 3) == c.paths[-1]
        )
    both = cache_latents_to(
        tmp_path / "both", vae, data, torch.float32, True, shard=16, batch=5, progress=False
    )
    assert len(both) == 100 and torch.equal(both.labels, data.labels[:, 0].repeat(2))
    assert torch.allclose(
        both.latents(torch.arange(50, 100))[0], cache_latents(vae, data.images.flip(-1))[0], atol=1e-5
    )
    with pytest.raises(IndexError, match="0 .. 99"):
        both.latents(torch.tensor([100]))
    again = pickle.loads(pickle.dumps(both))
    assert not again.maps and torch.equal(again.latents(rows)[0], both.latents(rows)[0])


def test_tokens(models, tmp_path):
    vae, tok, data = models
    latents = cache_latents_to(
        tmp_path / "latents", vae, data, torch.float32, True, shard=16, batch=5, progress=False
    )
    one, two = (
        cache_tokens_to(tmp_path / name, tok, source, True, shard=20, batch=6, progress=False)
        for name, source in (("images", data), ("again", latents))
    )
    ids = torch.cat([tok.tokenize(x.float() / 127.5 - 1) for x in (data.images, data.images.flip(-1))])
    for c in (one, two):
        assert (
            (c.ids(torch.arange(100)) != ids).float().mean() < 0.01
            and torch.equal(c.labels, data.labels[:, 0].repeat(2))
            and torch.equal(c.items, torch.arange(50))
        )
        assert (
            load_file(c.paths[0])["ids"].dtype == torch.uint16
            and c.ids(torch.tensor([3])).dtype == torch.int64
        )
    assert one.facts["of"] == "images" and two.facts["of"] == "latents, float32"
    TokenCache(tmp_path / "again", tok, verify=True)
    plain = cache_latents_to(tmp_path / "plain", vae, data, shard=16, progress=False)
    with pytest.raises(ValueError, match="no mirror images"):
        cache_tokens_to(tmp_path / "x", tok, plain, mirror=True)
    torch.manual_seed(3)
    with pytest.raises(ValueError, match="not of this tokenizer's VAE: vae"):
        cache_tokens_to(tmp_path / "x", FlexTok(tok.config, VAE(vae.config)).eval(), plain)


def test_what_is_refused(models, tmp_path):
    vae, tok, data = models
    cache_latents_to(tmp_path / "l", vae, data, shard=16, progress=False)
    cache_tokens_to(tmp_path / "t", tok, data, progress=False)
    rescaled = VAE(vae.config).eval()
    rescaled.load_state_dict(vae.state_dict())
    rescaled.latent_std[0] *= 2
    source = pictures_of(data)

    def like(**other):
        return Pictures(
            **{
                **{k: getattr(source, k) for k in ("load", "count", "size", "crop", "source", "hash")},
                **other,
            }
        )

    cases = [
        (lambda: LatentCache(tmp_path / "l", VAE(vae.config)), "vae: "),
        (lambda: LatentCache(tmp_path / "l", rescaled), "latent_std: "),
        (lambda: TokenCache(tmp_path / "t", FlexTok(tok.config, vae)), "tokenizer: "),
        (lambda: TokenCache(tmp_path / "l", tok), "kind: "),
        (lambda: LatentCache(tmp_path / "l", vae, like(size=64)), "size: 32 there, 64 here"),
        (
            lambda: LatentCache(tmp_path / "l", vae, like(crop="random")),
            'crop: "as in memory" there, "random" here',
        ),
        (lambda: LatentCache(tmp_path / "l", vae, like(hash="0")), "source_hash: "),
        (lambda: LatentCache(tmp_path / "l", vae, like(count=49)), "count: 50 there, 49 here"),
        (
            lambda: cache_latents_to(tmp_path / "l", vae, data, torch.float32, shard=16, progress=False),
            'dtype: "float16" there, "float32" here',
        ),
        (
            lambda: cache_latents_to(tmp_path / "l", vae, data, shard=32, progress=False),
            "shard: 16 there, 32 here",
        ),
        (
            lambda: build_cache(tmp_path / "n", latent_recipe(vae, like(size=64)), progress=False),
            "says that they are",
        ),
    ]
    for what, message in cases:
        with pytest.raises(ValueError, match=message):
            what()
    LatentCache(tmp_path / "l", vae, data, verify=True)
    TokenCache(tmp_path / "t", tok, data, verify=True)
    assert json.loads((tmp_path / "l" / "cache.json").read_text())["source"] == "noise"


class Drawer:
    """As sources's sources are: items by number, some of them broken, one without a valid label."""

    name, classes, hash = "a drawer", ("a", "b", "c"), "0123456789abcdef"

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def item(self, i):
        if i == 5:
            raise OSError("gone")
        return type("Item", (), {"data": self.images[i], "label": 3 if i == 9 else i % 3})


def test_pictures_from_a_source(models, tmp_path):
    vae, tok, data = models
    pictures = decoded_pictures(
        Drawer(data.images),
        32,
        lambda item, size: "damaged" if torch.equal(item.data, data.images[7]) else item.data,
        threads=3,
    )
    c = cache_latents_to(tmp_path, vae, pictures, torch.float32, shard=4, batch=2, progress=False)
    left = [i for i in range(50) if i not in (5, 7, 9)]
    assert c.items.tolist() == left and c.skipped == 3 and c.labels.tolist() == [i % 3 for i in left]
    assert torch.allclose(c.latents(torch.arange(47))[0], cache_latents(vae, data.images[left])[0], atol=1e-5)
    assert cache_tokens_to(tmp_path / "t", tok, c, shard=9, batch=4, progress=False).items.tolist() == left
    nothing = decoded_pictures(Drawer(data.images), 32, lambda item, size: "damaged")
    with pytest.raises(ValueError, match="none of the 50 images"):
        cache_latents_to(tmp_path / "n", vae, nothing, progress=False)


def rewrite(path, **changes):
    """A shard with other tensors, and the right hash: somebody meant it."""
    facts, _ = read_header(path)
    write_shard(path, load_file(path) | changes, {k: v for k, v in facts.items() if k != "content"})


def check_damage_is_met_at_the_first_touch(tmp_path):
    """The disk changed some numbers, the header is as it was: the cache opens, sound shards can be read, the
    damaged one is refused by name.
    """
    every_build(tmp_path)
    for i in (3, 7):
        path = shard_path(tmp_path, "latents", i)
        data = bytearray(path.read_bytes())
        data[-2000:] = os.urandom(2000)
        path.write_bytes(data)
    c = Cache(tmp_path, FACTS)
    assert torch.equal(c.take("latents", torch.arange(24))[:, 0], torch.arange(24) * 0.5)
    again = pickle.loads(pickle.dumps(c))
    for reader in (c, again):
        for _ in range(2):
            with pytest.raises(DamagedShard, match="latents-00003.*build the cache again"):
                reader.take("latents", torch.tensor([1, 30]))
        with pytest.raises(DamagedShard, match="latents-0000"):
            reader.labels
    assert every_build(tmp_path, verify=True) == 2 and torch.equal(
        Cache(tmp_path, FACTS).take("latents", torch.tensor([30]))[:, 0], torch.tensor([15.0])
    )


def never_looked_at(monkeypatch):
    patch(monkeypatch, engine_shards, "check_content", lambda path: load_file(path))


def only_the_header(monkeypatch):
    monkeypatch.setattr(
        Cache,
        "_check",
        lambda self, shard: self.maps.update(
            {(shard, n): t for n, t in load_file(self.paths[shard]).items()}
        ),
    )


@pytest.mark.parametrize("bug", (None, never_looked_at, only_the_header))
def test_damage_is_met_at_the_first_touch(bug, tmp_path, monkeypatch):
    if not bug:
        return check_damage_is_met_at_the_first_touch(tmp_path)
    bug(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_damage_is_met_at_the_first_touch(tmp_path)


def test_a_shard_is_read_once(tmp_path, monkeypatch):
    every_build(tmp_path)
    seen, real = [], engine_shards.check_content
    patch(monkeypatch, engine_shards, "check_content", lambda path: seen.append(path.name) or real(path))
    c = Cache(tmp_path, FACTS)
    assert not seen
    for _ in range(3):
        c.take("latents", torch.tensor([0, 90]))
    assert seen == ["latents-00000.safetensors", "latents-00011.safetensors"]
    again = pickle.loads(pickle.dumps(c))
    again.take("latents", torch.tensor([0]))
    c.labels
    assert len(seen) == 12 and len(set(seen)) == 12


def test_ids_and_labels_out_of_range(models, tmp_path):
    """With the right hash: a stranger's cache, or a builder that went wrong."""
    vae, tok, data = models
    cache_tokens_to(tmp_path, tok, data, progress=False, shard=32)
    path = shard_path(tmp_path, "tokens", 1)
    good = load_file(path)

    def other(name, value):
        x = good[name].clone().long()
        x.view(-1)[3] = value
        return {name: x.to(good[name].dtype)}

    for changes, message in (
        (other("ids", 1000), "ids reach from .* to 1000, and the vocabulary ends at 999"),
        (other("labels", 7), "labels reach from 0 to 7, and there are 7 classes"),
        (other("labels", -1), "labels reach from -1"),
        (other("items", 60), "items are not in order"),
        (other("items", 0), "items are not in order"),
    ):
        rewrite(path, **good | changes)
        c = TokenCache(tmp_path, tok)
        c.ids(torch.arange(32))
        with pytest.raises(DamagedShard, match=f"tokens-00001.*{message}"):
            c.ids(torch.tensor([40]))
        with pytest.raises(DamagedShard, match=message):
            train_ar(
                c, tok, replace(PRESETS["micro"], train_ar=StageConfig(steps=2, batch=4)), progress=False
            )
    rewrite(path, **good)
    for changes, message in (
        ({"ids": good["ids"][:, :, :5].contiguous()}, "rows .*the shards before it"),
        ({"ids": good["ids"][:5]}, "has shape .* for 18 rows"),
        ({"ids": good["ids"].to(torch.int32)}, "is I32, and the cache uint16"),
        ({"labels": good["labels"][:3]}, "labels must be I64"),
        ({"items": good["items"].float()}, "items must be I64"),
        ({"ids": good["ids"].repeat(1, 2, 1)}, "2 sides, and the cache 1"),
    ):
        rewrite(path, **good | changes)
        with pytest.raises(DamagedShard, match=f"tokens-00001.*{message}"):
            TokenCache(tmp_path, tok)
    short = FlexTok(replace(tok.config, registers=4), vae).eval()
    with pytest.raises(ValueError, match="is not the one that you mean"):
        TokenCache(tmp_path, short)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"count": 10**9}, "124,999,988 of 125,000,000 shards are missing"),
        ({"count": 10**30}, "count is 1000.*must be a whole number"),
        ({"count": "96"}, "count"),
        ({"count": True}, "count"),
        ({"count": 0}, "count"),
        ({"shard": 1}, "84 of 96 shards are missing"),
        ({"shard": 10**12}, "shard"),
        ({"kind": "../latents"}, "kind"),
        ({"kind": 3}, "kind"),
        ({"classes": "abc"}, "classes"),
        ({"classes": [1]}, "classes"),
        ({"mirror": 2}, "mirror"),
        ({"format": 2}, "has format 2"),
        ({"format": None}, "has format None"),
        ({"latent_mean": ["x"]}, "latent_mean"),
        ({"vocabulary": -1}, "vocabulary"),
    ],
)
def test_what_cache_json_may_say(changes, message, tmp_path):
    """Refused in no time, and before anything is made of a number in it."""
    import tracemalloc

    every_build(tmp_path)
    path = tmp_path / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            Cache(tmp_path, {})
        assert tracemalloc.get_traced_memory()[1] < 1e8
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    (
        b"[" * 100_000,
        b"{",
        b"null",
        b"\xff\xfe",
        b'{"format": ' + b"9" * 5000 + b"}",
        b'{"format": 1, "count": 1e999}',
    ),
)
def test_cache_json_that_is_none(text, tmp_path):
    every_build(tmp_path)
    (tmp_path / "cache.json").write_bytes(text)
    for what in (lambda: Cache(tmp_path, {}), lambda: every_build(tmp_path)):
        with pytest.raises(ValueError, match="cache.json"):
            what()


def permuted(tok, levels=(5, 5, 5, 8)):
    """The same weights, other levels with the same product: other ids."""
    other = FlexTok(replace(tok.config, levels=levels), tok.vae).eval()
    other.load_state_dict(tok.state_dict())
    return other


def test_other_fsq_levels_are_another_tokenizer(models, tmp_path):
    vae, tok, data = models
    other = permuted(tok)
    assert tokenizer_hash(other) == tokenizer_hash(tok) and other.fsq.vocabulary == tok.fsq.vocabulary
    assert not torch.equal(
        other.tokenize(data.images[:8].float() / 127.5 - 1), tok.tokenize(data.images[:8].float() / 127.5 - 1)
    )
    cache_tokens_to(tmp_path, tok, data, progress=False)
    with pytest.raises(ValueError, match="tokenizer_identity: "):
        TokenCache(tmp_path, other)
    with pytest.raises(ValueError, match="holds another cache: tokenizer_identity"):
        cache_tokens_to(tmp_path, other, data, progress=False)


def without_identities(folder):
    """As it was written before there were any."""
    path = folder / "cache.json"
    facts = {k: v for k, v in json.loads(path.read_text()).items() if k not in io_cache_facts._LATER}
    path.write_text(json.dumps(facts))
    for path in folder.glob("*.safetensors"):
        made, _ = read_header(path)
        write_shard(
            path,
            load_file(path),
            {k: v for k, v in made.items() if k not in (*io_cache_facts._LATER, "content")},
        )


def test_old_caches_are_recognised(models, tmp_path, monkeypatch):
    """By the weights' hash, the vocabulary and the number of tokens; an old cache that is not finished is
    finished.
    """
    vae, tok, data = models
    cache_latents_to(tmp_path / "l", vae, data, shard=16, progress=False)
    cache_tokens_to(tmp_path / "t", tok, data, shard=16, progress=False)
    for kind in "lt":
        without_identities(tmp_path / kind)
    latents = LatentCache(tmp_path / "l", vae, data, verify=True)
    assert len(TokenCache(tmp_path / "t", tok, data, verify=True)) == 50
    cache_tokens_to(tmp_path / "again", tok, latents, progress=False)
    shard_path(tmp_path / "t", "tokens", 2).unlink()
    assert build_cache(tmp_path / "t", io_build.token_recipe(tok, data), shard=16, progress=False) == 1
    torch.manual_seed(5)
    with pytest.raises(ValueError, match="tokenizer: "):
        TokenCache(tmp_path / "t", FlexTok(tok.config, vae).eval())
    known = io_cache_facts.token_facts(tok)
    patch(monkeypatch, io_cache_facts, "token_facts", lambda other: known)
    with pytest.raises(ValueError, match="not the one that you mean: ids .8. there, .4. here"):
        TokenCache(tmp_path / "t", FlexTok(replace(tok.config, registers=4), vae))


def test_a_cache_knows_what_it_was_made_of(models, tmp_path):
    """Keys and rule of the pictures that are there go through latents and tokens; evaluation leaves exactly
    these out.
    """
    vae, tok, data = models
    keys = torch.tensor([picture_key(x) for x in data.images])
    known = replace(data, keys=keys, rule="one in eight")
    latents = cache_latents_to(tmp_path / "l", vae, known, mirror=True, shard=16, progress=False)
    tokens, again = (
        cache_tokens_to(tmp_path / "t", tok, latents, shard=20, progress=False),
        cache_tokens_to(tmp_path / "u", tok, known, progress=False),
    )
    wanted = learned_from(known)
    for c in (
        latents,
        tokens,
        again,
        LatentCache(tmp_path / "l", vae, known),
        LatentCache(tmp_path / "l", vae, data),
    ):
        assert torch.equal(c.keys, keys) and torch.equal(c.learned.keys, keys.sort().values)
        assert c.learned.facts == wanted.facts == c.facts["learned"] and c.learned.rule == "one in eight"
    some = replace(
        known,
        images=data.images[40:].repeat(2, 1, 1, 1),
        labels=data.labels[40:].repeat(2, 1),
        keys=torch.cat([keys[40:], torch.arange(10)]),
    )
    left, said = leave_out_learned(some, {"tokenizer": tokens.learned})
    assert len(left) == 10 and said["tokenizer"]["overlap"] == 10

    class Keyed(Drawer):
        rule = "own split"
        keys = torch.arange(50)

    source = Keyed(data.images)
    broken = cache_latents_to(
        tmp_path / "b",
        vae,
        decoded_pictures(source, 32, lambda item, size: item.data),
        shard=4,
        progress=False,
    )
    assert (
        broken.learned.keys.tolist() == [i for i in range(50) if i not in (5, 9)]
        and broken.learned.rule == "own split"
        and broken.learned.count == 48
    )
    nothing = cache_latents_to(tmp_path / "n", vae, data, progress=False)
    assert nothing.learned.keys is None and nothing.learned.rule == "unknown"
    scenes = cache_latents_to(tmp_path / "s", vae, replace(data, rule="scenes"), progress=False)
    assert scenes.learned.rule == "scenes" and scenes.learned.hash == data.hash and scenes.learned.count == 50


def test_keys_are_checked_without_reading_the_rest(models, tmp_path):
    vae, _, data = models
    keys = torch.arange(50)
    c = cache_latents_to(tmp_path, vae, replace(data, keys=keys, rule="own split"), shard=16, progress=False)
    header = c.headers[1]["keys"]["data_offsets"][0] + c.data[1]
    good = c.paths[1].read_bytes()
    c.paths[1].write_bytes(good[:header] + bytes([good[header] ^ 1]) + good[header + 1 :])
    with pytest.raises(DamagedShard, match="latents-00001.*its keys are not those"):
        LatentCache(tmp_path, vae).learned
    c.paths[1].write_bytes(good)
    assert not c.checked and torch.equal(LatentCache(tmp_path, vae).keys, keys)
    rewrite(c.paths[1], keys=keys[:3])
    with pytest.raises(DamagedShard, match="keys must be I64"):
        LatentCache(tmp_path, vae)
    for path in c.paths:  # as it was before
        made, _ = read_header(path)
        tensors = load_file(path)
        tensors.pop("keys")
        write_shard(
            path, tensors, {k: v for k, v in made.items() if k not in ("learned", "keys_content", "content")}
        )
    path = tmp_path / "cache.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "learned"}))
    old = LatentCache(tmp_path, vae, replace(data, keys=keys, rule="own split"))
    assert old.learned.rule == "unknown" and old.learned.keys is None and old.learned.count == 50


@pytest.mark.parametrize(
    "keys,message",
    [
        (lambda a, b: torch.arange(a, b - 1), "must be as many"),
        (lambda a, b: torch.arange(a, b).float(), "int64"),
    ],
)
def test_keys_that_are_wrong(keys, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        every_build(tmp_path, load=lambda a, b: (*numbers(a, b), torch.arange(a, b), keys(a, b)))


# --- feeds
# -----------------------------------------------------------------------------------------------------


def test_feeds(models, tmp_path):
    vae, tok, data = models
    latents, tokens = (
        cache_latents_to(tmp_path / "l", vae, data, shard=16, progress=False),
        cache_tokens_to(tmp_path / "t", tok, data, progress=False),
    )
    feed, other = latent_batches(latents, 12, seed=3), latent_batches(latents, 12, seed=3)
    batches = [next(feed) for _ in range(9)]
    other.step = 6
    assert torch.equal(next(other), batches[6]) and other.step == 7
    assert not torch.equal(batches[0], next(latent_batches(latents, 12, seed=4)))
    epoch = torch.cat([feed.rows(s) for s in range(5)])[:50]
    assert torch.equal(epoch.sort().values, torch.arange(50)), "each item once an epoch"
    means, stds = latents.latents(feed.rows(2))
    assert torch.equal(
        next(latent_batches(latents, 12, seed=3, sample=False)), latents.latents(feed.rows(0))[0]
    )
    noise = (batches[2] - means) / stds
    assert 0.9 < noise.std() < 1.1 and not torch.equal(noise[0], noise[1])
    for world, micro in ((2, 1), (1, 3), (2, 2)):
        shares = [part for rank in range(world) for part in other.micro_batches(2, rank, world, micro)]
        assert sum(w for _, w in shares) / world == pytest.approx(1)
        got = torch.cat([b for b, _ in shares])
        assert torch.equal(got.flatten(1).sum(1).sort().values, batches[2].flatten(1).sum(1).sort().values), (
            "the same latents, whoever draws them"
        )
    ids, labels, _ = next(token_batches(tokens, 10, seed=1))
    rows = token_batches(tokens, 10, seed=1).rows(0)
    assert torch.equal(ids, tokens.ids(rows)) and torch.equal(labels, data.labels[rows, 0])


def test_training_reads_caches(models, tmp_path):
    """Stages 1 and 2 train from the disk as from memory: the same losses from the same latents."""
    vae, tok, data = models
    latents, tokens = (
        cache_latents_to(tmp_path / "l", vae, data, dtype=torch.float32, progress=False),
        cache_tokens_to(tmp_path / "t", tok, data, progress=False),
    )
    config = StageConfig(steps=4, batch=6, warmup=1, ema=0.5)
    logs = []
    for source in (data, latents):
        torch.manual_seed(0)
        logs.append(fit_tokenizer(FlexTok(tok.config, vae), source, config, progress=False)[1])
    assert [a["tokenizer"] for a in logs[0]] == pytest.approx([b["tokenizer"] for b in logs[1]], rel=1e-5)
    p = replace(
        PRESETS["micro"], train_ar=config, ar=replace(PRESETS["micro"].ar, width=32, depth=1, head_dim=16)
    )
    (model, a), (_, b) = (train_ar(source, tok, p, progress=False) for source in (data, tokens))
    assert [r["ar"] for r in a] == pytest.approx(
        [r["ar"] for r in b], rel=1e-6
    ) and model.config.classes == len(data.classes)


class Greys:
    "A tokenizer that is no module: the mean grey of each of four stripes, in 16 steps."

    kind, identity, vocabulary, length, token_counts, image_size = "greys", "greys-1", 16, 4, (4,), 32

    def tokenize(self, images, budget=None):
        return ((images.mean((1, 3)).unflatten(1, (4, 8)).mean(-1) + 1) * 7.999).long()

    def detokenize(self, ids, sampling=None, *, first_index=0, **settings):
        raise NotImplementedError


def test_another_kind_of_tokenizer_is_cached_by_the_protocol(tmp_path, models):
    vae, _, data = models
    tok, other = Greys(), Greys()
    assert isinstance(tok, Tokenizer)
    tokens = cache_tokens_to(tmp_path / "t", tok, data, mirror=True, progress=False)
    n = len(data.images)
    assert torch.equal(tokens.ids(torch.arange(n)), tok.tokenize(from_uint8(data.images)))
    assert torch.equal(tokens.ids(torch.arange(n) + n), tok.tokenize(from_uint8(data.images.flip(-1))))
    assert tokens.facts["tokenizer_identity"] == "greys-1" and "tokenizer" not in tokens.facts
    for change, says in (
        ({"identity": "greys-2"}, "tokenizer_identity: "),
        ({"vocabulary": 17}, "vocabulary: 16 there, 17 here"),
        ({"length": 5}, "ids .4. there, .5. here"),
    ):
        vars(other).clear()
        vars(other).update(change)
        with pytest.raises(ValueError, match=says):
            TokenCache(tmp_path / "t", other)
    latents = cache_latents_to(tmp_path / "l", vae, data, progress=False)
    with pytest.raises(ValueError, match="kind 'greys' reads pictures, not latents"):
        cache_tokens_to(tmp_path / "x", tok, latents, progress=False)


@pytest.mark.parametrize(
    "change, says",
    (
        ({}, ""),
        ({"items": [8, 9, 11]}, ""),
        ({"items": [7, 9, 11]}, "its items are not in order, or not its own"),
        ({"items": [8, 9, 12]}, "its items are not in order, or not its own"),
        ({"items": [8, 10, 9]}, "its items are not in order, or not its own"),
        ({"items": [8, 8, 9]}, "its items are not in order, or not its own"),
        ({"labels": [0, 1, 2]}, "label"),
        ({"ids": [[0], [8], [1]]}, "its ids reach from 0 to 8, and the vocabulary ends at 7"),
    ),
)
def test_rows_that_no_cache_may_hold(change, says):
    """A shard with a right hash that was not written for this place: what a hash cannot see."""
    facts = {"kind": "tokens", "shard": 4, "count": 40, "vocabulary": 8, "classes": ["a", "b"]}
    rows = {"items": [8, 9, 10], "labels": [0, 1, 0], "ids": [[0], [7], [1]]} | change
    tensors = {name: torch.tensor(values) for name, values in rows.items()}
    with pytest.raises(DamagedShard, match=says) if says else contextlib.nullcontext():
        check_rows(Path("tokens-00002.safetensors"), tensors, facts, 2)
