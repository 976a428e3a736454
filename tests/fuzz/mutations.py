"""Files that are almost right: bytes, numbers and fields of sound ones, some changed."""

from __future__ import annotations

import copy
import io
import json
import struct
import zipfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from random import Random

NUMBERS = (0, 1, 2, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1.5, 1e308, -1e-320, 10**12, 10**400, float("nan")),
    *("", "8" * 500, "\x1b[2J", "\ud800", "a\0b", "../../x", "(", "(a+)+$", ".*", "n" * 5000),
    *([], [[[]]], [1], ["a"], [{}], {}, {"a": [1]}, {"q_proj": "x"}, [[0, 2], [1, 3]]),
)
EDGES: dict[str, tuple[float, ...]] = {
    "e": (0.0, -0.0, 65504.0, -65504.0, 6e-8, float("inf"), float("nan")),
    "f": (0.0, -0.0, 3.4e38, -3.4e38, 1e-45, 1e20, 1e-20, 1e30, float("inf"), float("nan")),
    "d": (0.0, -0.0, 1.7e308, -1.7e308, 5e-324, 1e160, 1e-160, float("inf"), float("nan")),
}
WORDS = (b"{", b"}", b"[", b",", b'"', b":", b"\0", b"\xff", b"PK\x03\x04", b"GGUF", b"\x93NUMPY")


def damaged(data: bytes, random: Random) -> bytes:
    """Change some places of a file: bits, bytes, integers, lengths, spans."""
    made = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        place = (
            random.randrange(len(made) + 1)
            if random.random() < 0.5
            else random.randrange(min(len(made), 512) + 1)
        )
        kind = random.randrange(7)
        if kind == 0 and place < len(made):
            made[place] ^= 1 << random.randrange(8)
        elif kind == 1:
            made[place : place + 1] = bytes([random.randrange(256)])
        elif kind == 2:
            width = random.choice("HIQ")
            number = random.choice(NUMBERS) & (1 << 8 * struct.calcsize(width)) - 1
            made[place : place + struct.calcsize(width)] = struct.pack(f"<{width}", number)
        elif kind == 3:
            del made[place : place + random.randrange(1, 64)]
        elif kind == 4:
            span = made[place : place + random.randrange(1, 64)]
            made[place:place] = span * random.randrange(1, 4)
        elif kind == 5:
            made[place:place] = random.choice(WORDS)
        else:
            made[place : place + 1] = str(random.choice(NUMBERS)).encode()
    return bytes(made)


def member(data: bytes, random: Random) -> bytes:
    """Change one member of a zip, whose checksums then are right; or the zip itself."""
    if random.random() < 0.3:
        return damaged(data, random)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        infos = old.infolist()
        # The first holds the names and shapes.
        chosen = infos[0] if random.random() < 0.6 else random.choice(infos)
        for info in infos:
            content = old.read(info)
            changed = damaged(content, random) if info is chosen else content
            new.writestr(info.filename, changed)
    return made.getvalue()


def changed(name: str, data: bytes, random: Random) -> bytes:
    """Change a file in the way of its kind, which its suffix tells; now and then as mere bytes."""
    change = _BY_SUFFIX.get(name[name.rfind(".") :])
    if change is None or random.random() < 0.15:
        return damaged(data, random)
    try:
        return change(data, random)
    except Exception:
        return damaged(data, random)  # it was no sound file of its kind


def text(data: bytes, random: Random) -> bytes:
    """Change the document that a JSON file holds."""
    return document(json.loads(data), random)


def lines(data: bytes, random: Random) -> bytes:
    """Change one line of a file of JSON lines."""
    made = data.splitlines()
    place = random.randrange(len(made))
    made[place] = text(made[place], random)
    return b"\n".join([*made, b""])


def header(data: bytes, random: Random) -> bytes:
    """Change the header of a safetensors file, whose length then is right; or its bytes."""
    if random.random() < 0.4:
        return damaged(data, random)
    end = 8 + struct.unpack("<Q", data[:8])[0]
    if random.random() < 0.5:
        return data[:end] + numbers(data[end:], random)
    made = document(json.loads(data[8:end]), random)
    return struct.pack("<Q", len(made)) + made + data[end:]


def numbers(data: bytes, random: Random) -> bytes:
    """Put numbers from the edges of their types into the data of tensors."""
    made = bytearray(data)
    width = random.choice("efd")
    size = struct.calcsize(width)
    for _ in range(random.choice((1, 1, 4, 64, 1024))):
        if len(made) >= size:
            place = random.randrange(len(made) // size) * size
            struct.pack_into(f"<{width}", made, place, random.choice(EDGES[width]))
    return bytes(made)


def document(fields: Any, random: Random) -> bytes:
    """Put other values, keys and nesting into a JSON document."""
    made = json.loads(json.dumps(fields))
    for _ in range(random.choice((1, 1, 2, 4))):
        _change(made, random)
    return json.dumps(made).encode()


def _change(node: Any, random: Random) -> None:
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if isinstance(node, list) and node and random.random() < 0.2:
        node.extend(copy.deepcopy(random.choice(node)) for _ in range(random.choice((1, 2, 50))))
    if not keys:
        return
    key = random.choice(keys)
    if isinstance(node[key], dict | list) and random.random() < 0.6:
        _change(node[key], random)
    elif isinstance(node, dict) and random.random() < 0.1:
        del node[key]
    elif random.random() < 0.1 and isinstance(node, dict):
        node[str(random.choice(VALUES))] = node[key]
    else:
        node[key] = copy.deepcopy(random.choice(VALUES))


_BY_SUFFIX: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": text,
    ".jsonl": lines,
    ".safetensors": header,
    **dict.fromkeys((".npz", ".pt", ".pth", ".bin"), member),
}
