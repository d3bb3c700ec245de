"""The model's conventions, not the test tokenizer's: where completions end, BOS, chat templates, padding, sampling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers; lost: what the trainer samples")
pytest.importorskip("reasoning_gym", reason="needs the train extra: reasoning-gym; lost: what the trainer samples")

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from integration import prompts, trainer
from integration.policy import Policy, build_policy, pack, sample, small_decoder
from integration.tasks import Task, encode_prompt
from integration.trainer import TrainConfig

WORDS = ["<pad>", "<eos>", "<unk>", "<bos>", "<end>", "<turn>", *"0123456789+-:= "]
PAD, EOS, BOS, END, TURN = (WORDS.index(f"<{name}>") for name in ("pad", "eos", "bos", "end", "turn"))
ENDS = [EOS, END, TURN]  # as in gemma-it, Phi and Qwen
CHAT = "{% for m in messages %}{{ m.role }}:{{ m.content }}<turn>{% endfor %}{% if add_generation_prompt %}={% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
SMALL = TrainConfig(group_size=4, prompts_per_step=4, max_new_tokens=12)


def tokenizer_of(*, adds_bos: bool = False, adds_eos: bool = False, template: str | None = None, pad: bool = True):
    """One token per character it knows; `<turn>` ends a completion but is no special token of the tokenizer."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<turn>|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    single = "<bos> $A" * adds_bos + "$A <eos>" * adds_eos
    if single:
        special = [("<bos>", BOS), ("<eos>", EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    names = {
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        **({"pad_token": "<pad>"} if pad else {}),
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<end>"], **names)
    fast.chat_template = template
    return fast


def policy_of(folder: Path, generation: dict | None = None, **kind) -> Policy:
    """A saved model with random weights, loaded as a pretrained one."""
    tokenizer = tokenizer_of(**kind)
    torch.manual_seed(0)
    config = small_decoder(tokenizer, 32, 1)
    config.initializer_range = 0.2  # neither high nor low entropy
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    own = {"eos_token_id": ENDS, "bos_token_id": BOS, "pad_token_id": PAD, **(generation or {})}
    (folder / "generation_config.json").write_text(json.dumps(own))
    tokenizer.save_pretrained(folder)
    return build_policy(str(folder), "cpu", pretrained=True)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def task() -> Task:
    return Task("countdown", 40, 8)


def test_a_completion_ends_at_the_first_of_three_ids_and_that_one_is_trained(tmp_path, task, monkeypatch):
    policy, scored = policy_of(tmp_path), []
    monkeypatch.setattr(prompts, "tagged_answer", lambda text: scored.append(text) or text)
    run = trainer.rollout(policy, task, task.train[:8], 16, SMALL, seeded())
    ends = {row[-1] for row in run.completions if len(row) < SMALL.max_new_tokens}
    assert ends == set(ENDS)
    assert not any(set(row[:-1]) & set(ENDS) for row in run.completions)
    assert len(scored) == len(run.completions)
    assert not any("<" in text.replace("<unk>", "").replace("<pad>", "") for text in scored)  # no end in the answer
    batch = pack(run.prompts, run.completions, policy.device)
    trained = batch.target_ids[batch.loss_mask].split([len(row) for row in run.completions])
    assert [row.tolist() for row in trained] == run.completions


@pytest.mark.parametrize(
    ("own", "named"),
    [
        ({"top_k": 1}, "top_k=1"),
        ({"top_p": 0.1, "temperature": 0.2}, "temperature=0.2, top_p=0.1"),
        ({}, None),
        ({"min_p": 0.9}, ""),
        ({"repetition_penalty": 50.0}, ""),
        ({"typical_p": 0.1}, ""),
        ({"epsilon_cutoff": 0.5}, ""),
    ],
)
def test_samples_follow_the_distribution_that_is_scored(tmp_path, own, named):
    policy, prompt, draws = policy_of(tmp_path, own), [6, 7, 8, 9], 20_000
    rows = sample(policy, [prompt], draws, max_new_tokens=1, temperature=0.7, generator=seeded())
    found = torch.tensor(rows)[:, 0].bincount(minlength=len(WORDS)) / draws  # [V]
    logits = policy.model(torch.tensor([prompt])).logits[0, -1]  # [V]
    distance = 0.5 * (found - torch.softmax(logits / 0.7, -1)).abs().sum()  # 0.005 to 0.008 over four seeds
    assert distance < 0.015
    assert bool(policy.set_aside) == bool(own)
    assert (named or "") in policy.set_aside
    policy.model.save_pretrained(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: kept[name] for name in own} == own  # the model's own, whatever it was sampled with
    assert kept["eos_token_id"] == ENDS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suppress_tokens", [7]),
        ("begin_suppress_tokens", [7]),
        ("bad_words_ids", [[7]]),
        ("forced_eos_token_id", 1),
        ("forced_bos_token_id", 3),
        ("no_repeat_ngram_size", 2),
        ("min_new_tokens", 3),
        ("guidance_scale", 1.5),
    ],
)
def test_what_changes_single_tokens_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"generation_config\.{name}: expected it unset, got .*; .*remove it"):
        policy_of(tmp_path, {name: value})


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    ("template", "own"), [(None, None), (CHAT, 0), ("{{ bos_token }}" + CHAT, 1), ("{{ bos_token }}" + NO_SYSTEM, 1)]
)
def test_bos_is_there_once_where_tokenizer_or_template_put_it(tmp_path, task, adds_bos, template, own):
    policy = policy_of(tmp_path, adds_bos=adds_bos, template=template)
    expected = int(adds_bos) if own is None else own
    run = trainer.rollout(policy, task, task.train[:2], 4, SMALL, seeded())
    for prompt in run.prompts:
        assert prompt.count(BOS) == expected
        assert (prompt[0] == BOS) == bool(expected)
        assert prompt[-1] == (WORDS.index("=") if template else 2)  # the answer's place; "\n" is unknown


