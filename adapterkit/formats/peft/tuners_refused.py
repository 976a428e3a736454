"""The PEFT adapters that are no low-rank update of a weight by their file alone, and why.

Definitions are those of PEFT 0.21.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

MERGE = (
    "merge it in PEFT (merge_and_unload, save_pretrained), then `adapterkit extract --base BASE "
    "--tuned MERGED` makes a LoRA of the difference and says how near it comes"
)
_KEEP = "it can only be served with PEFT"
_ROTATES = f"it rotates the base weight, so its update depends on that weight; {MERGE}"
_MULTIPLIES = f"it multiplies the base weight, so its update depends on that weight; {MERGE}"
_FROM_SVD = f"it is defined on the singular vectors of the base weight; {MERGE}"
_FULL_RANK = f"its update has full rank; {MERGE}"
_PROMPT = f"it trains virtual tokens, not weights; {_KEEP}"
_ROUTED = f"it mixes several updates anew for every input; {_KEEP}"
_SEEDED = (
    f"its update follows from indices that are drawn from a seed and are not in the file; {MERGE}"
)

REFUSED: Mapping[str, str] = {
    "ADAMSS": _FROM_SVD,
    "ADAPTION_PROMPT": f"it adds attention to trained prompts, no change of a weight; {_KEEP}",
    "BOFT": _ROTATES,
    "BONE": "PEFT replaced it by MISS; convert it there first (scripts/convert-bone-to-miss.py)",
    "C3A": f"its update is block-circulant; {_FULL_RANK}",
    "CARTRIDGE": f"it trains a key-value cache, not weights; {_KEEP}",
    "CPT": _PROMPT,
    "DEFT": f"it replaces a projection of the base weight; {MERGE}",
    "FOURIERFT": _SEEDED,
    "FROD": _FROM_SVD,
    "GLORA": f"it scales and shifts the base weight and its bias; {MERGE}",
    "HIRA": _MULTIPLIES,
    "LILY": _ROUTED,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "OFT": _ROTATES,
    "OSF": _FROM_SVD,
    "PEANUT": f"it is a small network of the base weight; {MERGE}",
    "POLY": _ROUTED,
    "PREFIX_TUNING": f"it trains a prefix of keys and values, not weights; {_KEEP}",
    "PROMPT_TUNING": _PROMPT,
    "PSOFT": _FROM_SVD,
    "PVERA": f"it draws its update at random, from a distribution; {_KEEP}",
    "P_TUNING": _PROMPT,
    "RANDLORA": _FULL_RANK,
    "ROAD": _ROTATES,
    "SHADOW": f"it runs a second network beside the base; {_KEEP}",
    "SHIRA": f"its update is sparse; {_FULL_RANK}",
    "SUPERTUNING": f"its update is sparse; {_FULL_RANK}",
    "UNILORA": _SEEDED,
    "WAVEFT": _SEEDED,
    "XLORA": _ROUTED,
}
