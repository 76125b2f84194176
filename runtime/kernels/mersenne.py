"""The random words of torch's CPU generator, a Mersenne twister (MT19937), from any place of their stream.

Going ahead by n words is linear in the bits of the state. It is the polynomial x^n modulo the characteristic polynomial
of the generator: its coefficients say which of the next 19937 words to add up, modulo 2. Source: Haramoto, Matsumoto,
Nishimura, Panneton, L'Ecuyer, "Efficient jump ahead for F2-linear random number generators", 2008.
"""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

__all__: list[str] = []

STATE = 5056
"""Bytes in the state of a generator of the CPU."""

FAR = 1 << 22
"""Words from which on the polynomial is faster than to draw them."""

_WORDS, _MIDDLE, _DEGREE = 624, 397, 19937

# where the state has how many words of its block are left, the place of the next, and the block: 8 bytes a word
_LEFT, _NEXT, _BLOCK = 8, 16, 24


def ahead(state: Tensor, words: int) -> Tensor:
    """The state of a generator after `words` more random words of 32 bits."""
    raw = state.numpy().copy()
    left, block = raw[_LEFT : _LEFT + 4].view(np.int32), raw[_BLOCK : _BLOCK + 8 * _WORDS].view(np.uint64)
    place = raw[_NEXT : _NEXT + 8].view(np.uint64)
    target = (_WORDS if left[0] == 1 else int(place[0])) + words
    if words > 0:
        behind = (target - 1) // _WORDS * _WORDS
        block[:] = _moved(block.astype(np.uint32), behind)
        place[0], left[0] = target - behind, _WORDS + 1 - (target - behind)
    return torch.from_numpy(raw)


def _moved(block: np.ndarray, words: int) -> np.ndarray:
    """The block of words that begins `words` after this one begins; `words` is a multiple of a block."""
    if words < FAR:
        for _ in range(words // _WORDS):
            block = _next(block)
        return block
    blocks = [block]
    while len(blocks) * _WORDS < _DEGREE + _WORDS + 1:
        blocks.append(_next(blocks[-1]))
    # of the first word only one bit belongs to the state: so the sum is of the words behind it
    line, total = np.concatenate(blocks)[1:], np.zeros(_WORDS, np.uint32)
    for term in _terms(_power(words - 1)):
        total ^= line[term : term + _WORDS]
    return total


def _next(block: np.ndarray) -> np.ndarray:
    """The next block. A word depends on the one 227 places before it, so that many are made at a time."""
    line = np.concatenate([block, np.empty(_WORDS, np.uint32)])
    for start in range(0, _WORDS, _WORDS - _MIDDLE):
        stop = min(start + _WORDS - _MIDDLE, _WORDS)
        mixed = (line[start:stop] & np.uint32(1 << 31)) | (line[start + 1 : stop + 1] & np.uint32((1 << 31) - 1))
        twist = np.where(mixed & np.uint32(1), np.uint32(0x9908B0DF), np.uint32(0))
        line[_WORDS + start : _WORDS + stop] = line[start + _MIDDLE : stop + _MIDDLE] ^ (mixed >> np.uint32(1)) ^ twist
    return line[_WORDS:]


@lru_cache(maxsize=64)
def _power(exponent: int) -> int:
    """x^exponent modulo the characteristic polynomial, as the bits of a number."""
    power = 1
    for bit in bin(exponent)[2:]:
        power = _reduced(_squared(power) << (bit == "1"))
    return power


def _squared(polynomial: int) -> int:
    """The square: zeros between the coefficients."""
    size = polynomial.bit_length() // 8 + 1
    bits = np.unpackbits(np.frombuffer(polynomial.to_bytes(size, "little"), np.uint8), bitorder="little")
    spread = np.zeros(2 * len(bits), np.uint8)
    spread[::2] = bits
    return int.from_bytes(np.packbits(spread, bitorder="little").tobytes(), "little")


def _reduced(polynomial: int) -> int:
    while high := polynomial >> _DEGREE:
        polynomial ^= high << _DEGREE
        for term in _lower_terms():
            polynomial ^= high << term
    return polynomial


@cache
def _lower_terms() -> tuple[int, ...]:
    """The exponents of the characteristic polynomial, without the highest.

    It is found from the last bits of 40,000 words (Massey, "Shift-register synthesis and BCH decoding", 1969).
    """
    blocks = [np.arange(1, _WORDS + 1, dtype=np.uint32)]
    while len(blocks) * _WORDS < 2 * _DEGREE + _WORDS:
        blocks.append(_next(blocks[-1]))
    bits = (np.concatenate(blocks[1:]) & np.uint32(1)).tolist()
    connection, before, length, since, window = 1, 1, 0, 1, 0
    for place, bit in enumerate(bits):
        window = window << 1 | bit  # bit i is the i-th last of the sequence
        if (connection & window).bit_count() & 1:
            changed = connection ^ before << since
            if 2 * length <= place:
                connection, before, length, since = changed, connection, place + 1 - length, 1
                continue
            connection = changed
        since += 1
        window &= (1 << _DEGREE + 1) - 1
    return tuple(_DEGREE - term for term in _terms(connection) if term)


def _terms(polynomial: int) -> list[int]:
    size = polynomial.bit_length() // 8 + 1
    bits = np.unpackbits(np.frombuffer(polynomial.to_bytes(size, "little"), np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()
