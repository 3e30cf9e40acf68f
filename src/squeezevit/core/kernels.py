"""Match and fuse on a GPU: two Triton kernels that read tokens where they lie, with no copies and no R x K matrix in memory.

Equations and letters as in `squeezevit.core.ops`, whose `match` and `fuse` remain the reference. Triton is imported when a squeeze
first runs here, in `_compiled`; until then and without it everything else works.
"""

from __future__ import annotations

import math
import os
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from squeezevit.core.capture import exporting
from squeezevit.errors import MissingExtraError

if TYPE_CHECKING:
    import triton.language as tl

INSTALLED = find_spec("triton") is not None  # found, not imported: a constant, so that what is compiled may ask too
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, HOSTS = 32, 64  # of a block; fixed, since a tuner that chooses anew may change the last bit


def usable(*tensors: Tensor | None) -> bool:
    """Whether `squeeze` takes these tensors, here and now; where it does not, `squeezevit.core.ops` does.

    Only where the environment says SQUEEZEVIT_TRITON=1: no GPU has run these kernels yet, so nobody gets them unasked. Never
    where gradients are needed, in tracing or export, or for other dtypes than float32, bfloat16 and float16.

    >>> usable(torch.rand(1, 5, 8))
    False
    """
    return (
        os.environ.get("SQUEEZEVIT_TRITON") == "1"
        and INSTALLED
        and not (exporting() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export())
        and all(_fits(x) for x in tensors if x is not None)
    )


