"""Environment of the whole suite; set before torch, triton or Ray are imported, and inherited by their processes."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels run on CPU tensors.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["RAY_AUTH_MODE"] = "disabled"  # A local test cluster must not write a token into the home folder.
os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # Two cores are shared by the workers that the tests start.
