"""The doctor: what an adapter does in a server that runs, against what it should do."""
