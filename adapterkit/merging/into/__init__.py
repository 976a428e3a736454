"""Merge adapters into the weights of a base model."""
