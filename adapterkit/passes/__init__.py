"""Changes to an adapter, each named, with a promise of its own."""
