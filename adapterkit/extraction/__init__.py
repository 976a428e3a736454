"""The adapter between two checkpoints of one model, with its error measured."""
