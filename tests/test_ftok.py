"""Files that may be cut: the format never changes, and any file gives a picture or a sentence."""

import json
import random
import time
import tracemalloc
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flextok_edu.engine.tokenizers as engine_tokenizers
from flextok_edu.data.scenes import ToyScenes
from flextok_edu.engine.config import TokenizerConfig, TrunkConfig, VAEConfig
from flextok_edu.engine.marks import is_ours
from flextok_edu.engine.tensors import noise_like
from flextok_edu.flow import SamplingConfig, euler
from flextok_edu.io.ftok import HEADER_BYTES, Ftok, FtokError, FtokHeader, bits_for, decode_ftok, header_for
from flextok_edu.io.ftok import (
    ftok_bytes,
    pack_ids,
    parse_ftok,
    read_ftok,
    read_header,
    unpack_ids,
    write_ftok,
)
from flextok_edu.tokenizer import FlexTok
from flextok_edu.vae import VAE

from fuzzing import CASES, fuzz, mutated_bytes
from test_commands import Greys, call, refused

PARSED, DECODED = CASES * 5 // 2, max(1, CASES // 80)  # FLEXTOK_FUZZ=40: 200,000 and 1,000
VAE_SMALL = VAEConfig(latent_channels=4, channels=(16, 32), layers=1, stem=2, groups=4)
TOK_SMALL = TokenizerConfig(4, 8, 8, (8, 5, 5, 5), TrunkConfig(64, 1), TrunkConfig(64, 2))
HOW = SamplingConfig(steps=5, guidance=2.0)


@pytest.fixture(scope="module")
def tiny():
    return FlexTok.from_pretrained("tiny")


@pytest.fixture(scope="module")
def scene():
    return ToyScenes("val", 64, level=2)[19].image[None]


@pytest.fixture(scope="module")
def whole(tiny, scene):  # bytes
    return ftok_bytes(tiny, tiny.tokenize(scene), HOW)


def small(**changes):
    torch.manual_seed(0)
    return FlexTok(replace(TOK_SMALL, **changes), VAE(VAE_SMALL)).eval()


def sealed(header: bytes) -> bytes:
    """With the checksum that belongs to it."""
    return header[:36] + zlib.crc32(header[:36]).to_bytes(4, "big") + header[40:]


# --- the format --------------------------------------------------------------------------------------------

GOLDEN = bytes.fromhex(
    "8f46544b0d0a1a0a 01 01 0040 0040 0004 0020 0a 000003e8 c809aa9106366039 05 00c8 0007 f3581faf"
    "f9d000600d 00000004 6273756d be1e6bb2 58524a88"
)


def test_the_format_never_changes(tiny):
    """Files are kept for years: this one must be read by every version of the package."""
    found = parse_ftok(GOLDEN)
    assert found.ids.tolist() == [999, 256, 24, 13] and not found.cut
    header = FtokHeader(64, 64, 4, 32, 1000, "c809aa9106366039", 5, 2.0, 7, True)
    assert found.header == header and header.pack() == GOLDEN[:40]
    assert header.hints == SamplingConfig(steps=5, guidance=2.0, seed=7)
    assert ftok_bytes(tiny, found.ids, header.hints) == GOLDEN
    bare = ftok_bytes(tiny, found.ids, checksum=False)
    assert len(bare) == 45 and bare[40:] == GOLDEN[40:45] and parse_ftok(bare).header.hints is None
    decoded = decode_ftok(found, tiny)
    assert torch.equal(decoded, tiny.detokenize(found.ids[None], steps=5, guidance=2.0, seed=7))


