"""The command line of adapterkit: one command per module, rendering, and the error boundary."""
