"""Commands that messages advise, whole: what is printed can be typed.

SRC is the adapter at hand, BASE the base model, DIR, DST and FILE a new name.
"""

from __future__ import annotations

from typing import Final

MERGE: Final = "adapterkit merge SRC --into BASE -o DST"
MERGE_INSTEAD: Final = f"merge it into the base instead ({MERGE})"
# Where one table is input and output, a merge asks whose the update is.
MERGE_UNTIED: Final = f"merge it into the base instead ({MERGE} --tied untie)"
OR_LEAVE_OUT: Final = "or leave it out with --allow-lossy"
# Of what llama.cpp cannot hold beside its base, and its own converter can.
MERGE_AND_CONVERT: Final = (
    "(adapterkit merge SRC --into DIRECTORY -o DST), and make a GGUF of that with llama.cpp's "
    "convert_hf_to_gguf.py"
)
