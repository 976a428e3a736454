"""Small JSON documents that come from strangers."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, cast

from adapterkit import strangers
from adapterkit.errors import FormatError
from adapterkit.storage import read_document

if TYPE_CHECKING:
    from pathlib import Path

# A sharded 700B model's index is 10 MB; a config that is larger than this is not a config.
_LIMIT = 64 << 20
# A checkpoint of 200,000 tensors has half as many; each costs some hundred bytes of memory.
_MOST_VALUES = 500_000
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds, keys in file order.

    Raises:
        NotFoundError: if there is no such file.
        FormatError: if it is not UTF-8 JSON, not an object, or absurdly large.
    """
    data = read_document(path, _LIMIT)
    if (count := json_values(data)) > _MOST_VALUES:
        raise FormatError(f"holds some {count} values, the most is {_MOST_VALUES}", path=path)
    try:
        value = json.loads(data.decode("utf-8"))
        if _SURROGATE.search(data):
            # Half a surrogate pair passes for text until it is written somewhere.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        what = f"is not readable JSON ({error}); mend it, or download or copy it again"
        raise FormatError(strangers.content(path, weights=False) or what, path=path) from None
    if not isinstance(value, dict):
        raise FormatError("is not a JSON object; download or copy it again", path=path)
    return cast("dict[str, Any]", value)


def json_values(data: bytes) -> int:
    """Return the most values that a JSON text can hold, without reading it.

    Each value but the first of a list or object stands after a comma. Marks inside of texts are
    counted too.
    """
    return data.count(b",") + data.count(b"[") + data.count(b"{")
