"""All that is looked at in an adapter, whatever will run it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.checks.fitting import check_fit
from adapterkit.checks.structure import structure_findings
from adapterkit.checks.values import check_values

if TYPE_CHECKING:
    from adapterkit.base import BaseModel
    from adapterkit.checks.findings import Finding
    from adapterkit.model import AdapterTensorSet


def check(
    adapter: AdapterTensorSet, base: BaseModel | None, *, values: bool = True
) -> list[Finding]:
    """Return the findings about an adapter in memory, alone and on a base.

    Args:
        adapter: broken or not.
        base: its base model; None if it is unknown.
        values: whether to read the tensors; without, only headers are looked at.
    """
    found = list(structure_findings(adapter, base))
    if values:
        found += check_values(adapter)
    return [*found, *check_fit(adapter, base)]
