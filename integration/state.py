"""What changes during a run, and how it is saved and restored."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from integration import checkpoint
from integration.policy import Policy, build_policy
from integration.train_config import CONFIG, TrainConfig, saved_fields
from lad_kernels.preflight import Refused
from lad_kernels.pretrained import model_folder

STATE = "trainer_state.pt"  # in a checkpoint
logger = logging.getLogger(__name__)


@dataclass
class State:
    """Everything that changes during a run; the checkpoint holds exactly this."""

    policy: Policy
    optimizer: torch.optim.AdamW
    generator: torch.Generator
    step: int = 0


def save_checkpoint(state: State, config: TrainConfig) -> Path:
    """Write a checkpoint that `from_pretrained` and the trainer read; returns `out/checkpoint`, which points to it."""

    def write(folder: Path) -> None:
        state.policy.model.save_pretrained(folder)
        state.policy.tokenizer.save_pretrained(folder)
        (folder / CONFIG).write_text(json.dumps(saved_fields(config), indent=1) + "\n")
        saved = {"optimizer": state.optimizer.state_dict(), "generator": state.generator.get_state()}
        # Global random states, which dropout and other code without a generator use.
        states, device = {"python": random.getstate(), "cpu": torch.get_rng_state()}, state.policy.device
        if device.type != "cpu":
            states[device.type] = torch.get_device_module(device).get_rng_state(device)
        torch.save({**saved, "step": state.step, "random": states}, folder / STATE)

    return checkpoint.save(Path(config.out), state.step, write)


def load_policy(config: TrainConfig) -> Policy:
    """The checkpoint to resume, the model to fine-tune, or a small decoder with random weights.

    Raises:
        Refused: a damaged checkpoint, or a model that cannot be loaded or trained here.
    """
    if config.resume is not None:
        path = str(checkpoint.find(config.resume))
        checkpoint.verify(Path(path))
    else:
        path = config.model and model_folder(config.model)
    sizes = {"seed": config.seed, "hidden_size": config.hidden_size, "layers": config.layers}
    try:
        return build_policy(path, config.device, pretrained=config.model is not None, **sizes)
    except (OSError, TypeError, ValueError) as error:
        if path is None:
            raise
        flag = "model" if config.resume is None else "resume"
        raise Refused(
            f"{flag}: expected a causal language model to train, got {path!r} ({error}); take another"
        ) from error


def initial_state(policy: Policy, config: TrainConfig) -> State:
    """A fresh state, or the one saved in `config.resume`; sets the global random generators to match."""
    generator = torch.Generator(policy.device).manual_seed(config.seed)
    state = State(policy, make_optimizer(policy, config.learning_rate), generator)
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    if config.resume is None:
        return state
    path = checkpoint.find(config.resume)
    checkpoint.verify(path, STATE)
    saved = torch.load(path / STATE, map_location="cpu", weights_only=True)
    state.optimizer.load_state_dict(saved["optimizer"])
    state.step = saved["step"]
    kind, states = policy.device.type, saved["random"]
    if states.keys() != {"python", "cpu", kind}:
        logger.warning("the checkpoint comes from another kind of device: sampling starts again from the seed")
        return state
    generator.set_state(saved["generator"])
    random.setstate(states["python"])
    torch.set_rng_state(states["cpu"])
    if kind != "cpu":
        torch.get_device_module(policy.device).set_rng_state(states[kind], policy.device)
    return state


def make_optimizer(policy: Policy, learning_rate: float) -> torch.optim.AdamW:
    """AdamW without weight decay: the policy starts from weights worth keeping."""
    return torch.optim.AdamW(policy.model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
