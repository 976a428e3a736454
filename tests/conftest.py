"""Settings for all tests."""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

# The same examples on every machine, so that a failure is the change's; to search for new ones:
# HYPOTHESIS_PROFILE=search pytest tests/properties
settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", deadline=None, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# Models are built here or not at all.
os.environ["HF_HUB_OFFLINE"] = "1"

# A shell in the background has its programs ignore these, and what is ignored stays ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The counts of tests/soak reach the end of the run through every process.
pytest_plugins = ["soak.counts"]
