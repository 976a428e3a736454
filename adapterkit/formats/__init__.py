"""Adapter formats: containers, naming and configuration to and from the neutral model."""
