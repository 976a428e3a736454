"""PEFT and transformers without what they always say."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def quiet_peft(*messages: str) -> Iterator[None]:
    """Ignore the warnings of these beginnings, and those of every use of PEFT."""
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.24 for a property by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        for message in messages:
            warnings.filterwarnings("ignore", message, UserWarning)
        yield


@contextmanager
def silence() -> Iterator[None]:
    """Silence what transformers and PEFT say of configurations that no one would train."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
    transformers.logging.set_verbosity(level)
