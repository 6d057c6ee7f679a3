"""Does it work at all: pictures, lists and training steps, recorded and not, the same to the last bit.

python tools/gpu_smoke.py cuda|cpu

For a machine without pytest, and in a few seconds; the tests that need a GPU ask for more. On a CPU a list of
operations stands in for CUDA graphs.
"""

from __future__ import annotations

import platform
import sys
import time
from dataclasses import replace

import torch

from flextok_edu.apps.timing import BenchConfig, bench_tokenizer, device_name
from flextok_edu.apps.bench_writing import bench_writer
from flextok_edu.engine.config import StageConfig, preset
from flextok_edu.engine.files import weights_hash
from flextok_edu.engine.graphs import Graphs, OpRecorder
from flextok_edu.engine.trainer import SingleDevice, Trainer
from flextok_edu.engine.writing import Writer
from flextok_edu.training import Latents, train_tokenizer
from flextok_edu.vae import VAE


def recording(device: torch.device, **options) -> Graphs:
    """Graphs of this device; a list of operations where there are none."""
    return Graphs(True, recorder=None if device.type == "cuda" else OpRecorder(), **options)


def pictures(device: torch.device) -> list[torch.Tensor]:
    tok, ids = bench_tokenizer(BenchConfig("micro", str(device))), torch.arange(16).view(2, 8) * 61
    found = []
    for tok.graphs in (Graphs(False), recording(device)):
        found.append([tok.decode_latents(ids, seed=s, steps=3, guidance=2.0, apg=True) for s in range(4)])
    assert not tok.graphs.refused and any(r.replay for r in tok.graphs.recordings.values())
    return [torch.stack(x) for x in found]


def lists(device: torch.device) -> list[torch.Tensor]:
    ar, labels = bench_writer(BenchConfig("micro", str(device)), torch.float32), torch.tensor([0, 5, 11])
    found = []
    for ar.writer in (Writer(recording(device, warm=10**9)), Writer(recording(device))):
        found.append(torch.stack([ar.generate(labels, seed=s, guidance=2.0) for s in range(3)]))
    assert not ar.writer.graphs.refused and any(r.replay for r in ar.writer.graphs.recordings.values())
    return found


def steps(device: torch.device) -> list[str]:
    p = preset("micro")
    latents = Latents(torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    p, found, seen = (
        replace(p, train_tokenizer=StageConfig(steps=8, batch=8, optimizer="muon", ema=0.9)),
        [],
        [],
    )

    class Kept(Graphs):
        """A training gives its recordings up when it ends."""

        def clear(self) -> None:
            seen.extend(r.replay for r in self.recordings.values())
            assert not self.refused
            super().clear()

    recorder = None if device.type == "cuda" else OpRecorder()
    for graphs in (Graphs(False), Kept(True, 24, 2, recorder)):
        backend = SingleDevice(device)
        backend.graphs, backend.tensors = graphs, True
        how = {"trainer": Trainer(backend), "device": device, "progress": False}
        found.append(weights_hash(train_tokenizer(latents, VAE(p.vae), p, **how)[0].own_state()))
    assert any(seen), "nothing was recorded"
    return found


def main(name: str) -> None:
    device = torch.device(name)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {device_name(device)}")
    torch.use_deterministic_algorithms(True, warn_only=True)
    for check in (pictures, lists, steps):
        began = time.perf_counter()
        plain, recorded = check(device)
        same = plain == recorded if isinstance(plain, str) else torch.equal(plain, recorded)
        assert same, f"{check.__name__}: recorded and not, they differ"
        print(
            f"{check.__name__}: recorded and not, the same ({time.perf_counter() - began:.1f} s)", flush=True
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
