"""Mutations for the fuzz tests: of bytes, of json, of safetensors files.

Seeded; FLEXTOK_FUZZ=10 makes ten times as many cases.
"""

import contextlib
import copy
import json
import os
import random
import traceback

CASES = int(2000 * float(os.environ.get("FLEXTOK_FUZZ", 1)))
NASTY = (
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    2**31,
    2**63,
    10**9,
    10**30,
    1e308,
    5e-324,
    0.5,
    -1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../x",
    "/etc/passwd",
    "\ud800",
    "\x1b[31m",
    "9" * 5000,
    "F16",
    "I64",
    [],
    {},
    [0],
    [-1, 5],
    [[[]]],
    {"": None},
    [2**40, 2**40],
    ["a"] * 3,
    {"step": "x"},
)


def deep(n=3000):
    value = "[" * n + "]" * n
    return value.encode()


def positions(value, at=()):
    """All paths in nested json."""
    yield at
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from positions(value[key], (*at, key))


def mutated_json(rng: random.Random, value):
    """The same with one to three things wrong."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.choice(list(positions(value)))
        if not at:
            if rng.random() < 0.2:
                value = copy.deepcopy(rng.choice(NASTY))
            continue
        place = value
        for key in at[:-1]:
            place = place[key]
        action = rng.random()
        if action < 0.2:
            del place[at[-1]]
        elif action < 0.3 and isinstance(place, dict):
            place[rng.choice(("", "x", "__metadata__", str(at[-1]) + " "))] = place.pop(at[-1])
        elif action < 0.4 and isinstance(place[at[-1]], int) and not isinstance(place[at[-1]], bool):
            place[at[-1]] += rng.choice((-1, 1, 8, 1000))
        else:
            place[at[-1]] = copy.deepcopy(rng.choice(NASTY))
    return value


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flipped, cut, repeated, overwritten."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not data:
            break
        at, action = rng.randrange(len(data)), rng.random()
        if action < 0.4:
            data[at] ^= 1 << rng.randrange(8)
        elif action < 0.55:
            del data[at : at + rng.choice((1, 8, 1000, len(data)))]
        elif action < 0.7:
            data[at:at] = data[at : at + rng.choice((1, 8, 300))]
        elif action < 0.85:
            data[at : at + 8] = rng.randbytes(8)
        else:
            data[:8] = rng.choice(
                (
                    b"\xff" * 8,
                    b"\0" * 8,
                    (2**40).to_bytes(8, "little"),
                    max(0, len(data) - 8).to_bytes(8, "little"),
                )
            )
    return bytes(data)


def as_json(value) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutated_safetensors(rng: random.Random, data: bytes, key: str) -> bytes:
    """One whose header was changed with care: the length fits, and the text under `key` is json in json."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if rng.random() < 0.5:
        text = json.loads(header["__metadata__"][key])
        header["__metadata__"][key] = (
            json.dumps(mutated_json(rng, text)) if rng.random() < 0.95 else deep().decode()
        )
    else:
        header = mutated_json(rng, header)
    text = as_json(header) if rng.random() < 0.98 else deep()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@contextlib.contextmanager
def little_memory(more=2**30):
    """At most so many bytes more than now, where the system can be told."""
    try:
        import resource

        pages = int(open("/proc/self/statm").read().split()[0])
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(name: str, case, kinds=(ValueError, OSError), cases: int | None = None) -> dict:
    """case(rng) for many seeds: it may raise errors of these kinds and no others.

    Returns how many raised what.
    """
    heard, wrong = {}, {}
    with little_memory():
        for i in range(cases or CASES):
            try:
                case(random.Random(f"{name} {i}"))
                kind = "fine"
            except kinds as error:
                kind = type(error).__name__
                if not str(error).strip():
                    wrong.setdefault("an empty message", (i, kind))
            except Exception as error:
                kind = type(error).__name__
                wrong.setdefault(kind, (i, "".join(traceback.format_exception(error)[-4:])))
            heard[kind] = heard.get(kind, 0) + 1
    print(name, heard)
    assert not wrong, "\n".join(f"{name} {i}: {text}" for i, text in wrong.values())
    return heard
