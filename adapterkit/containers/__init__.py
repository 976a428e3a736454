"""Byte containers: what a file holds, with no idea of what an adapter is."""
