"""Merge adapters into one adapter, without a base model, or into the weights of a base."""
