"""One thread, and every signature of the package checked while the tests run."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from hypothesis import settings
from jaxtyping import install_import_hook

torch.set_num_threads(1)
install_import_hook("expunge", "checked.check")

# Machines under load must not fail a property by its time, and CI judges a change, not the luck of a draw: there the
# examples follow from the test alone. On a desk they stay random, and go on finding things.
settings.register_profile("desk", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "desk")
