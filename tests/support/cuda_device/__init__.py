"""A CUDA device that is not there: tensors that say `cuda:0`, hold CPU data and obey the rules of a CUDA build.

    make test-device            the package's own tests on it

    import cuda_device
    log = cuda_device.install()
    x = torch.randn(4, device="cuda")   # x.is_cuda, x.device == cuda:0, and its values are real

What it does as CUDA does:

- operations on tensors of two devices are refused, a tensor of the host as a kernel's argument too;
- `mm` and `addmm` take `out_dtype`, with the checks of ATen/native/cuda/Blas.cpp;
- operations without a deterministic implementation raise under `torch.use_deterministic_algorithms`;
- `torch.autocast("cuda")` casts by CUDA's lists, which are longer than those of a CPU;
- a backward pass runs in a thread of its own, without the context variables of the caller;
- properties, so tile tables and budgets, are those of an H100.

What it counts, in `log`: host syncs and copies to the device by the line that caused them, kernel launches by name, and
the bytes of live storages, rounded to 512 as the caching allocator does.

Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1) on the values. What a CPU cannot show is not shown:
CUDA's own rounding, streams, launch limits, dispatch in C++ by device. A formula in C++ that makes a tensor makes it on
the CPU: zeros of a backward pass are let through while they are zero, others (`one_hot`) are refused.
`torch.inference_mode` refuses views of these tensors.
"""

from cuda_device.log import LOG, Log
from cuda_device.runtime import install
from cuda_device.tensor import CudaTensor

__all__ = ["LOG", "CudaTensor", "Log", "install"]
