"""Known models as their packages hold them: converted into the user's cache, where later runs find them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the train extra: transformers; lost: the conversion of real models")

from transformers import AutoTokenizer, GenerationConfig

from lad_kernels import pretrained
from lad_kernels.preflight import Refused
from lad_kernels.pretrained import model_folder


def test_the_real_package_is_converted():
    """Half a minute the first time, in the user's cache, which later runs find."""
    try:
        folder = Path(model_folder("smollm2"))
    except Refused as error:
        pytest.skip(f"{error}; lost: the conversion of the real package")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == GenerationConfig.from_pretrained(folder).eos_token_id == 2
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert "<|im_start|>" in tokenizer.chat_template
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["hidden_size"], config["vocab_size"], config["tie_word_embeddings"]) == (576, 49_152, True)
    room = sum(path.stat().st_size for path in folder.iterdir())
    assert 0.99 < room / pretrained.KNOWN["smollm2"].room < 1.01


def test_the_real_parts_are_converted():
    """1.1 GB in the user's cache and a minute the first time; it is not part of any extra."""
    try:
        folder = Path(model_folder("gemma3-270m"))
    except Refused as error:
        pytest.skip(f"{error}; lost: the tokenizer that is made from scores")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Water boils at 100 degrees:\n\n  <b>日本</b>\t😀<end_of_turn>"
    ids = tokenizer(text).input_ids
    assert (ids[0], tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1, 0)
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.convert_ids_to_tokens(ids[1:4]) == ["Water", "▁boils", "▁at"]
    assert tokenizer.convert_tokens_to_ids(["<end_of_turn>", "\t"]) == [106, ids[-3]]
    room = sum(path.stat().st_size for path in [folder, *folder.iterdir()])
    assert 1.1e9 < room < pretrained.KNOWN["gemma3-270m"].room