def _fits(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in DTYPES and not (torch.is_grad_enabled() and x.requires_grad)


def squeeze(
    tokens: Tensor, prefix: int, kept: Tensor, pruned: Tensor, mass: Tensor | None = None, alike: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Squeeze the pruned patch tokens into the kept ones most like them, after unchanged prefix tokens; no gradient.

    Shapes: tokens [B, P + N, C] of any strides, kept [B, K] and pruned [B, R] of the N patch tokens, mass [B, P + N] float32,
    alike [B, N, D] -> tokens [B, P + K, C], hosts [B, R] int64, and the masses going out [B, P + K] float32 where mass is given.
    With mass it is the mean weighted by mass, without it eq. 4 of Wei et al. 2023; alike is what tokens are matched by, where
    not they themselves. The same call gives the same bits; a kept token that hosts nobody goes out bit for bit.
    Raises MissingExtraError where Triton is not installed; on a CPU it runs in Triton's interpreter alone (TRITON_INTERPRET=1).

        if usable(tokens):
            tokens, hosts, _ = squeeze(tokens, 1, kept, pruned)
    """
    squeezed, hosts, totals = _squeeze(tokens, prefix, kept, pruned, mass, alike)
    return squeezed, hosts, None if mass is None else totals


def _outputs(
    tokens: Tensor, prefix: int, kept: Tensor, pruned: Tensor, mass: Tensor | None, alike: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors to write to: tokens [B, P + K, C], hosts [B, R], totals [B, P + K] (what each outgoing token was divided by)."""
    B, K = kept.shape
    T = prefix + K
    squeezed, totals = tokens.new_empty(B, T, tokens.shape[2]), tokens.new_empty(B, T, dtype=torch.float32)
    return squeezed, pruned.new_empty(pruned.shape, dtype=torch.int64), totals


@torch.library.custom_op(
    "squeezevit::squeeze",
    mutates_args=(),
    schema="(Tensor tokens, int prefix, Tensor kept, Tensor pruned, Tensor? mass, Tensor? alike) -> (Tensor, Tensor, Tensor)",
)
def _squeeze(
    tokens: Tensor, prefix: int, kept: Tensor, pruned: Tensor, mass: Tensor | None, alike: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    match, fuse = _compiled()
    squeezed, hosts, totals = _outputs(tokens, prefix, kept, pruned, mass, alike)
    (B, K), R, (_, T, C) = kept.shape, pruned.shape[1], squeezed.shape
    pairs = (kept.contiguous(), pruned.contiguous(), hosts, torch.empty_like(hosts, dtype=torch.float32))
    by, first = (tokens, prefix) if alike is None else (alike, 0)
    mass = mass if mass is None else mass.contiguous()
    with torch.cuda.device_of(tokens):  # Triton launches on the current device, whichever the tensors are on
        if programs := B * _blocks(R, ROWS):
            sizes: tuple[float, ...] = (*by.stride(), first, K, R, by.shape[2], by.is_cuda, ROWS, HOSTS, _channels(by))
            match[(programs,)](by, *pairs, *sizes, enable_fp_fusion=True)  # said, since Triton 3.9 warns where it is not
        if programs := B * _blocks(T, ROWS) * _blocks(C, _channels(tokens)):
            sizes = (*tokens.stride(), prefix, K, R, C, tokens.shape[1], math.e, ROWS, _channels(tokens))
            fuse[(programs,)](tokens, *pairs, mass, squeezed, totals, *sizes, enable_fp_fusion=True)
    return squeezed, hosts, totals


_squeeze.register_fake(_outputs)


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


def _channels(x: Tensor) -> int:
    """Of a block: one cache line of a row."""
    return 128 // x.element_size()


@cache
def _compiled() -> tuple[Any, Any]:
    """Both kernels, which Triton compiles when they are first launched."""
    global tl
    if not INSTALLED:
        raise MissingExtraError("squeezevit.core.kernels needs triton, which comes with torch for GPUs: pip install triton")
    import triton
    import triton.language as tl

    counts = ["first", "K", "R"]  # these differ from stage to stage: not worth a compilation each
    return triton.jit(_match, do_not_specialize=counts), triton.jit(_fuse, do_not_specialize=[*counts, "T"])


def _match(
    x: tl.tensor,  # [B, *, C] with patch token 0 in row `first`
    kept: tl.tensor,  # [B, K]
    pruned: tl.tensor,  # [B, R]
    hosts: tl.tensor,  # [B, R], written
    cosine: tl.tensor,  # [B, R], written
    image_stride: int,
    row_stride: int,
    channel_stride: int,
    first: int,
    K: int,
    R: int,
    C: int,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    HOSTS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """One program per image and block of pruned tokens: their hosts among the kept ones, the lowest position where cosines tie."""
    image = (tl.program_id(0) // tl.cdiv(R, ROWS)).to(tl.int64)
    i = tl.program_id(0) % tl.cdiv(R, ROWS) * ROWS + tl.arange(0, ROWS)
    x += image * image_stride + first * row_stride
    rows = tl.load(pruned + image * R + i, mask=i < R, other=0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    host = tl.zeros([ROWS], tl.int32)
    length = tl.zeros([ROWS], tl.float32)
    for start in range(0, K, HOSTS):
        j = start + tl.arange(0, HOSTS)
        columns = tl.load(kept + image * K + j, mask=j < K, other=0)
        products = tl.zeros([ROWS, HOSTS], tl.float32)
        square_a = tl.zeros([ROWS], tl.float32)
        square_b = tl.zeros([HOSTS], tl.float32)
        for channel in range(0, C, CHANNELS):
            c = channel + tl.arange(0, CHANNELS)
            at = c[None, :] * channel_stride
            a = tl.load(x + rows[:, None] * row_stride + at, mask=(i < R)[:, None] & (c < C)[None, :], other=0.0)
            b = tl.load(x + columns[:, None] * row_stride + at, mask=(j < K)[:, None] & (c < C)[None, :], other=0.0)
            wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
            square_a += tl.sum(wide_a * wide_a, axis=1)
            square_b += tl.sum(wide_b * wide_b, axis=1)
            if NATIVE:
                products = tl.dot(a, tl.trans(b), products, input_precision="ieee")
            else:
                products = tl.dot(wide_a, tl.trans(wide_b), products, input_precision="ieee")
        along = tl.div_rn(products, tl.maximum(tl.sqrt_rn(square_b), 1e-12)[None, :])
        along = tl.where((j < K)[None, :], along, float("-inf"))
        top, position = tl.max(along, axis=1, return_indices=True)
        host = tl.where(top > best, start + position, host)
        best = tl.where(top > best, top, best)
        length = tl.maximum(tl.sqrt_rn(square_a), 1e-12)
    tl.store(hosts + image * R + i, host.to(tl.int64), mask=i < R)
    tl.store(cosine + image * R + i, tl.div_rn(best, length), mask=i < R)


def _fuse(
    x: tl.tensor,  # [B, T, C] with patch token 0 in row `first`
    kept: tl.tensor,  # [B, K]
    pruned: tl.tensor,  # [B, R]
    hosts: tl.tensor,  # [B, R]
    cosine: tl.tensor,  # [B, R]
    mass: tl.tensor | None,  # [B, T]
    out: tl.tensor,  # [B, first + K, C], written
    totals: tl.tensor,  # [B, first + K], written
    image_stride: int,
    row_stride: int,
    channel_stride: int,
    first: int,
    K: int,
    R: int,
    C: int,
    T: int,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """One program per image, block of outgoing tokens and block of channels; sums in a fixed order, so the same bits every time.

    A prefix token is an outgoing token that no pruned one names as its host.
    """
    down, across = tl.cdiv(first + K, ROWS), tl.cdiv(C, CHANNELS)
    image = (tl.program_id(0) // (down * across)).to(tl.int64)
    t = tl.program_id(0) // across % down * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)
    j = t - first  # position among the kept, below 0 for the prefix
    row = tl.where(j < 0, t, first + tl.load(kept + image * K + j, mask=(j >= 0) & (j < K), other=0))
    inside = (j < K)[:, None] & (c < C)[None, :]
    x += image * image_stride
    own = tl.load(x + row[:, None] * row_stride + c[None, :] * channel_stride, mask=inside, other=0.0)
    weight = tl.full([ROWS], E, tl.float32) if mass is None else tl.load(mass + image * T + row, mask=j < K, other=1.0)
    total, guests = weight, tl.zeros([ROWS], tl.int32)
    fused = own.to(tl.float32) * weight[:, None]
    for start in range(0, R, ROWS):
        i = start + tl.arange(0, ROWS)
        guest = first + tl.load(pruned + image * R + i, mask=i < R, other=0)
        here = j[:, None] == tl.load(hosts + image * R + i, mask=i < R, other=K)[None, :]  # K is the position of nobody
        if mass is None:
            weights = tl.exp(tl.load(cosine + image * R + i, mask=i < R, other=0.0))
        else:
            weights = tl.load(mass + image * T + guest, mask=i < R, other=0.0)
        shares = tl.where(here, weights[None, :], 0.0)
        at = guest[:, None] * row_stride + c[None, :] * channel_stride
        tokens = tl.load(x + at, mask=(i < R)[:, None] & (c < C)[None, :], other=0.0)
        fused = tl.dot(shares, tokens.to(tl.float32), fused, input_precision="ieee")
        total += tl.sum(shares, axis=1)
        guests += tl.sum(here.to(tl.int32), axis=1)
    fused = tl.where((guests > 0)[:, None], (fused / total[:, None]).to(own.dtype), own)  # alone: its own bits, -0 too
    tl.store(out + (image * (first + K) + t)[:, None] * C + c[None, :], fused, mask=inside)
    if tl.program_id(0) % across == 0:
        tl.store(totals + image * (first + K) + t, total, mask=j < K)
