"""What mergekit and PEFT call the methods here, and where their meaning is another."""

from __future__ import annotations

from typing import NamedTuple


class Alias(NamedTuple):
    """Another name of a method.

    Attributes:
        name: as the other program spells it; `-` and `_` are the same.
        method: the method here.
        programs: whose name it is.
        remark: what is not the same; empty where nothing is.
    """

    name: str
    method: str
    programs: str
    remark: str = ""


_L1 = (
    "kept entries are divided by the density, as in the paper and in PEFT; mergekit multiplies "
    "each tensor by what brings back its L1 norm"
)
_COUNT = (
    "signs are elected by the weighted updates and the mean is weighted, as in mergekit; PEFT "
    "elects by the unweighted ones and divides by their number, the same for equal weights"
)
_IN_CORE = "run in core space: on whole matrices it would fill directions that no adapter has"

ALIASES = (
    Alias("task_arithmetic", "task-arithmetic", "mergekit"),
    Alias("model_stock", "model-stock", "mergekit"),
    Alias("dare_linear", "dare", "mergekit, PEFT", _L1),
    Alias("dare_ties", "dare-ties", "mergekit, PEFT", f"{_L1}, and sums those that agree"),
    Alias("breadcrumbs_ties", "breadcrumbs-ties", "mergekit"),
    Alias("della_linear", "della-linear", "mergekit", _L1),
    Alias("magnitude_prune", "magnitude-prune", "PEFT"),
    Alias("magnitude_prune_svd", "magnitude-prune", "PEFT"),
    Alias("ties_svd", "ties", "PEFT", _COUNT),
    Alias("dare_linear_svd", "dare", "PEFT"),
    Alias("dare_ties_svd", "dare-ties", "PEFT", _COUNT),
    Alias("iso_c", "iso-c-core", "the paper", _IN_CORE),
    Alias("iso_cts", "iso-cts-core", "the paper", _IN_CORE),
    Alias("cart", "cart-core", "the paper", "run in core space, where its share is one of rank R"),
)
_BY_NAME = {each.name: each for each in ALIASES}


def alias(name: str) -> Alias | None:
    """Return what a name of another program stands for, None where it is none."""
    return _BY_NAME.get(name.replace("-", "_"))
