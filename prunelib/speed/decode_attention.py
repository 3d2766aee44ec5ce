"""Attention of one new token over a key-value cache of fixed size, of which it reads only what is filled. Needs Triton.

A step that a CUDA graph replays cannot know, on the host, how long the cache is by now. Attention with a mask would read all of
it, and repeat keys and values for every query head of a group. Here the length is a number on the device: blocks beyond it
are not loaded, keys and values are read once for all heads of their group, and a row is split over several programs, so that
few rows fill the device as well (as in Flash-Decoding). Softmax and sums are float32.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

_BLOCK = 64  # keys of one step of a program
_ROWS = 16  # rows of the smallest matrix product: a group of query heads is padded to it


def supported(head_size: int, group: int) -> bool:
    """Whether the kernel knows heads of this size, and so many query heads to one head of keys."""
    return head_size in (16, 32, 64, 128, 256) and group <= _ROWS


def attend(
    query: Float[Tensor, "sample head 1 size"],
    keys: Float[Tensor, "sample key_head capacity size"],
    values: Float[Tensor, "sample key_head capacity size"],
    position: Int64[Tensor, "..."],
    scale: float,
) -> Float[Tensor, "sample 1 head size"]:
    """Softmax attention of the token at `position` (one number) over places 0 … `position` of the cache.

    An operator of its own for torch.compile, which does not look inside. Raises ValueError for heads that `supported` refuses.
    """
    size, group = query.shape[3], query.shape[1] // keys.shape[1]
    if not supported(size, group):
        raise ValueError(f"heads of size {size} in groups of {group} are not supported: use the masked attention of torch")
    return torch.ops.prunelib.speed.decode_attention(query, keys, values, position, scale)


@no_type_check
def _attend(query, keys, values, position, scale):
    samples, heads, _, size = query.shape
    key_heads = keys.shape[1]
    group = heads // key_heads
    splits = _splits(samples * key_heads, keys.shape[2], query.device)
    flat = {"dtype": torch.float32, "device": query.device}
    sums = torch.empty(samples, heads, splits, size, **flat)
    tops, totals = torch.empty(samples, heads, splits, **flat), torch.empty(samples, heads, splits, **flat)
    output = torch.empty(samples, 1, heads, size, dtype=query.dtype, device=query.device)
    _partial[(samples * key_heads, splits)](
        *(query, keys, values, position, sums, tops, totals, scale),
        *(query.stride(0), query.stride(1), *keys.stride()[:3], *values.stride()[:3]),
        KEY_HEADS=key_heads,
        GROUP=group,
        SIZE=size,
        SPLITS=splits,
        BLOCK=_BLOCK,
        ROWS=_ROWS,
        num_warps=4,
        num_stages=3,
    )
    _combined[(samples * heads,)](sums, tops, totals, output, SIZE=size, SPLITS=splits, num_warps=4)
    return output


torch.library.custom_op(
    "prunelib::decode_attention",
    _attend,
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor values, Tensor position, float scale) -> Tensor",
)


@torch.library.register_fake("prunelib::decode_attention")
@no_type_check
def _shape(query, keys, values, position, scale):
    return query.new_empty(query.shape[0], 1, query.shape[1], query.shape[3])


def _splits(rows: int, capacity: int, device: torch.device) -> int:
    """Programs that share a row: enough for four on every multiprocessor, each with a block at least."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = min(4 * multiprocessors / rows, capacity / _BLOCK, 64)
    return 1 << max(0, (max(1, int(wanted)) - 1).bit_length())


@triton.jit
@no_type_check
def _partial(
    query,
    keys,
    values,
    position,
    sums,
    tops,
    totals,
    scale,
    query_sample,
    query_head,
    key_sample,
    key_head,
    key_place,
    value_sample,
    value_head,
    value_place,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    sample = (tl.program_id(0) // KEY_HEADS).to(tl.int64)
    head = tl.program_id(0) % KEY_HEADS
    split = tl.program_id(1)
    length = tl.load(position).to(tl.int32) + 1
    share = tl.cdiv(tl.cdiv(length, BLOCK), SPLITS) * BLOCK
    start = split * share
    end = tl.minimum(start + share, length)

    row = tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    here = row < GROUP
    heads = head * GROUP + row
    asked = tl.load(
        query + sample * query_sample + heads[:, None] * query_head + column[None, :], mask=here[:, None], other=0.0
    )
    key_base = keys + sample * key_sample + head * key_head
    value_base = values + sample * value_sample + head * value_head
    top = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, SIZE], tl.float32)
    for block in range(start, end, BLOCK):
        place = block + tl.arange(0, BLOCK)
        filled = place < end
        key = tl.load(key_base + place[:, None] * key_place + column[None, :], mask=filled[:, None], other=0.0)
        score = tl.dot(asked, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(filled[None, :], score, -1.0e30)
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.where(filled[None, :], tl.exp(score - higher[:, None]), 0.0)
        rescale = tl.exp(top - higher)
        value = tl.load(value_base + place[:, None] * value_place + column[None, :], mask=filled[:, None], other=0.0)
        summed = summed * rescale[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * rescale + tl.sum(weight, 1)
        top = higher
    where = ((sample * KEY_HEADS + head) * GROUP + row) * SPLITS + split
    tl.store(sums + where[:, None] * SIZE + column[None, :], summed, mask=here[:, None])
    tl.store(tops + where, top, mask=here)
    tl.store(totals + where, total, mask=here)


@triton.jit
@no_type_check
def _combined(sums, tops, totals, output, SIZE: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, SIZE)
    top = tl.load(tops + row * SPLITS + split)
    weight = tl.exp(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(totals + row * SPLITS + split), 0)
    summed = tl.load(sums + (row * SPLITS + split)[:, None] * SIZE + column[None, :])
    result = tl.sum(weight[:, None] * summed, 0) / total
    tl.store(output + row * SIZE + column, result.to(output.dtype.element_ty))
