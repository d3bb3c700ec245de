"""Head shapes, each with the reason it is here. Default vocabulary tiles are 128 or 256 wide, token tiles 64 or 128."""

from __future__ import annotations

CASES = {
    "two tiles and a remainder": dict(tokens=150, hidden_size=96, vocab_size=2 * 256 + 57),
    "prime sizes": dict(tokens=131, hidden_size=67, vocab_size=509),
    "one token": dict(tokens=1, hidden_size=64, vocab_size=300, masked=0.0),
    "smallest vocabulary": dict(tokens=9, hidden_size=16, vocab_size=2),
    "narrow hidden": dict(tokens=40, hidden_size=5, vocab_size=130),
    "bias": dict(tokens=70, hidden_size=64, vocab_size=300, bias=True),
    "every transform": dict(
        tokens=70, hidden_size=64, vocab_size=300, bias=True, logit_scale=0.7, softcap=9.0, temperature=0.8
    ),
    "softcap alone": dict(tokens=70, hidden_size=64, vocab_size=300, softcap=5.0),
    "peaked policy": dict(tokens=140, hidden_size=64, vocab_size=600, entropy=0.4),
    "negative scale": dict(tokens=33, hidden_size=32, vocab_size=140, logit_scale=-0.5, temperature=2.0),
}
