"""Operations by what a CUDA build does with them."""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# They read values on the host, or their result has a shape that values decide.
SYNCS = _names(
    "_local_scalar_dense nonzero masked_select _unique2 unique_dim unique_consecutive bincount equal is_nonzero "
    "multinomial"
)
# They raise under torch.use_deterministic_algorithms, by the list in its documentation; FLOATING: on floating points.
NONDETERMINISTIC = _names(
    "cumsum cumsum_ cumprod put_ histc bincount kthvalue reflection_pad1d_backward _ctc_loss_backward "
    "nll_loss2d_forward upsample_bilinear2d_backward"
)
FLOATING = _names("cumsum cumsum_")
# They take operands of both devices: copies, and indices.
MIXED = _names("copy_ _to_copy index index_put index_put_ _index_put_impl_ set_ detach segment_reduce")

# What torch.autocast("cuda") casts, by ATen/autocast_mode.h and the names of the functions in Python: to 16 bits, to
# float32, to the widest of their arguments. Longer than the lists of a CPU, which casts neither `mv` nor `exp`.
LOWER = _names(
    "matmul __matmul__ __rmatmul__ mm bmm addmm addbmm baddbmm addmv mv addr linear chain_matmul multi_dot vecdot "
    "linalg_vecdot linalg_multi_dot einsum conv1d conv2d conv3d prelu scaled_dot_product_attention"
)
FLOAT32 = _names(
    "acos asin cosh erfinv exp expm1 log log10 log1p log2 logsumexp reciprocal rsqrt sinh tan pow __pow__ __rpow__ "
    "__rdiv__ __rtruediv__ softplus softmax log_softmax softmin cumsum cumprod prod sum norm renorm dist cdist "
    "cosine_similarity layer_norm group_norm rms_norm nll_loss cross_entropy kl_div mse_loss l1_loss smooth_l1_loss "
    "normalize binary_cross_entropy_with_logits"
)
WIDEST = _names("addcdiv addcmul atan2 bilinear cross dot vdot grid_sample index_put scatter_add tensordot cat stack")
