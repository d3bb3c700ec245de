"""The public functions through Triton's own compiler and launcher for sm_90, above a driver that launches nothing.

`make test-launch` builds libcuda.c and runs this; it needs a C compiler, Python's headers, and minutes, no GPU. Every
launch compiles, builds its tensor maps, packs its arguments, and is refused where a driver would refuse it. No number
is checked: what a kernel would have written is 0, and as the host reads it every vocabulary block has one pair.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import time
from collections.abc import Callable, Iterator

import cuda_device

cuda_device.install(interpret=False)

import torch  # noqa: E402
from triton.backends.nvidia.driver import CudaDriver  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from lad_kernels import GRPOConfig, LADConfig, grpo_loss, lad_loss, linear_lad_loss, linear_logprobs  # noqa: E402
from lad_kernels.head import dispatch  # noqa: E402
from lad_kernels.head.kernels.waiting import Later  # noqa: E402
from lad_kernels.objective import DIVERGENCES  # noqa: E402

Case = tuple[str, Callable[[], None]]
B, T = 3, 40
LAYOUTS = {"aligned": (128, 1024), "ragged": (96, 509), "unaligned": (67, 300), "smallest": (8, 130)}  # D, V
WALKED = {  # of every path
    *("_partials_kernel", "_logit_gradient_kernel", "_exponentials_kernel", "_policy_kernel", "_list_kernel"),
    *("_target_kernel", "_target_columns_kernel", "_scale_kernel"),
    *("items_kernel", "pairs_kernel", "weight_kernel", "bias_kernel", "hidden_kernel", "token_kernel"),
}
STUB = ctypes.CDLL("libcuda.so.1")
STUB.stub_reason.restype = ctypes.c_char_p


def check_refusals() -> None:
    """The stub refuses: else nothing below could fail."""
    map_, address = ctypes.create_string_buffer(128), 1 << 20
    longs, ints = (lambda *x: (ctypes.c_uint64 * len(x))(*x)), (lambda *x: (ctypes.c_uint32 * len(x))(*x))

    def encode(base=address, dims=(64, 100), stride=128, box=(64, 64)) -> int:
        given = (longs(*dims), longs(stride), ints(*box), ints(1, 1), 0, 3, 0, 0)
        return STUB.cuTensorMapEncodeTiled(map_, 9, 2, ctypes.c_void_p(base), *given)

    def launch(grid=(1, 1, 1), block=128, shared=0) -> int:
        config = (ctypes.c_uint32 * 16)(*grid, block, 1, 1, shared)
        return STUB.cuLaunchKernelEx(config, None, None, None)

    assert encode() == launch() == 0
    wrong = [
        encode(base=address + 8),
        encode(stride=136),
        encode(box=(64, 512)),
        encode(box=(128, 64)),
        encode(dims=(0, 1)),
    ]
    wrong += [launch(grid=(1, 70_000, 1)), launch(grid=(0, 1, 1)), launch(block=2048), launch(shared=240_000)]
    assert all(wrong) and STUB.stub_refused() == len(wrong)


def told(x: torch.Tensor) -> torch.Tensor:
    """Where blocks begin, their end, that of the dense tokens' list, tokens with a gradient; a short x as it is."""
    blocks = x.numel() - 3
    return x if blocks < 1 else torch.tensor([*range(blocks + 1), blocks, blocks])


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device="cuda")


