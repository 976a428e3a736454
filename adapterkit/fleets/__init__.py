"""Fleets: one command over any number of adapters, and who among them is whose copy."""
