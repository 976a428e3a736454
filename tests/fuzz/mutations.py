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
# Types of GGUF's values: how a number is packed, by the type's own number.
PACKED = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
STRANGE = (b"", b"\0", b"\xff\xfe", b"n" * 5000, b"../../x", b"{}", b"general.alignment", b"1e400")
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


def fields(data: bytes, random: Random) -> bytes:
    """Change entries of a GGUF file's header, one as likely as the other; or its bytes.

    The header stays well formed: what is wrong is a type, a value, a name, or that one is gone.
    """
    if random.random() < 0.4:
        return damaged(data, random)
    entries, tensors, values = opened(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        place = random.randrange(len(entries)) if entries else 0
        key, kind, value = entries[place] if entries else (b"", TEXT, _sized(b""))
        what = random.random()
        if what < 0.05 and entries:
            del entries[place]
        elif what < 0.1:
            entries.insert(place, (key, kind, value))
        elif what < 0.2:
            entries[place : place + 1] = [(random.choice(STRANGE), kind, value)]
        elif what < 0.6:
            entries[place : place + 1] = [(key, kind, _alike(kind, value, random))]
        else:
            other = random.choice((*PACKED, TEXT, ARRAY, ARRAY))
            entries[place : place + 1] = [(key, other, _value(other, random))]
    return closed(data, entries, tensors, values)


Entry = tuple[bytes, int, bytes]


def opened(data: bytes) -> tuple[list[Entry], bytes, bytes]:
    """Return the entries of a GGUF file's header, its table of tensors, and their values."""
    count, entries = struct.unpack_from("<QQ", data, 8)
    place, found = 24, list[Entry]()
    for _ in range(entries):
        begin, place = place + 8, _past_text(data, place)
        key = data[begin:place]
        (kind,) = struct.unpack_from("<I", data, place)
        begin, place = place + 4, _past_value(data, place + 4, kind)
        found.append((key, kind, data[begin:place]))
    begin = place
    for _ in range(count):
        place = _past_text(data, place)
        (axes,) = struct.unpack_from("<I", data, place)
        place += 4 + 8 * axes + 12
    return found, data[begin:place], data[place + -place % _ALIGNED :]


def closed(data: bytes, entries: list[Entry], tensors: bytes, values: bytes) -> bytes:
    """Return a GGUF file of these parts, with the magic, version and tensor count of another."""
    head = b"".join(_sized(key) + struct.pack("<I", kind) + value for key, kind, value in entries)
    made = data[:16] + struct.pack("<Q", len(entries)) + head + tensors
    return made + bytes(-len(made) % _ALIGNED) + values


_ALIGNED = 32


def _past_text(data: bytes, place: int) -> int:
    return place + 8 + int(struct.unpack_from("<Q", data, place)[0])


def _past_value(data: bytes, place: int, kind: int) -> int:
    if kind == TEXT:
        return _past_text(data, place)
    if kind != ARRAY:
        return place + struct.calcsize(f"<{PACKED[kind]}")
    inner, count = struct.unpack_from("<IQ", data, place)
    place += 12
    if inner in PACKED:
        return place + count * struct.calcsize(f"<{PACKED[inner]}")
    for _ in range(min(count, len(data))):
        place = _past_value(data, place, inner)
    return place


def _alike(kind: int, value: bytes, random: Random) -> bytes:
    """Return another value of a type; of an array, elements of the same type."""
    return _array(value[0], random) if kind == ARRAY else _value(kind, random)


def _value(kind: int, random: Random) -> bytes:
    if kind == TEXT:
        return _sized(random.choice(STRANGE))
    if kind == ARRAY:
        return _array(random.choice((*PACKED, TEXT, ARRAY, 13, 255)), random)
    code = PACKED[kind]
    if code in EDGES:
        return struct.pack(f"<{code}", random.choice((*EDGES[code], -1.0, 1.0, 1e10)))
    size = struct.calcsize(f"<{code}")
    return (random.choice((*NUMBERS, -1)) % (1 << 8 * size)).to_bytes(size, "little")


def _array(kind: int, random: Random) -> bytes:
    """Return an array of a few elements, whose count now and then is not theirs."""
    count = random.choice((0, 1, 2, 3, 5))
    known = kind in PACKED or kind in {TEXT, ARRAY}
    parts = [_value(kind, random) for _ in range(count)] if known else [b"\0" * 8]
    told = count if random.random() < 0.9 else random.choice(NUMBERS)
    return struct.pack("<IQ", kind, told) + b"".join(parts)


def _sized(letters: bytes) -> bytes:
    return struct.pack("<Q", len(letters)) + letters


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
    ".gguf": fields,
    **dict.fromkeys((".npz", ".pt", ".pth", ".bin"), member),
}
