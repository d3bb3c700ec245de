"""One call of the objective: the backend, the packed inputs, and what is computed once for all chunks."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.objective import policy
from lad_kernels.objective.config import PolicyConfig
from lad_kernels.objective.inputs import PackedInputs, PolicyInputs, has_values_by_token, lengths_of, tokens_by_input
from lad_kernels.objective.policy import PolicyTerms
from lad_kernels.packing import Packing


class Objective:
    """The objective of one call, on M packed tokens; `inputs` are validated, `like` is as the log-probs will be."""

    def __init__(self, inputs: PolicyInputs, packing: Packing, config: PolicyConfig, impl: str, like: Tensor):
        self.config, self.dtype, self.device = config, torch.promote_types(like.dtype, torch.float32), like.device
        self._backend: ModuleType = policy
        if checks.use_triton(impl, self.device, self.dtype):
            from lad_kernels.objective.kernels import policy as kernels  # of the same three functions

            self._backend = kernels
        self._finite, self._inside = tokens_by_input(inputs, packing, config), packing.inside  # [M], [M]
        self._inputs = self._pack(inputs, packing)

    def terms(self, logprobs: Tensor, entropy: Tensor | None = None) -> PolicyTerms:  # [M], [M]
        """Loss, gradient and metrics of all tokens; called once."""
        if self.config.entropy_coef != 0 and entropy is None:
            raise ValueError(f"entropy: needed because config.entropy_coef is {self.config.entropy_coef}, got None")
        with torch.no_grad():
            entropy = None if entropy is None else entropy.detach().to(self.dtype)
            terms = self._backend.policy_terms(logprobs.detach().to(self.dtype), entropy, self._inputs, self.config)
            terms.metrics["nonfinite_share"] = self._dropped_share()
        return terms

    def coefficients(self, rows: slice, logprobs: Tensor) -> Tensor:  # [C] -> [C]
        """d loss / d logprob of the tokens `rows`, whose log-probs alone are given, without an entropy term.

        `rows` are any tokens where ratios are per token, whole sequences at the sequence levels. In Triton the same
        bits as in `terms`; in PyTorch equal to an ulp or two, because vectorised CPU code rounds the last elements
        differently.
        """
        with torch.no_grad():
            if not self._inputs.prepared:  # group statistics, for all chunks and for `terms`
                self._inputs = self._backend.prepare(self._inputs, self.config)
            return self._backend.coefficients(logprobs.detach().to(self.dtype), self._inputs.chunk(rows), self.config)

    def _pack(self, inputs: PolicyInputs, packing: Packing) -> PackedInputs:
        finite, inside = self._finite, self._inside
        usable = inside if finite is None else finite if inside is None else finite & inside  # [M]
        group_ids = None  # [B]
        if inputs.rewards is not None or self.config.norms_target:
            sequences = len(packing.cu_seqlens) - 1
            group_ids = checks.groups(sequences, self.device, inputs.group_size, inputs.group_ids)

        advantages_by_token = has_values_by_token(inputs.advantages, packing)
        weights_by_token = has_values_by_token(inputs.rollout_is_weights, packing)

        def packed(x: Tensor | None, by_token: bool = True) -> Tensor | None:  # per token -> [M]; per sequence [B]
            if x is None:
                return None
            return (packing.select(x.detach()) if by_token else x.detach()).to(self.dtype)

        return PackedInputs(
            normalizer=self._divisor(inputs.normalizer, packing, usable),
            cu_seqlens=packing.cu_seqlens,
            usable=usable,
            old_logprobs=packed(inputs.old_logprobs),
            ref_logprobs=packed(inputs.ref_logprobs),
            advantages=packed(inputs.advantages, advantages_by_token),
            advantages_by_token=advantages_by_token,
            rewards=packed(inputs.rewards, False),
            group_ids=group_ids,
            rollout_is_weights=packed(inputs.rollout_is_weights, weights_by_token),
            weights_by_token=weights_by_token,
        )

    def _divisor(self, given: float | Tensor | None, packing: Packing, usable: Tensor | None) -> Tensor:  # [M] -> []
        """The divisor Z, without a host sync; `usable`: tokens that take part, None: all."""
        if given is None and self.config.loss_agg_mode == "token-mean":
            given = max(1, packing.tokens) if usable is None else usable.sum().clamp(min=1)
        elif given is None and self.config.loss_agg_mode == "seq-mean-token-sum-norm":
            given = max(1, packing.shape.numel())
        elif given is None:
            given = (lengths_of(packing.cu_seqlens, usable) > 0).sum().clamp(min=1)
        if isinstance(given, Tensor):
            return given.detach().to(self.device, self.dtype).reshape(())
        return torch.full((), given, dtype=self.dtype, device=self.device)

    def _dropped_share(self) -> Tensor:  # []
        """Share of tokens dropped because an engine's number is not finite."""
        finite, inside = self._finite, self._inside
        if finite is None:
            return torch.zeros((), dtype=self.dtype, device=self.device)
        if inside is None:
            return ((len(finite) - finite.sum()) / max(len(finite), 1)).to(self.dtype)
        return ((inside & ~finite).sum() / inside.sum().clamp(min=1)).to(self.dtype)
