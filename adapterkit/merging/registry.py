"""The merge methods, as data: what each is, what it takes, and where its function lives.

Five kinds of pure functions on one module, told apart by `Kind`; every update is a `LowRank`:

- COEFFICIENTS: `f(gram, weights, parameters) -> (T,)`, the result is Σ aᵢ ΔWᵢ; `gram` (T, T) holds
  the inner products ⟨ΔWᵢ, ΔWⱼ⟩.
- FACTORS: `f(updates, weights, parameters) -> LowRank`.
- FLAT: like FACTORS, and all singular values of the result are equal, so that none can be left out.
- STACK: like FACTORS, and the result is stored as it is, without another decomposition.
- ELEMENTWISE: an `adapterkit.merging.elementwise.Rule`, applied to the entries of every update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from typing import Any

from adapterkit.merging.aliases import ALIASES, MethodAlias, alias
from adapterkit.plugins import named, plugged_in

_GROUP = "adapterkit.merge_methods"
SPACES = ("delta", "knots", "core", "core-balanced")
_HERE = "adapterkit.merging"


class Kind(StrEnum):
    """What a method's function returns."""

    COEFFICIENTS = "coefficients"
    FACTORS = "factors"
    FLAT = "flat"
    STACK = "stack"
    ELEMENTWISE = "elementwise"


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """One method, described without importing it.

    Attributes:
        name: as `--method` takes it.
        title: what it does, in one line.
        kind: what its function returns.
        target: `module:attribute` of the function or rule.
        source: the paper or program whose meaning it has.
        parameters: its own numbers with their defaults; None where there is none.
        space: where an elementwise rule is applied unless told otherwise.
        mean: whether it averages: weights are then shares, 1 / T each by default, and their sum is
            the strength of the result. Otherwise it sums, and weights are 1 by default.
        shares: whether weights count against each other only, so that their sum is no strength.
        sums: whether the result is Σ wᵢ ΔWᵢ, so that vectors beside the factors can be summed too.
        directed: whether it walks between updates, so that weights must not be negative.
        adapters: smallest and largest number of adapters; None for no limit.
        random: whether it draws from the seed.
        basis_dependent: whether (B · G⁻¹, G · A), the same update, gives another result.
    """

    name: str
    title: str
    kind: Kind
    target: str
    source: str = ""
    parameters: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    space: str | None = None
    mean: bool = False
    shares: bool = False
    sums: bool = False
    directed: bool = False
    adapters: tuple[int, int | None] = (1, None)
    random: bool = False
    basis_dependent: bool = False

    @property
    def dense(self) -> bool:
        """Whether its result has no small rank: a base holds it, an adapter comes near it."""
        return self.kind is Kind.ELEMENTWISE and self.space == "delta"

    @property
    def aliases(self) -> tuple[MethodAlias, ...]:
        """What other programs call it."""
        return tuple(each for each in ALIASES if each.method == self.name)

    @property
    def function(self) -> Any:
        """The implementation, imported on first use."""
        module, _, attribute = self.target.partition(":")
        return getattr(import_module(module), attribute)


_ILHARCO = "Ilharco et al. 2023, arXiv 2212.04089"
_TIES = "Yadav et al. 2023, arXiv 2306.01708"
_DARE = "Yu et al. 2024, arXiv 2311.03099"
_DELLA = "Deep et al. 2024, arXiv 2406.11617"
_BREADCRUMBS = "Davari and Belilovsky 2024, arXiv 2312.06795"
_KNOTS = "Stoica et al. 2024, arXiv 2410.19735"
_CORE = "Panariello et al. 2025, arXiv 2509.17786"
_ISO = "Marczak et al. 2025, arXiv 2502.04959"


def _sum(name: str, title: str, source: str) -> MethodSpec:
    target = f"{_HERE}.coefficients:linear"
    return MethodSpec(
        name=name, title=title, kind=Kind.COEFFICIENTS, target=target, source=source, sums=True
    )


def _average(
    name: str,
    title: str,
    source: str,
    *,
    shares: bool = False,
    directed: bool = False,
    adapters: tuple[int, int | None] = (1, None),
) -> MethodSpec:
    return MethodSpec(
        name=name,
        title=title,
        kind=Kind.COEFFICIENTS,
        target=f"{_HERE}.coefficients:{name.replace('-', '_')}",
        source=source,
        mean=True,
        shares=shares,
        directed=directed,
        adapters=adapters,
    )


def _rule(
    name: str,
    title: str,
    source: str,
    parameters: Mapping[str, float | None],
    *,
    rule: str = "",
    space: str = "delta",
    mean: bool = False,
    random: bool = False,
) -> MethodSpec:
    return MethodSpec(
        name=name,
        title=title,
        basis_dependent=space == "core",
        kind=Kind.ELEMENTWISE,
        target=f"{_HERE}.elementwise:{(rule or name).upper().replace('-', '_')}",
        source=source,
        parameters=parameters,
        space=space,
        mean=mean,
        random=random,
    )


def _factors(
    name: str,
    title: str,
    source: str,
    parameters: Mapping[str, float | None] | None = None,
    *,
    kind: Kind = Kind.FACTORS,
    mean: bool = False,
    basis_dependent: bool = False,
) -> MethodSpec:
    return MethodSpec(
        name=name,
        title=title,
        kind=kind,
        target=f"{_HERE}.subspaces:{name.replace('-', '_')}",
        source=source,
        parameters=parameters or {},
        mean=mean,
        sums=kind is Kind.STACK,
        basis_dependent=basis_dependent,
    )


