"""One thread, and every signature of the package checked while the tests run."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
install_import_hook("expunge", "checked.check")
