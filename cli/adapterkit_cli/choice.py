"""A word out of a few, and the one that was meant if it is none of them."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import click


class Choice(click.Choice[str]):
    """A choice that answers a slip of the fingers with what was probably meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the word that was chosen."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            close = get_close_matches(str(value).lower(), list(self.choices), n=1)
            if not close:
                raise
            self.fail(f"{error.message} Did you mean {close[0]}?", param, ctx)
