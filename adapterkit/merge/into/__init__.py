"""Merge adapters into the weights of a base model."""

from adapterkit.merge.into.entry import merge_into
from adapterkit.merge.into.report import MergeIntoReport, TensorReport

__all__ = ["MergeIntoReport", "TensorReport", "merge_into"]
