"""The inner products of one token's hidden states in a single Triton kernel that reads every state once from memory.

Importing this module needs Triton, which comes with the CUDA builds of PyTorch: `statistics` imports it where it can be used,
and computes the same numbers without it everywhere else.
"""

from functools import cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float64
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float32)

MAX_STATES = 129
"""More do not fit in the registers of one program."""

_WORDS = 16  # 32-bit words of each state that a program holds at once


@triton.jit
@no_type_check
def _number(words, half: tl.constexpr, HALVES: tl.constexpr):
    """The float32, or one of the two bfloat16 (the upper halves of float32 numbers), in each word."""
    bits = (words << 16 * (1 - half)) & -65536 if HALVES == 2 else words
    return bits.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
@no_type_check
def _kernel(
    states,
    gram,
    step,
    absolute,
    n_states,
    token_stride,
    state_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """One token, in float64. The last state is multiplied apart: models have 2^k layers, and so one state more.

    `states` are words of 32 bits: Triton 3.6 does not compile float64 products of numbers that were loaded as 16 bits.
    """
    token = tl.program_id(0).to(tl.int64)
    n_layers = n_states - 1
    row = tl.arange(0, ROWS)
    known = row < n_layers
    first = states + token * token_stride
    end = first + tl.cast(n_layers, tl.int64) * state_stride
    products = tl.zeros((ROWS, ROWS), tl.float64)
    edge = tl.zeros((ROWS, WORDS), tl.float64)
    squares = tl.zeros((ROWS, WORDS), tl.float64)
    sizes = tl.zeros((ROWS, WORDS), tl.float64)
    corner = tl.zeros((WORDS,), tl.float64)
    for start in range(0, WIDTH, WORDS):
        column = start + tl.arange(0, WORDS)
        inside = known[:, None] & (column < WIDTH)[None, :]
        here = first + row[:, None].to(tl.int64) * state_stride + column[None, :]
        words = tl.load(here, mask=inside, other=0)
        # The same lines once more, shifted by one state: they come from the cache.
        words_after = tl.load(here + state_stride, mask=inside, other=0)
        words_last = tl.load(end + column, mask=column < WIDTH, other=0)
        for half in tl.static_range(HALVES):
            state = _number(words, half, HALVES)
            after = _number(words_after, half, HALVES)
            last = _number(words_last, half, HALVES)
            products += tl.dot(state, tl.trans(state), out_dtype=tl.float64)
            edge += state * last[None, :]
            corner += last * last
            squares += (after - state) * (after - state)
            sizes += tl.abs(after - state)
    edge_sums = tl.sum(edge, 1)
    gram += token * n_states * n_states
    tl.store(gram + row[:, None] * n_states + row[None, :], products, mask=known[:, None] & known[None, :])
    tl.store(gram + row * n_states + n_layers, edge_sums, mask=known)
    tl.store(gram + n_layers * n_states + row, edge_sums, mask=known)
    tl.store(gram + n_layers * n_states + n_layers, tl.sum(corner, 0))
    tl.store(step + token * n_layers + row, tl.sqrt(tl.sum(squares, 1)), mask=known)
    tl.store(absolute + token * n_layers + row, tl.sum(sizes, 1), mask=known)


def usable(states: Float[Tensor, "token state dim"]) -> bool:
    """Whether `products` takes these states."""
    words = states.element_size() / 4
    even = all((stride * words).is_integer() for stride in (*states.stride()[:2], states.shape[2], states.storage_offset()))
    return states.dtype in DTYPES and 2 <= states.shape[1] <= MAX_STATES and states.stride(2) == 1 and even


def products(
    states: Float[Tensor, "token state dim"],
) -> tuple[Float64[Tensor, "token state state"], Float64[Tensor, "token layer"], Float64[Tensor, "token layer"]]:
    """Gram matrices, lengths |h_{i+1} - h_i| and sums of |h_{i+1} - h_i| over the width, computed in float64.

    For `usable` states: tokens and states may lie at any even stride, the width must be contiguous.
    """
    tokens, n_states, width = states.shape
    empty = {"dtype": torch.float64, "device": states.device}
    gram = torch.empty((tokens, n_states, n_states), **empty)
    step, absolute = torch.empty((2, tokens, n_states - 1), **empty)
    words = states.view(torch.int32)
    rows = max(16, triton.next_power_of_2(n_states - 1))
    sizes = {"WIDTH": words.shape[2], "ROWS": rows, "WORDS": _WORDS, "HALVES": width // words.shape[2]}
    _kernel[(tokens,)](words, gram, step, absolute, n_states, *words.stride()[:2], **sizes, num_warps=min(8, rows // 8))
    return gram, step, absolute


@cache
def problem(device: torch.device) -> str | None:
    """None where the kernel compiles, runs and is right on this device; else what went wrong."""
    states = torch.arange(2 * 3 * 80, device=device).remainder(7).reshape(2, 3, 80)
    for dtype in DTYPES:
        given, wide = states.to(dtype), states.double()
        try:
            gram, _, absolute = products(given)
            right = torch.equal(gram, wide @ wide.mT) and torch.equal(absolute, (wide[:, 1:] - wide[:, :-1]).abs().sum(-1))
        except Exception as error:  # no compiler for the launcher, an unknown chip, a driver too old: all of them mean "plain"
            return f"{type(error).__name__}: {error}".splitlines()[0]
        if not right:
            return f"the kernel gives wrong products of {dtype}"
    return None
