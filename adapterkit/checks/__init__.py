"""What can be wrong with an adapter, alone and on a base."""