def heads(dtype: torch.dtype) -> Iterator[Case]:
    """Log-probs, and a loss by every path, in every layout, plain and with all features."""
    for (layout, (d, v)), rich in itertools.product(LAYOUTS.items(), (False, True)):
        given = {
            "hidden_states": zeros(B, T, d, dtype=dtype).requires_grad_(),
            "lm_head_weight": zeros(v, d, dtype=dtype).requires_grad_(),
            "target_ids": zeros(B, T, dtype=torch.int64),
            "return_entropy": rich,
        }
        if rich:
            given |= {"bias": zeros(v, dtype=dtype).requires_grad_(), "temperature": zeros(B, T) + 1, "softcap": 30.0}
        name = f"{dtype} {layout} {'all features' if rich else 'plain'}"

        def score(given: dict = given) -> None:
            out = linear_logprobs(**given)
            (out.logprobs.sum() + (out.entropy.sum() if given["return_entropy"] else 0)).backward()

        def loss(path: str, given: dict = given) -> None:
            bonus = 0.01 if given["return_entropy"] and path != "one_pass" else 0.0
            with dispatch.force(path):
                config = LADConfig(tail_mass=3e-4, entropy_coef=bonus)
                out = linear_lad_loss(**given, old_logprobs=zeros(B, T), advantages=zeros(B) + 1, config=config)
            out.loss.backward()

        yield f"log-probs {name}", score
        for path in dispatch.PATHS:
            yield f"{path} {name}", lambda path=path, loss=loss: loss(path)


def objectives() -> Iterator[Case]:
    """Every divergence at two levels, three losses of the GRPO family, and rewards by every scale."""
    logprobs, given = zeros(4, 300).requires_grad_(), (zeros(4, 300), zeros(4) + 1)
    for divergence, level in itertools.product(DIVERGENCES, ("token", "sequence")):
        config = LADConfig(divergence, importance_sampling_level=level)
        yield f"{divergence} {level}", lambda c=config: lad_loss(logprobs, *given, config=c).loss.backward()
    for kind in ("ppo", "cispo", "reinforce"):
        yield kind, lambda c=GRPOConfig(policy_loss=kind): grpo_loss(logprobs, *given, config=c).loss.backward()
    head = zeros(4, T, 128, dtype=torch.bfloat16).requires_grad_(), zeros(1024, 128, dtype=torch.bfloat16)
    targets = zeros(4, T, dtype=torch.int64)
    rest = {"rewards": torch.arange(4.0, device="cuda"), "group_size": 2, "ref_logprobs": zeros(4, T)}
    for scale, norm in itertools.product(("group", "batch", "none", "loo"), (None, "group")):
        config = LADConfig(advantage_scale=scale, target_norm=norm, kl_coef=0.1)
        yield (
            f"rewards {scale} {norm}",
            lambda c=config: linear_lad_loss(*head, targets, **rest, config=c).loss.backward(),
        )


def main() -> int:
    active = CudaDriver()
    active.get_current_stream, active.get_current_device = (lambda device=0: 0), (lambda: 0)
    active.get_device_capability = lambda device=0: (9, 0)
    driver.set_active(active)
    check_refusals()
    torch.use_deterministic_algorithms(True)
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    cuda_device.CudaTensor.tolist = lambda self: [1] * len(self)
    read, launch, launched = Later.read, JITFunction.run, set()
    Later.read = lambda self: told(read(self))
    JITFunction.run = lambda self, *a, **k: (launched.add(self.__name__), launch(self, *a, **k))[1]
    dtypes = [getattr(torch, name) for name in sys.argv[1:]] or [torch.bfloat16, torch.float16, torch.float32]
    failed, first = 0, STUB.stub_launches()
    for name, run in itertools.chain(*map(heads, dtypes), objectives()):
        refused, start, problem = STUB.stub_refused(), time.perf_counter(), ""
        try:
            run()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if STUB.stub_refused() > refused:
            problem = STUB.stub_reason().decode()
        failed += bool(problem)
        print(f"{'FAIL' if problem else 'pass'} {time.perf_counter() - start:5.1f} s  {name}  {problem}", flush=True)
    print(f"{STUB.stub_launches() - first} launches, {STUB.stub_maps()} tensor maps; {failed} cases failed")
    if missing := WALKED - launched:
        print(f"FAIL never launched: {', '.join(sorted(missing))}")
    return int(failed > 0 or bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
