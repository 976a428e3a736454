"""The merge methods, as data: what each is, what it takes, and where its function lives.

Four kinds of pure functions on one module, told apart by `Kind`; every update is a `LowRank`:

- COEFFICIENTS: `f(gram, weights, parameters) -> (T,)`, the result is Σ aᵢ ΔWᵢ; `gram` (T, T) holds
  the inner products ⟨ΔWᵢ, ΔWⱼ⟩.
- FACTORS: `f(updates, weights, parameters) -> LowRank`.
- STACK: like FACTORS, and the result is stored as it is, without another decomposition.
- ELEMENTWISE: an `adapterkit.merging.elementwise.Rule`, applied to the entries of every update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from typing import Any

from adapterkit.registry import named, plugins

_GROUP = "adapterkit.merge_methods"
SPACES = ("delta", "knots", "core")
_HERE = "adapterkit.merging"


class Kind(StrEnum):
    """What a method's function returns."""

    COEFFICIENTS = "coefficients"
    FACTORS = "factors"
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
        parameters: its own numbers with their defaults; None where there is none.
        space: where an elementwise rule is applied unless told otherwise.
        mean: whether it averages: weights are then shares, 1 / T each by default, and their sum is
            the strength of the result. Otherwise it sums, and weights are 1 by default.
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
    parameters: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    space: str | None = None
    mean: bool = False
    sums: bool = False
    directed: bool = False
    adapters: tuple[int, int | None] = (1, None)
    random: bool = False
    basis_dependent: bool = False

    @property
    def function(self) -> Any:
        """The implementation, imported on first use."""
        module, _, attribute = self.target.partition(":")
        return getattr(import_module(module), attribute)


def _sum(name: str, title: str) -> MethodSpec:
    target = f"{_HERE}.coefficients:linear"
    return MethodSpec(name=name, title=title, kind=Kind.COEFFICIENTS, target=target, sums=True)


def _average(
    name: str, title: str, *, directed: bool = False, adapters: tuple[int, int | None] = (1, None)
) -> MethodSpec:
    return MethodSpec(
        name=name,
        title=title,
        kind=Kind.COEFFICIENTS,
        target=f"{_HERE}.coefficients:{name.replace('-', '_')}",
        mean=True,
        directed=directed,
        adapters=adapters,
    )


def _rule(
    name: str,
    title: str,
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
        kind=Kind.ELEMENTWISE,
        target=f"{_HERE}.elementwise:{(rule or name).upper().replace('-', '_')}",
        parameters=parameters,
        space=space,
        mean=mean,
        random=random,
    )


def _factors(
    name: str,
    title: str,
    parameters: Mapping[str, float | None] | None = None,
    *,
    stacks: bool = False,
    basis_dependent: bool = False,
) -> MethodSpec:
    return MethodSpec(
        name=name,
        title=title,
        kind=Kind.STACK if stacks else Kind.FACTORS,
        target=f"{_HERE}.subspaces:{name.replace('-', '_')}",
        parameters=parameters or {},
        sums=stacks,
        basis_dependent=basis_dependent,
    )


BUILTIN = (
    _sum("svd", "the weighted sum in its singular basis; --rank keeps the best part of it"),
    _sum("linear", "the weighted sum of the updates, the same as svd"),
    _sum("task-arithmetic", "the weighted sum, by its other name"),
    _factors("cat", "the weighted sum with all factors side by side", stacks=True),
    _average("slerp", "along the great circle between two updates", directed=True, adapters=(2, 2)),
    _average(
        "nuslerp", "slerp of the directions, mean of the norms", directed=True, adapters=(2, 2)
    ),
    _average("karcher", "the mean direction on the sphere, mean of the norms", directed=True),
    _average(
        "model-stock", "the mean, shrunk by how far the updates are apart", adapters=(2, None)
    ),
    _rule("ties", "trim, elect signs, mean of those that agree", {"density": 0.2}, mean=True),
    _rule("dare", "drop entries at random, rescale, sum", {"density": 0.5}, random=True),
    _rule(
        "dare-ties",
        "drop at random, rescale, elect signs, mean of those that agree",
        {"density": 0.5},
        mean=True,
        random=True,
    ),
    _rule(
        "della",
        "drop small entries more often, rescale, elect signs, mean of those that agree",
        {"density": 0.5, "epsilon": 0.1},
        mean=True,
        random=True,
    ),
    _rule(
        "breadcrumbs",
        "drop the smallest and the very largest entries, sum",
        {"density": 0.9, "gamma": 0.01},
    ),
    _rule("magnitude-prune", "keep the largest entries, sum", {"density": 0.5}),
    _rule(
        "knots",
        "ties in the common right-singular space",
        {"density": 1.0},
        mean=True,
        rule="ties",
        space="knots",
    ),
    _rule(
        "core",
        "ties on the cores in common bases",
        {"density": 1.0},
        mean=True,
        rule="ties",
        space="core",
    ),
    _factors("tsv", "all singular vectors made orthogonal, then summed", {"density": 1.0}),
    _factors("iso-c", "the weighted sum with all singular values made equal"),
    _factors(
        "linear-peft",
        "PEFT's linear: A and B summed apart, with cross terms; not the weighted sum",
        basis_dependent=True,
    ),
)


def merge_methods() -> tuple[MethodSpec, ...]:
    """Return every method: built in, then from entry points in group adapterkit.merge_methods."""
    return (*BUILTIN, *plugins(_GROUP))


def method(name: str) -> MethodSpec:
    """Return the method of a name.

    Raises:
        UsageError: if there is none; the message lists all.
    """
    return named("method", name, BUILTIN, _GROUP)
