"""Spectral audit: what is in an adapter, which ranks it needs, and what clashes when merged."""
