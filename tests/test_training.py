"""A short run of benchmarks/training.py: dense, routed and unbiased routed training go the same way."""

from __future__ import annotations

import pytest

from benchmarks import training


@pytest.fixture(scope="module")
def outcomes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "VOCABULARY", 2048)
        patch.setattr(training, "CONTEXTS", 32)
        patch.setattr(training, "LEARNING_RATE", 1e-3)
        patch.setattr(training.warm_start, "__defaults__", (150,))
        yield {o.variant: o for o in training.compare(steps=60, seeds=1)}


def test_reward_and_held_out_loss_agree(outcomes):
    dense = outcomes["dense"]
    for variant, outcome in outcomes.items():
        assert outcome.reward == pytest.approx(dense.reward, abs=0.05), variant
        assert outcome.held_out_loss == pytest.approx(dense.held_out_loss, rel=0.02), variant
        assert outcome.gradient_norm == pytest.approx(dense.gradient_norm, rel=0.1), variant


def test_cold_rows_are_left_alone_unless_dense(outcomes):
    assert outcomes["dense"].cold_rows_hot > 0.5  # not in steps whose advantages are all zero
    assert outcomes["routed, tail dropped"].cold_rows_hot < 0.1
    assert outcomes["routed, tail dropped"].kept_share < outcomes["routed, unbiased tail"].kept_share
    assert outcomes["routed, unbiased tail"].kept_share < 0.5 * outcomes["dense"].kept_share
