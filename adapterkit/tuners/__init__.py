"""Updates of other shapes, written as B · A: the algebra alone, without any file format."""

from adapterkit.tuners.blocks import granular, householder
from adapterkit.tuners.factored import Factors
from adapterkit.tuners.products import hadamard, kronecker
from adapterkit.tuners.scaled import adalora, delora, vera
from adapterkit.tuners.shared import miss, vector_bank

__all__ = [
    "Factors",
    "adalora",
    "delora",
    "granular",
    "hadamard",
    "householder",
    "kronecker",
    "miss",
    "vector_bank",
    "vera",
]
