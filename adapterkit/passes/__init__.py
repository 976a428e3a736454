"""Changes to an adapter, each named, with a promise of its own."""

from adapterkit.passes.protocol import Context, Note, Pass, Passed
from adapterkit.passes.registry import PASSES, apply, by_name

__all__ = ["PASSES", "Context", "Note", "Pass", "Passed", "apply", "by_name"]
