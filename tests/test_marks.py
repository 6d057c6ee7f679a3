"""A file that somebody else wrote, or that is being read, is not replaced (*marks*; the commands use it)."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flextok_edu.engine.marks import is_ours, may_replace, save_picture
from flextok_edu.evaluation.report import Report

PIXELS = np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8)


def test_a_picture_carries_the_mark(tmp_path):
    save_picture(tmp_path / "a.png", PIXELS)
    save_picture(tmp_path / "b.png", Image.fromarray(PIXELS[..., 0]))
    with Image.open(tmp_path / "a.png") as image:
        assert image.text["Software"] == "flextok_edu" and np.array_equal(np.asarray(image), PIXELS)
    assert is_ours(tmp_path / "a.png") and is_ours(tmp_path / "b.png")


def others(folder):
    """Files of a person: photos, a PNG by another program, notes, data that look a bit like ours."""
    Image.fromarray(PIXELS).save(folder / "photo.png")
    Image.fromarray(PIXELS).save(folder / "photo.jpg")
    info = PngInfo()
    info.add_text("Software", "flextok_edu_viewer")
    info.add_text("Comment", "Software\0flextok_edu")
    Image.fromarray(PIXELS).save(folder / "other.png", pnginfo=info)
    (folder / "cut.png").write_bytes((folder / "photo.png").read_bytes()[:30])
    (folder / "huge chunk.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\xff\xff\xff\xff" + b"aaaa")
    (folder / "note.txt").write_text("flextok_edu is nice")
    (folder / "list.json").write_text('["format", "flextok_edu.table"]')
    (folder / "late.json").write_text('{"mine": 1, "format": "flextok_edu.table"}')
    (folder / "none.json").write_text("")
    return sorted(f for f in folder.iterdir())


def test_what_is_not_ours(tmp_path):
    for file in others(tmp_path):
        assert not is_ours(file), file.name
        before = file.read_bytes()
        with pytest.raises(ValueError, match="did not write it.*--force"):
            may_replace(file)
        may_replace(file, force=True)
        assert file.read_bytes() == before


def test_what_is_ours(tmp_path):
    """Everything of a table; tables and scores of before there was a mark; ids, runs, pages."""
    row = {"what": "tokens", "tokens": 1, "n": 3, "mae": 0.5}
    Report(
        [row], {"data_hash": "0", "extractors": []}, ["a note"], {"tokens/1/mae": torch.full((3,), 0.5)}
    ).save(tmp_path)
    stored = json.loads((tmp_path / "table.json").read_text())
    (tmp_path / "old.json").write_text(
        json.dumps({k: v for k, v in stored.items() if k != "format"}, indent=1)
    )
    (tmp_path / "ids.jsonl").write_text('{"format": "flextok_edu.ids", "tokenizer": "0"}\n')
    (tmp_path / "run.json").write_text('{\n "command": "flextok_eval", "options": {}}')
    (tmp_path / "report.html").write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>FlexTok: scenes</title>'
    )
    files = list(tmp_path.iterdir())
    assert len(files) == 7
    for file in files:
        assert is_ours(file), file.name
        may_replace(file)


def test_what_is_read_is_never_replaced(tmp_path, monkeypatch):
    """By any of its names, with --force too, and were it ours: another spelling, a link, a hard link, a
    relative path.
    """
    save_picture(tmp_path / "a.png", PIXELS)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    os.link(tmp_path / "a.png", tmp_path / "hard.png")
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "./a.png", "sub/../a.png", "link.png", "hard.png", str(tmp_path / "a.png")):
        with pytest.raises(ValueError, match="one of the files that are read"):
            may_replace(name, True, [tmp_path / "b.png", tmp_path / "a.png"])
    may_replace("c.png", False, [tmp_path / "a.png"])
    with pytest.raises(ValueError, match="files that are read"):
        may_replace("missing.png", False, [tmp_path / "missing.png"])


def test_folders_and_devices(tmp_path):
    for place in (tmp_path, os.devnull):
        with pytest.raises(ValueError, match="no ordinary file"):
            may_replace(place, True)
