"""A word out of a few, and the one that was meant if it is none of them."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import click


class Choice(click.Choice[str]):
    """A choice that answers a slip of the fingers with what was probably meant."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """Return what is wrong with a word, and which one is close to it."""
        message = super().get_invalid_choice_message(value, ctx)
        close = get_close_matches(str(value).lower(), list(self.choices), n=1)
        return f"{message} Did you mean {close[0]}?" if close else message
