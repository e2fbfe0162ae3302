"""Damage of all kinds done to a good file, always the same: what a reader must answer with one sentence."""

import random
from collections.abc import Iterator

# Texts that parsers stumble over.
TOKENS = (
    *(b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"99999999999999999999", b"null", b"true", b"[]", b"{}", b'"x"'),
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"<", b">", b"&", b'"', b",", b"\n", b"\r", b"[" * 2000),
)


def mutated(content: bytes, count: int = 500, seed: int = 0) -> Iterator[bytes]:
    """`count` damaged copies of a file's bytes: cut, with parts taken out, doubled, moved, flipped or replaced."""
    draw = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 1, 1, 2, 5))):
            start = draw.randrange(len(damaged) + 1)
            end = min(len(damaged), start + draw.choice((1, 1, 2, 8, 64, 1024)))
            kind = draw.randrange(7)
            if kind == 0:
                del damaged[start:]
            elif kind == 1:
                del damaged[start:end]
            elif kind == 2:
                damaged[start:start] = damaged[start:end]
            elif kind == 3:
                damaged[start:end] = bytes(draw.randrange(256) for _ in range(end - start))
            elif kind == 4 and start < len(damaged):
                damaged[start] ^= 1 << draw.randrange(8)
            elif kind == 5:
                damaged[start:end] = draw.choice(TOKENS)
            else:
                damaged[start:start] = draw.choice(TOKENS)
        yield bytes(damaged)