@pytest.mark.parametrize("vocabulary", (1, 2, 3, 16, 17, 1000, 4096, 64_000, 65_537, 2**31, 2**32 - 1))
def test_ids_in_bits(vocabulary):
    bits, generator = bits_for(vocabulary), torch.Generator().manual_seed(vocabulary)
    assert 2 ** (bits - 1) < max(2, vocabulary) <= 2**bits
    for r in (0, 1, 2, 7, 8, 9, 33):
        ids = torch.randint(vocabulary, (r,), generator=generator)
        text = "".join(f"{i:0{bits}b}" for i in ids.tolist())
        text += "0" * (-len(text) % 8)
        packed = pack_ids(ids, bits)
        assert packed == bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
        for n in range(len(packed) + 1):
            known = min(r, 8 * n // bits)
            assert torch.equal(unpack_ids(packed[:n], bits)[:r], ids[:known])


def test_ids_of_a_bit_end_where_the_header_says():
    head = FtokHeader(8, 8, 3, 3, 2, "0" * 16, trailer=False)
    assert parse_ftok(head.pack() + b"\xa0").ids.tolist() == [1, 0, 1]  # 5 of 8 bits are filling


def test_wherever_it_is_cut(tiny, scene, whole):
    ids = tiny.tokenize(scene)[0]
    assert len(whole) == 96
    for n in range(len(whole) + 1):
        if n < HEADER_BYTES:
            with pytest.raises(FtokError, match="empty" if not n else "ends within its header"):
                parse_ftok(whole[:n])
            continue
        found = parse_ftok(whole[:n])
        k = min(32, 8 * (n - 40) // 10)
        assert torch.equal(found.ids, ids[:k]) and found.cut == (k < 32)
    for n in (40, 41, 42, 44, 79, 80, 95):
        found = parse_ftok(whole[:n])
        if k := len(found.ids):
            assert torch.equal(decode_ftok(found, tiny), tiny.detokenize(ids[None, :k], HOW))
        assert decode_ftok(found, tiny).shape == (1, 3, 64, 64)


def test_coarser_and_coarser(tiny, scene, whole):
    """What the file is for: the more bytes, the nearer."""
    error = [float((decode_ftok(parse_ftok(whole[:n]), tiny) - scene).abs().mean()) for n in (40, 42, 50, 80)]
    assert error == sorted(error, reverse=True) and error[0] > 3 * error[-1]


@pytest.mark.parametrize("solver", ("euler", "heun"))
def test_no_tokens_are_the_null_condition(tiny, whole, solver):
    file = parse_ftok(whole[:41])
    s = SamplingConfig(steps=3, guidance=5.0, apg=True, solver=solver, seed=4)
    found = decode_ftok(file, tiny, sampling=s)
    times = torch.linspace(1, 0, 4)
    null = tiny.decoder.null_condition(1)

    def velocity(x, i):  # plain, all 32 positions, no guidance
        return tiny.decoder(x, tiny.decoder.modulations(times[i : i + 1]), null, None)

    with torch.no_grad():
        noise = noise_like((4, 8, 8), 4, [0])
        if solver == "euler":
            plain = tiny.vae.decode(euler(velocity, noise, 3)).clamp(-1, 1)
            assert (found - plain).abs().max() < 1e-4
    uncond = replace(s, guidance=0.0, apg=False)
    for i in (0, 999):
        assert torch.equal(found, tiny.detokenize(torch.tensor([[i]]), uncond))
    assert not torch.equal(found, tiny.detokenize(torch.tensor([[0]]), s))
    assert torch.equal(found, decode_ftok(parse_ftok(whole), tiny, 0, s))


# --- what is refused ---------------------------------------------------------------------------------------


def test_every_bit_counts(whole):
    right = parse_ftok(whole)
    for at in range(8 * len(whole)):
        wrong = bytearray(whole)
        wrong[at // 8] ^= 128 >> at % 8
        wrong = bytes(wrong)
        # the length of the trailer's chunk: if it grows it looks cut, and is not looked at
        if 80 <= at // 8 < 84 and int.from_bytes(wrong[80:84], "big") <= 2**12:
            if int.from_bytes(wrong[80:84], "big") > 4:
                assert torch.equal(parse_ftok(wrong).ids, right.ids)
                continue
        with pytest.raises(FtokError):
            parse_ftok(wrong)
        if at >= 320 and at < 640:  # without the trailer it is another id, or none of the vocabulary
            try:
                assert int((parse_ftok(wrong[:80]).ids != right.ids).sum()) == 1
            except FtokError as error:
                assert "vocabulary" in str(error)


TRANSFERS = {
    "CR-LF became LF": lambda d: d.replace(b"\r\n", b"\n"),
    "line end became CR": lambda d: d.replace(b"\r\n", b"\r").replace(b"\n", b"\r"),
    "every LF became CR)": lambda d: d.replace(b"\n", b"\r"),
    "every CR became LF": lambda d: d.replace(b"\r", b"\n"),
    "every LF became CR-LF": lambda d: d.replace(b"\n", b"\r\n"),
    "single LF became CR-LF": lambda d: d.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"),
    "Ctrl-Z was dropped": lambda d: d.replace(b"\x1a", b""),
    "at its Ctrl-Z": lambda d: d.split(b"\x1a")[0],
    "highest bit": lambda d: bytes(b & 127 for b in d),
    "Latin-1": lambda d: d.decode("latin-1").encode(),
    "was replaced (UTF-8)": lambda d: d.decode("utf-8", "replace").encode(),
    "was replaced)": lambda d: d.decode("latin-1").encode("ascii", "replace"),
    "was dropped)": lambda d: d.decode("latin-1").encode("ascii", "ignore"),
}


@pytest.mark.parametrize("name", TRANSFERS)
def test_a_transfer_in_text_mode_is_named(name, whole):
    with pytest.raises(FtokError) as caught:
        parse_ftok(TRANSFERS[name](whole))
    said = str(caught.value)
    assert name.replace(" (UTF-8)", "") in said
    assert "text mode" in said or name == "at its Ctrl-Z"


@pytest.mark.parametrize(
    "at, value, says",
    (
        (8, b"\x02", "version 2 of the format"),
        (9, b"\x03", "flags 0x03"),
        (10, b"\0\0", "width 0"),
        (14, b"\0\x21", "stored 33"),
        (16, b"\0\0", "full 0"),
        (18, b"\x09", "9 bits an id, and a vocabulary of 1000 needs 10"),
        (19, b"\0\0\0\0", "vocabulary 0"),
        (32, b"\x80\0", "guidance -327.68"),
    ),
)
def test_headers_whose_checksum_is_right(at, value, says, whole):
    with pytest.raises(FtokError, match=says):
        parse_ftok(sealed(whole[:at] + value + whole[at + len(value) :]))


def test_trailers(whole):
    body = whole[40:80]

    def with_chunk(kind, data=b"later"):
        crc = zlib.crc32(kind + data).to_bytes(4, "big")
        return whole[:80] + len(data).to_bytes(4, "big") + kind + data + crc

    assert not parse_ftok(with_chunk(b"note") + whole[80:]).cut, "small letter: skipped"
    assert not parse_ftok(whole + with_chunk(b"note")[80:]).cut
    for data, says in (
        (with_chunk(b"Must"), "needs 'Must'"),
        (with_chunk(b"bsum", b"abc"), "ids are damaged"),
        (with_chunk(b"note")[:-1] + b"x", "chunk 'note' behind the ids is damaged"),
        (with_chunk(b"note") + whole[80:88] + bytes(8), "chunk 'bsum'"),
        (whole[:80] + b"\xff" * 16, "no trailer"),
        (whole + bytes(2**19), "more than"),
    ):
        with pytest.raises(FtokError, match=says):
            parse_ftok(data)
    bare = sealed(whole[:9] + b"\0" + whole[10:])
    assert torch.equal(parse_ftok(bare[:80]).ids, unpack_ids(body, 10))
    with pytest.raises(FtokError, match="16 bytes follow the last id"):
        parse_ftok(bare)


def test_ids_outside_the_vocabulary(whole):
    first = whole[:40] + (999 << 6).to_bytes(2, "big")
    assert parse_ftok(first).ids.tolist() == [999]
    for wrong in (1000, 1023):
        with pytest.raises(FtokError, match=f"token 0 is {wrong}, and the vocabulary has 1000"):
            parse_ftok(whole[:40] + (wrong << 6).to_bytes(2, "big"))
    assert parse_ftok(whole[:40] + b"\xff").ids.tolist() == [], "8 bits of a wrong one are none"


def test_what_cannot_be_written(tiny, tmp_path):
    ids = torch.arange(4)
    for wrong, says in (
        (dict(ids=ids.float()), "integers"),
        (dict(ids=ids.view(2, 2)), "integers"),
        (dict(ids=ids.bool()), "integers"),
        (dict(ids=ids + 997), "0 .. 999"),
        (dict(ids=ids - 1), "0 .. 999"),
        (dict(ids=torch.arange(33)), "stored 33"),
        (dict(sampling=SamplingConfig(steps=256)), "steps 256"),
        (dict(sampling=SamplingConfig(steps=0)), "steps 0"),
        (dict(sampling=SamplingConfig(guidance=float("nan"))), "guidance nan"),
        (dict(sampling=SamplingConfig(guidance=lambda t: t)), "guidance"),
        (dict(sampling=SamplingConfig(seed=-1)), "seed -1"),
        (dict(sampling=SamplingConfig(seed=None)), "seed None"),
        (dict(sampling=SamplingConfig(seed=2**16)), "seed 65536"),
    ):
        with pytest.raises(FtokError, match=says):
            write_ftok(tmp_path / "x.ftok", **({"tok": tiny, "ids": ids} | wrong))
    assert not list(tmp_path.iterdir())
    assert write_ftok(tmp_path / "x.ftok", tiny, ids[None].int(), SamplingConfig(steps=1, guidance=2)) == 61
    assert read_ftok(tmp_path / "x.ftok", tiny).ids.tolist() == [0, 1, 2, 3]
    assert is_ours(tmp_path / "x.ftok")


def test_another_tokenizers_ids_are_refused(tmp_path):
    tok, permuted = small(), small(levels=(5, 8, 5, 5))
    ids = tok.tokenize(torch.zeros(1, 3, tok.image_size, tok.image_size))
    write_ftok(tmp_path / "x.ftok", tok, ids)
    assert torch.equal(read_ftok(tmp_path / "x.ftok", tok).ids, ids[0])
    with pytest.raises(FtokError, match=f"x.ftok: .*{tok.identity}.*not of {permuted.identity}"):
        read_ftok(tmp_path / "x.ftok", permuted)
    with pytest.raises(FtokError, match=tok.identity):
        decode_ftok(read_ftok(tmp_path / "x.ftok"), permuted)
    data = (tmp_path / "x.ftok").read_bytes()
    with pytest.raises(FtokError, match="its tokenizer has"):
        decode_ftok(parse_ftok(sealed(data[:16] + b"\0\x09" + data[18:])), tok)
    for k in (-1, 9):
        with pytest.raises(FtokError, match=f"a budget of {k}: 8 tokens"):
            decode_ftok(parse_ftok(data), tok, k)


def test_files_that_are_none(tmp_path, whole):
    with pytest.raises(FileNotFoundError, match="not there"):
        read_ftok(tmp_path / "x.ftok")
    with pytest.raises(FileNotFoundError):
        read_ftok(tmp_path)
    (tmp_path / "x.ftok").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\n")
    with pytest.raises(FtokError, match="git lfs pull"):
        read_ftok(tmp_path / "x.ftok")
    with open(tmp_path / "x.ftok", "wb") as file:  # sparse, a terabyte
        file.write(whole)
        file.truncate(2**40)
    tracemalloc.start()
    with pytest.raises(FtokError, match="x.ftok: more than"):
        read_ftok(tmp_path / "x.ftok")
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


# --- other tokenizers --------------------------------------------------------------------------------------


class Fixed(Greys):
    """Takes whole lists alone, and its identity is a name."""

    identity, token_counts = "fixed, version 3", (4,)

    def detokenize(self, ids, sampling=None, *, first_index=0, **settings):
        if any(len(row) < 4 for row in ids):
            raise ValueError("4 tokens, no fewer")
        return super().detokenize(ids, sampling)


def test_any_tokenizer(tmp_path):
    """Whatever keeps to the protocol, also without a null condition, or of fixed length."""
    image = torch.linspace(-1, 1, 8)[None, None, :, None].expand(1, 3, 8, 8)
    for tok in (Greys(), Fixed()):
        write_ftok(tmp_path / "x.ftok", tok, tok.tokenize(image))
        file = read_ftok(tmp_path / "x.ftok", tok)
        assert file.header.bits == 4 and file.header.body_bytes == 2
        assert torch.equal(decode_ftok(file, tok), tok.detokenize(tok.tokenize(image)))
    cut = Ftok(file.header, file.ids[:2])
    with pytest.raises(FtokError, match="2 tokens cannot be decoded: 4 tokens, no fewer"):
        decode_ftok(cut, tok)
    with pytest.raises(FtokError, match="0 tokens cannot be decoded"):
        decode_ftok(cut, tok, 0)
    write_ftok(tmp_path / "x.ftok", Greys(), Greys().tokenize(image))
    nothing = decode_ftok(read_ftok(tmp_path / "x.ftok"), Greys(), 0)
    assert (nothing == 1).all(), "it draws white where nothing is known"


# --- the commands ------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("a.png", "b b.png", "c.png")):
        pixels = ToyScenes("val", 96, level=2)[i].image.add(1).mul(127.5).byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(tmp_path / name)
    (tmp_path / "broken.jpg").write_text("no picture")
    return tmp_path


CPU = ("--device", "cpu")


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_photo_and_back(photos, capsys):
    assert call("encode", "a.png", "a.ftok", *CPU) == 0
    assert "32 tokens in 96 bytes" in capsys.readouterr().out
    assert call("decode", "a.ftok", "back.png", *CPU) == 0
    assert "back.png: 32 of 32 tokens" in capsys.readouterr().out
    assert call("tokenize", "a.png", "--tokenizer", "tiny", *CPU) == 0
    ids = json.loads(Path("ids.jsonl").read_text().splitlines()[1])["ids"]
    assert read_ftok("a.ftok").ids.tolist() == ids, "as flextok_tokenize"
    assert call("detokenize", "ids.jsonl", "--tokenizer", "tiny", "--budgets", 4, 32, *CPU) == 0
    assert (pixels("back.png") == pixels("pictures/0000_a_032.png")).all(), "as flextok_detokenize"
    Path("cut.ftok").write_bytes(Path("a.ftok").read_bytes()[:45])
    assert call("decode", "cut.ftok", "back.png", *CPU) == 0
    assert "back.png: 4 of 32 tokens" in capsys.readouterr().out
    assert (pixels("back.png") == pixels("pictures/0000_a_004.png")).all()
    assert call("decode", "a.ftok", "x.png", "--budgets", 4, 0, *CPU) == 0
    assert (pixels("x_004.png") == pixels("back.png")).all() and Path("x_000.png").exists()
    assert call("decode", "a.ftok", "one.png", "--budgets", 4, *CPU) == 0
    assert (pixels("one.png") == pixels("back.png")).all()


def test_what_the_file_asks_for(photos):
    """The hints are used, and an option goes before them."""
    how = dict(steps=2, guidance=3.5, seed=9)
    given = [a for name, value in how.items() for a in (f"--{name}", value)]
    assert call("encode", "a.png", "a.ftok", "--budget", 6, "--bare", *given, *CPU) == 0
    file = read_ftok("a.ftok")
    assert Path("a.ftok").stat().st_size == 48 and len(file.ids) == 6
    assert file.header.hints == SamplingConfig(**how)
    assert call("decode", "a.ftok", "hints.png", *CPU) == 0
    assert call("decode", "a.ftok", "same.png", "--tokenizer", "tiny", *given, *CPU) == 0
    assert (pixels("hints.png") == pixels("same.png")).all()
    for name, value in dict(steps=3, guidance=1, seed=8).items():
        assert call("decode", "a.ftok", "other.png", f"--{name}", value, *CPU) == 0
        assert (pixels("hints.png") != pixels("other.png")).any(), name


def test_several(photos, capsys):
    assert call("encode", ".", "--out", "files", "--batch", 3, *CPU) == 1
    said = capsys.readouterr()
    assert "3 of 4 pictures in files" in said.out and "1 of 4 pictures could not be read" in said.err
    assert sorted(f.name for f in Path("files").iterdir()) == ["a.ftok", "b b.ftok", "c.ftok"]
    for name in ("a", "b b", "c"):
        assert call("encode", f"{name}.png", "one.ftok", *CPU) == 0
        assert Path("one.ftok").read_bytes() == Path(f"files/{name}.ftok").read_bytes(), "whatever the batch"
    Path("files/d.ftok").write_bytes(Path("files/c.ftok").read_bytes().replace(b"\r\n", b"\n"))
    assert call("decode", "files", "--budgets", 2, 32, *CPU) == 1
    assert "left out: files/d.ftok: damaged by a transfer in text mode" in capsys.readouterr().err
    assert sorted(f.name for f in Path("pictures").iterdir()) == [
        *("a_002.png", "a_032.png", "b b_002.png", "b b_032.png", "c_002.png", "c_032.png")
    ]
    Path("cut.ftok").write_bytes(Path("files/a.ftok").read_bytes()[:43])
    assert call("decode", "cut.ftok", "--budgets", 2, 32, *CPU) == 0
    assert "left out: 32" in capsys.readouterr().err
    assert (pixels("pictures/cut_002.png") == pixels("pictures/a_002.png")).all(), "whatever is beside it"


def test_mistakes(photos, capsys):
    assert call("encode", "a.png", "a.ftok", *CPU) == 0
    Path("photo.ftok").write_text("somebody else's")
    Path("sub").mkdir()
    Path("sub/a.jpg").write_bytes(Path("a.png").read_bytes())
    for status, says, *argv in (
        (1, "did not write it: choose another name, or --force", "encode", "a.png", "photo.ftok"),
        (1, "not there", "encode", "nothing.png", "x.ftok"),
        (1, "broken.jpg: cannot be read as a picture", "encode", "broken.jpg", "x.ftok"),
        (2, "one file for several pictures", "encode", "a.png", "c.png", "x.ftok"),
        (2, "one file for several pictures", "encode", "sub", "x.ftok"),
        (2, "a.ftok: two of the files", "encode", "a.png", "sub/a.jpg"),
        (2, "give one of them", "encode", "a.png", "x.ftok", "--out", "y"),
        (1, "--budget must be an integer in 1 .. 32, not 33", "encode", "a.png", "x.ftok", "--budget", 33),
        (2, "seed 70000", "encode", "a.png", "x.ftok", "--seed", 70000),
        (2, "at least one step", "encode", "a.png", "x.ftok", "--steps", 0),
        (1, "did not write it", "decode", "a.ftok", "a.png"),
        (2, "a .png is written", "decode", "a.ftok", "x.jpg"),
        (2, "one file for several", "decode", "a.ftok", "a.ftok", "x.png"),
        (1, "not there", "decode", "nothing.ftok", "x.png"),
        (1, "no .ftok files in sub", "decode", "sub"),
        (1, "photo.ftok: no .ftok file", "decode", "photo.ftok", "x.png"),
        (2, "--budgets -1", "decode", "a.ftok", "x.png", "--budgets", -1),
        (1, "32 tokens are there, and --budgets asks for 40", "decode", "a.ftok", "x.png", "--budgets", 40),
        (1, "not of f4dd89c4f9322cdd", "decode", "a.ftok", "x.png", "--tokenizer", "clipart"),
    ):
        refused(capsys, status, says, *argv, *CPU)
    assert not list(photos.glob("x.*")) and Path("photo.ftok").read_text() == "somebody else's"
    assert call("encode", "a.png", "photo.ftok", "--force", *CPU) == 0
    assert call("encode", "c.png", "photo.ftok", *CPU) == 0, "a .ftok file is ours"


def test_whose_file_is_it(photos, capsys, monkeypatch):
    """Found among the models that come with the package, or said."""
    assert call("encode", "a.png", "a.ftok", "--tokenizer", "clipart", *CPU) == 0
    assert call("decode", "a.ftok", "x.png", *CPU) == 0
    data = Path("a.ftok").read_bytes()
    Path("a.ftok").write_bytes(sealed(data[:23] + b"\0" * 8 + data[31:]))
    refused(capsys, 1, "tokenizer 0000000000000000 (32 tokens", "decode", "a.ftok", "y.png", *CPU)
    monkeypatch.setitem(engine_tokenizers.TOKENIZERS, "greys", Greys)
    Path("greys").mkdir()
    facts = {"kind": "greys", "config": {}, "weights": "0" * 16}
    Path("greys/config.json").write_text(json.dumps(facts))
    whose = ("--tokenizer", "greys", *CPU)
    assert call("encode", "a.png", "g.ftok", *whose) == 0 and Path("g.ftok").stat().st_size == 40 + 2 + 16
    assert call("decode", "g.ftok", "g.png", *whose) == 0 and pixels("g.png").shape == (8, 8, 3)


# --- anything at all ---------------------------------------------------------------------------------------


def mutant(rng: random.Random, data: bytes) -> bytes:
    """Cut, flipped, sent as text; half of them with a checksum that is right, so that the rest is read."""
    action = rng.random()
    if action < 0.1:
        data = data[: rng.randrange(len(data) + 1)]
    elif action < 0.2:
        data = rng.choice(list(TRANSFERS.values()))(data)
    elif action < 0.5:
        header = bytearray(data[:40])
        for _ in range(rng.choice((1, 1, 2))):  # one of its numbers
            at, size = rng.choice(
                ((8, 1), (9, 1), *[(i, 2) for i in (10, 12, 14, 16)], (18, 1), (19, 4), (23, 8))
            )
            if rng.random() < 0.4:
                at, size = rng.choice(((31, 1), (32, 2), (34, 2)))
            header[at : at + size] = rng.choice((rng.randbytes(size), bytes(size), b"\xff" * size))
        data = bytes(header) + data[40:]
    elif action < 0.7:
        body = bytearray(data[40:])
        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        data = data[:40] + bytes(body)[: rng.choice((3, 17, 40, 56))]
    else:
        data = mutated_bytes(rng, data)
    return sealed(data) if len(data) >= 40 and rng.random() < 0.7 else data


def test_anything_at_all_is_parsed_or_refused(whole):
    reasons, slowest = Counter(), 0.0

    def case(rng):
        nonlocal slowest
        data, began = mutant(rng, whole), time.process_time()
        try:
            found = parse_ftok(data)
        except FtokError as error:
            reasons[" ".join(str(error).split()[:3])] += 1
            raise
        finally:
            slowest = max(slowest, time.process_time() - began)
        h, ids = found.header, found.ids
        assert len(ids) <= h.stored <= h.full and len(ids) <= 8 * (len(data) - 40) // h.bits
        assert not len(ids) or 0 <= int(ids.min()) <= int(ids.max()) < h.vocabulary
        assert read_header(h.pack()) == h

    heard = fuzz("ftok", case, (FtokError,), PARSED)
    tracemalloc.start()
    for i in range(200):
        try:
            parse_ftok(mutant(random.Random(i), whole))
        except FtokError:
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{len(reasons)} reasons, slowest {1000 * slowest:.1f} ms, {peak / 1000:.0f} kB at most")
    assert heard["fine"] > PARSED / 10 and heard["FtokError"] > PARSED / 3 and len(reasons) >= 12
    assert slowest < 1 and peak < 2e6


def reads(data: bytes) -> bool:
    try:
        return bool(parse_ftok(data))
    except FtokError:
        return False


def test_what_is_parsed_is_a_picture_or_refused(tiny, whole, tmp_path):
    slowest = 0.0

    def case(rng):
        nonlocal slowest
        data = b""
        while not reads(data):
            data = mutant(rng, whole)
        (tmp_path / "x.ftok").write_bytes(data)
        began = time.process_time()
        try:
            image = decode_ftok(read_ftok(tmp_path / "x.ftok"), tiny)
        finally:
            slowest = max(slowest, time.process_time() - began)
        assert image.shape == (1, 3, 64, 64) and image.isfinite().all() and image.abs().max() <= 1

    heard = fuzz("ftok decoded", case, (FtokError,), DECODED)
    print(f"slowest {slowest:.2f} s")
    assert heard["fine"] > DECODED / 2 and slowest < 60


def test_what_the_header_cannot_say_is_refused(tiny):
    """A hint that would be lost, and an identity that would be padded or cut."""
    for more in ({"apg": True}, {"solver": "heun"}):
        with pytest.raises(FtokError, match="says more"):
            header_for(tiny, 4, replace(HOW, **more))
    header = header_for(tiny, 4, HOW)
    for identity in ("zz", "abcd", header.identity + "0"):
        with pytest.raises(FtokError, match="16 hexadecimal"):
            replace(header, identity=identity)