def test_a_template_without_a_system_role_gets_its_words_ahead_of_the_question(task):
    entry = task.train[0]
    (message,) = task.chat_prompt(entry, tokenizer_of(template=NO_SYSTEM))
    system, user = task.chat_prompt(entry, tokenizer_of(template=CHAT))
    assert message == {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}


def test_a_tokenizer_that_ends_every_prompt_is_refused():
    with pytest.raises(ValueError, match="expected prompts that can be continued, got one that ends with '<eos>'"):
        encode_prompt("1+2", tokenizer_of(adds_eos=True))


@pytest.mark.parametrize("pad", [True, False])
def test_padding_changes_nothing(tmp_path, pad):
    """Nearly greedy, so that a row that saw its padding would go another way."""
    policy = policy_of(tmp_path, pad=pad)
    prompts = [[6], [7, 8, 9, 10, 11], [EOS, 12, 13]]
    options = {"max_new_tokens": 6, "temperature": 1e-4}
    together = sample(policy, prompts, 2, generator=seeded(), **options)
    alone = [row for prompt in prompts for row in sample(policy, [prompt], 2, generator=seeded(), **options)]
    assert together == alone


def test_without_a_pad_token_the_end_is_trained_and_the_tokenizer_stays_as_it_is(tmp_path, task):
    policy = policy_of(tmp_path / "model", {"pad_token_id": None}, pad=False)
    assert policy.tokenizer.pad_token is None
    run = trainer.rollout(policy, task, task.train[:8], 8, SMALL, seeded())
    batch = pack(run.prompts, run.completions, policy.device)
    trained = [row for row in run.completions if row[-1] == EOS]
    assert trained
    assert int((batch.target_ids[batch.loss_mask] == EOS).sum()) == len(trained)


def test_sampling_draws_from_its_generator_alone(tmp_path):
    policy = policy_of(tmp_path)
    before, generator = torch.get_rng_state(), seeded(3)
    first, second = (sample(policy, [[6, 7]], 9, max_new_tokens=9, temperature=1.0, generator=generator) for _ in "ab")
    assert first != second
    assert torch.equal(before, torch.get_rng_state())
    again = sample(policy, [[6, 7]], 9, max_new_tokens=9, temperature=1.0, generator=seeded(3))
    assert again == first


@pytest.mark.parametrize(("template", "expected"), [(None, 1), ("{{ bos_token }}" + CHAT, 1), (CHAT, 0)])
def test_trl_sees_the_same_prompts(tmp_path, monkeypatch, template, expected):
    pytest.importorskip("trl", reason="needs the trl extra: trl; lost: BOS in the TRL example")
    from integration import train_trl
    from lad_kernels.frameworks.trl import LADTrainer

    policy_of(tmp_path / "model", adds_bos=True, template=template)
    seen, own = [], LADTrainer._tokenize_prompts
    monkeypatch.setattr(
        LADTrainer, "_tokenize_prompts", lambda self, prompts: seen.append(own(self, prompts)) or seen[-1]
    )
    given = {
        "model_name_or_path": tmp_path / "model", "output_dir": tmp_path / "out", "train_size": 8, "held_out_size": 2,
        "max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
        "max_completion_length": 4, "report_to": "none", "bf16": False, "gradient_checkpointing": False,
        "save_strategy": "no",
    }  # fmt: skip
    train_trl.main([str(part) for name, value in given.items() for part in (f"--{name}", value)])
    prompts = [ids for found in seen for ids in found[0]]
    assert len(prompts) >= 4
    assert {ids.count(BOS) for ids in prompts} == {expected}
    tokenizer, task = AutoTokenizer.from_pretrained(tmp_path / "model"), Task("countdown", 8, 2, 42)
    assert prompts[-1] in [encode_prompt(task.chat_prompt(entry, tokenizer), tokenizer) for entry in task.held_out]
