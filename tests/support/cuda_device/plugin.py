"""pytest plugin, the suite on the device: `PYTHONPATH=tests/support python -m pytest -p cuda_device.plugin`."""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import cuda_device

cuda_device.install()
