"""Head shapes, each with the reason it is here, and how far they reach over the edges of default tiles.

Only tokens that are not masked reach the head. head/test_tile_edges.py compares CROSSES with the tables of the kernels.
"""

from __future__ import annotations

CASES = {
    "two tiles and a remainder": dict(tokens=300, hidden_size=144, vocab_size=2 * 256 + 57, masked=0.1),
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
# Full tiles, or steps of the product, in front of a remainder: 2 or more, 1, or 0 (not named), whatever the dtype.
CROSSES = {
    "two tiles and a remainder": dict(tokens=2, hidden_size=2, vocab_size=2),
    "one token": dict(vocab_size=1),
    "prime sizes": dict(tokens=1, hidden_size=2, vocab_size=2),
    "narrow hidden": dict(vocab_size=1),
    "bias": dict(vocab_size=2),
    "every transform": dict(vocab_size=2),
    "softcap alone": dict(vocab_size=2),
    "peaked policy": dict(vocab_size=2),
}
