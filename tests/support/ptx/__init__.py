"""A stand-in for an NVIDIA GPU: runs the PTX of compiled kernels in numpy, on CPU tensors, and checks every access.

Modelled
- control flow: threads that take different branches run one side after the other, until the branches meet again
- global memory: bounds of every launch argument's storage, alignment of vector accesses, races between programs (two
  writers, or a reader of another's write), reads of what another warp wrote without a barrier since, lanes that store
  different values in one place; masked-off elements of a load without `other` are poison, not the compiler's zero
- shared memory: bounds, alignment, bytes never written, accesses of two warps without a barrier between them
- cp.async: bytes arrive at the wait_group that covers them, and must not be touched before
- sm_90: tensor maps (2-d loads and stores; box, bounds, swizzle, zeros outside), mbarriers (arrivals, bytes, parity),
  elect, wgmma from swizzled shared memory, computed at the wait_group that covers it; what a bulk store reads must not
  be touched before its wait_group; fence.proxy.async between ordinary writes and the wgmma or store that reads them
- mma.sync m16n8k16 (f16, bf16), ldmatrix, stmatrix, shuffles and sums of a warp: all its threads must take part
- programs of a grid run in random order, some of them side by side

Not modelled: accepted without effect
- caches, time, weak ordering of global memory; cache hints; wgmma.fence; a missing fence.proxy.async between cp.async
  and wgmma, which Triton 3.6 leaves out (3.7 does not)
- rounding inside a matrix instruction: products and sums of one instruction are exact, then rounded to float32 once,
  whereas tensor cores cut off what they align; `.approx` functions are computed in float64 and rounded
- ptxas: it may fuse and reorder what PTX leaves open
- when a bulk store writes: at once; no kernel of the package reads what it stored
- races between threads of one warp; a write of one warp after a read of another in global memory, without a barrier;
  which of two neighbouring bytes is meant

Not modelled: refused by name (NotImplementedError)
- what no kernel of the package asks for, that is all but the patterns of MODELLED in instructions.py and arithmetic.py:
  among it 16-bit arithmetic, other roundings, tf32 products, wgmma from registers or without swizzle, sm_100's tensor
  memory, clusters, named barriers, other fences, tensor maps of other ranks or with NaN outside, atomics
  but float32 sums, spin loops but those on an mbarrier
"""