BUILTIN = (
    _sum(
        "svd",
        "the weighted sum in its singular basis; --rank keeps the best part of it",
        "Eckart and Young 1936",
    ),
    _sum("linear", "the weighted sum of the updates, the same as svd", _ILHARCO),
    _sum("task-arithmetic", "the weighted sum, by its other name", _ILHARCO),
    _factors("cat", "the weighted sum with all factors side by side", "PEFT", kind=Kind.STACK),
    _average(
        "slerp",
        "along the great circle between two updates; the weights' sum is the strength",
        "Shoemake 1985",
        directed=True,
        adapters=(2, 2),
    ),
    _average(
        "nuslerp",
        "slerp with weights that are shares, whatever their sum",
        "mergekit 0.1.5",
        shares=True,
        directed=True,
        adapters=(2, 2),
    ),
    _average(
        "multislerp",
        "the weighted mean direction, weighted mean of the norms; weights are shares",
        "mergekit 0.1.5",
        shares=True,
        directed=True,
    ),
    _average(
        "karcher",
        "the mean direction on the sphere, mean of the norms",
        "Karcher 1977",
        directed=True,
    ),
    _average(
        "model-stock",
        "the mean, shrunk by how far the updates are apart: unrelated ones leave next to nothing",
        "Jang et al. 2024, arXiv 2403.19522",
        adapters=(2, None),
    ),
    _rule(
        "ties", "trim, elect signs, mean of those that agree", _TIES, {"density": 0.2}, mean=True
    ),
    _rule("dare", "drop entries at random, rescale, sum", _DARE, {"density": 0.5}, random=True),
    _rule(
        "dare-ties",
        "drop at random, rescale, elect signs, mean of those that agree",
        _DARE,
        {"density": 0.5},
        mean=True,
        random=True,
    ),
    _rule(
        "della",
        "drop small entries more often, rescale, elect signs, mean of those that agree",
        _DELLA,
        {"density": 0.5, "epsilon": 0.1},
        mean=True,
        random=True,
    ),
    _rule(
        "della-linear",
        "drop small entries more often, rescale, sum",
        _DELLA,
        {"density": 0.5, "epsilon": 0.1},
        random=True,
    ),
    _rule(
        "breadcrumbs",
        "drop the smallest and the very largest entries, sum",
        _BREADCRUMBS,
        {"density": 0.9, "gamma": 0.01},
    ),
    _rule(
        "breadcrumbs-ties",
        "drop the smallest and the very largest entries, elect signs, sum of those that agree",
        "mergekit 0.1.5",
        {"density": 0.9, "gamma": 0.01},
    ),
    _rule("magnitude-prune", "keep the largest entries, sum", "PEFT", {"density": 0.5}),
    _rule(
        "sce",
        "keep where updates differ most, weigh by energy, elect signs, mean of those that agree",
        "Wan et al. 2024, arXiv 2408.07990",
        {"density": 1.0},
        mean=True,
    ),
    _rule(
        "knots",
        "ties in the common right-singular space",
        _KNOTS,
        {"density": 1.0},
        mean=True,
        rule="ties",
        space="knots",
    ),
    _rule(
        "core",
        "ties on the cores in common bases of the factors as they are stored",
        _CORE,
        {"density": 1.0},
        mean=True,
        rule="ties",
        space="core",
    ),
    _rule(
        "core-balanced",
        "core in bases that do not depend on how the factors are stored",
        f"adapterkit, after {_CORE}",
        {"density": 1.0},
        mean=True,
        rule="ties",
        space="core-balanced",
    ),
    _factors(
        "tsv",
        "all singular vectors made orthogonal, then summed",
        "Gargiulo et al. 2025, arXiv 2412.00081",
        {"density": 1.0},
    ),
    _factors(
        "iso-c-core",
        "the weighted sum with all singular values made equal, in core space",
        f"{_ISO}, as in {_CORE}",
        kind=Kind.FLAT,
    ),
    _factors(
        "iso-cts-core",
        "iso-c-core of the sum's leading directions and of each update's own",
        f"{_ISO}, as in {_CORE}",
        {"common": 0.8},
        kind=Kind.FLAT,
    ),
    _factors(
        "cart-core",
        "the mean, and the leading directions of what each is apart from it, in core space",
        f"Choi et al. 2024, arXiv 2412.12153, as in {_CORE}",
        {"density": 0.04, "coefficient": 1.0},
        mean=True,
    ),
    _factors(
        "linear-peft",
        "PEFT's linear: A and B summed apart, with cross terms; not the weighted sum",
        "PEFT 0.21",
        basis_dependent=True,
    ),
)


def merge_methods() -> tuple[MethodSpec, ...]:
    """Return every method: built in, then from entry points in group adapterkit.merge_methods."""
    return (*BUILTIN, *plugged_in(_GROUP))


def method(name: str) -> MethodSpec:
    """Return the method of a name, or of what another program calls it.

    Raises:
        UsageError: if there is none; the message lists all.
    """
    if found := next((known for known in BUILTIN if known.name == name), None):
        return found
    known = {spec.name for spec in merge_methods()}
    if name not in known and (other := alias(name)):
        name = other.method
    elif name not in known and name.replace("_", "-") in known:
        name = name.replace("_", "-")
    return named("method", name, BUILTIN, _GROUP)


def remark(name: str) -> str | None:
    """Return what is not the same as in the program whose name of a method this is."""
    found = alias(name)
    if not found or not found.remark or any(known.name == name for known in merge_methods()):
        return None
    return f"{name} is {found.method} here: {found.remark}"
