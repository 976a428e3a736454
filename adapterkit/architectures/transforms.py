"""Row orders of llama.cpp, as index maps.

Each function returns `index` of length `rows` such that `engine = hugging_face[index]` along the
permuted axis. An index map is its own proof of losslessness (it is a permutation) and has an exact
inverse, `inverse(index)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    Index = np.ndarray[Any, np.dtype[np.intp]]


def inverse(index: Index) -> Index:
    """Return the map back: `x[index][inverse(index)] == x`."""
    import numpy as np

    back = np.empty_like(index)
    back[index] = np.arange(len(index))
    return back


def rope(rows: int, heads: int) -> Index:
    """Interleave the two rotary halves of every head.

    Hugging Face stores a head as [x_0..x_h, y_0..y_h]; llama.cpp's "normal" rotary embedding wants
    [x_0, y_0, x_1, y_1, ...].

    Args:
        rows: rows of the weight, heads times head size.
        heads: query heads for q, key-value heads for k.
    """
    return _grid(rows, heads, 2, -1).swapaxes(1, 2).reshape(-1)


def halved(rows: int, heads: int, rotary: int) -> Index:
    """Gather the even and then the odd ones of the first `rotary` rows of every head.

    The way back from `rope`, where Hugging Face rotates neighbouring rows and llama.cpp halves.
    """
    import numpy as np

    grid = _grid(rows, heads, -1)
    parts = (grid[:, 0:rotary:2], grid[:, 1:rotary:2], grid[:, rotary:])
    return np.concatenate(parts, axis=1).reshape(-1)


def qkv(rows: int, heads: int, groups: int) -> Index:
    """Gather fused, grouped q, k, v into [all q; all k; all v].

    Stored order is (group, [q * heads/groups, k, v], head size): Falcon and InternLM2 with several
    query heads per group, GPT-NeoX and Bloom with one (groups == heads).
    """
    import numpy as np

    per_group = heads // groups
    grid = _grid(rows, groups, per_group + 2, -1)
    parts = (grid[:, :per_group], grid[:, per_group], grid[:, per_group + 1])
    return np.concatenate([part.reshape(-1) for part in parts])


def gathered(rows: int, groups: int, *heights: int) -> Index:
    """Gather groups of unequal parts, [a, b, c] each, into [all a; all b; all c]."""
    import numpy as np

    grid = _grid(rows, groups, sum(heights))
    parts = np.split(grid, np.cumsum(heights)[:-1], axis=1)
    return np.concatenate([part.reshape(-1) for part in parts])


def tiled(rows: int, groups: int, members: int, kept: int = 0) -> Index:
    """Deal out the heads of groups in turn: [first of every group; second of every group; ...].

    Hugging Face repeats a key head for the value heads of its group, which stand together;
    llama.cpp repeats the row of key heads as a whole. The first `kept` rows stay.
    """
    import numpy as np

    grid = _grid(rows - kept, groups, members, -1) + kept
    return np.concatenate([np.arange(kept), grid.swapaxes(0, 1).reshape(-1)])


def interleaved(rows: int, parts: int) -> Index:
    """Gather rows dealt out in turn (gate, up, gate, up, ...) into one block per part."""
    return _grid(rows, -1, parts).swapaxes(0, 1).reshape(-1)


def _grid(rows: int, *sizes: int) -> Index:
    import numpy as np

    return np.arange(rows).reshape(sizes)


TRANSFORMS: dict[str, Callable[..., Index]] = {
    "rope": rope,
    "halved": halved,
    "qkv": qkv,
    "gathered": gathered,
    "tiled": tiled,
    "interleaved": interleaved,
}
