"""The pure functions, on random, tied, clustered and badly shaped tensors, against the loops of oracles.py and plain identities."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from squeezevit.core import ops

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(0, 9), st.integers(2, 6))  # B, K, R, C
SEEDS = st.integers(0, 2**31)


def tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(size: tuple[int, int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    B, K, R, C = size
    return tokens(seed, B, K, C), tokens(seed + 1, B, R, C)


def clustered(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens near four centres, of which bfloat16 cannot tell many apart."""
    x = tokens(0, 1, 4, 32).repeat_interleave(16, dim=1) + 0.02 * tokens(1, 1, 64, 32)
    x = x[:, torch.randperm(64, generator=torch.Generator().manual_seed(2))].to(dtype)
    return x[:, :32], x[:, 32:]


@given(SIZES, SEEDS)
def test_squeeze_equals_oracle(size, seed):
    reserved, pruned = pair(size, seed)
    torch.testing.assert_close(ops.squeeze(reserved, pruned).double(), oracles.squeeze(reserved, pruned), rtol=1e-5, atol=1e-5)


@given(SIZES, SEEDS)
def test_match_is_one_host_of_highest_cosine(size, seed):
    reserved, pruned = pair(size, seed)
    hosts, cosine = ops.match(reserved, pruned)
    assert hosts.shape == cosine.shape == pruned.shape[:2]
    assert hosts.tolist() == [oracles.match(a, b) for a, b in zip(reserved.double(), pruned.double(), strict=True)]
    best = F.cosine_similarity(pruned[:, :, None], reserved[:, None], dim=-1).amax(dim=2)
    torch.testing.assert_close(cosine, best)


@given(SIZES, SEEDS)
def test_tokens_without_guests_are_bit_equal(size, seed):
    reserved, pruned = pair(size, seed)
    hosts, _ = ops.match(reserved, pruned)
    alone = torch.ones(reserved.shape[:2], dtype=torch.bool).scatter(1, hosts, False)
    assert torch.equal(ops.squeeze(reserved, pruned)[alone], reserved[alone])


@given(SIZES, SEEDS)
def test_result_lies_within_each_group(size, seed):
    reserved, pruned = pair(size, seed)
    hosts, _ = ops.match(reserved, pruned)
    y = ops.squeeze(reserved, pruned)
    for b in range(len(y)):
        for j in range(y.shape[1]):
            group = torch.cat([reserved[b, j : j + 1], pruned[b, hosts[b] == j]])
            assert (y[b, j] >= group.amin(0) - 1e-5).all()
            assert (y[b, j] <= group.amax(0) + 1e-5).all()


@given(SIZES, SEEDS)
def test_squeeze_follows_permutations(size, seed):
    reserved, pruned = pair(size, seed)
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randperm(n, generator=generator) for n in size[1:3])
    expected = ops.squeeze(reserved, pruned)[:, p]
    torch.testing.assert_close(ops.squeeze(reserved[:, p], pruned[:, q]), expected, rtol=1e-5, atol=1e-5)


@given(SIZES, SEEDS)
def test_fuse_by_mass_conserves_the_sum(size, seed):
    reserved, pruned = pair(size, seed)
    own, weights = tokens(seed + 2, *reserved.shape[:2]).exp(), tokens(seed + 3, *pruned.shape[:2]).exp()
    hosts, _ = ops.match(reserved, pruned)
    y = ops.fuse(reserved, pruned, hosts, own, weights)
    before = (own[..., None] * reserved).sum(1) + (weights[..., None] * pruned).sum(1)
    after = (own.scatter_add(1, hosts, weights)[..., None] * y).sum(1)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_fuse_weights_are_the_papers():
    reserved, pruned = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    y = ops.squeeze(reserved, pruned)
    e, c = math.e, math.exp(0.8)
    torch.testing.assert_close(y[0, 0], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(y[0, 1], (e * torch.tensor([0.0, 2.0]) + c * torch.tensor([3.0, 4.0])) / (e + c))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identical_tokens_have_exactly_one_host(dtype):
    x = tokens(0, 1, 1, 8).expand(2, 12, 8).to(dtype)
    reserved, pruned = x[:, :5], x[:, 5:]
    hosts, cosine = ops.match(reserved, pruned)
    assert hosts.shape == (2, 7)
    assert ((hosts >= 0) & (hosts < 5)).all()
    torch.testing.assert_close(cosine, torch.ones(2, 7))
    assert ops.fuse(reserved, pruned, hosts, torch.ones(2, 5), torch.ones(2, 7)).dtype == dtype
    guests = ops.fuse(torch.zeros(2, 5, 1), torch.ones(2, 7, 1), hosts, torch.ones(2, 5), torch.ones(2, 7))[..., 0]
    assert (guests / (1 - guests)).sum(dim=1).tolist() == pytest.approx([7, 7])  # each pruned token arrived once, in one place


def test_clustered_bfloat16_tokens_are_matched_in_float32():
    """In bfloat16 arithmetic many cosines tie; the hosts must be those of the same numbers in float64, each once."""
    reserved, pruned = clustered(torch.bfloat16)
    tied = (F.normalize(pruned, dim=-1) @ F.normalize(reserved, dim=-1).mT == 1).sum(dim=-1) > 1
    assert tied.any(), "the trap is not set: no cosines tie in bfloat16"
    hosts, cosine = ops.match(reserved, pruned)
    assert cosine.dtype == torch.float32
    assert hosts.tolist() == [oracles.match(reserved[0].double(), pruned[0].double())]
    torch.testing.assert_close(ops.squeeze(reserved, pruned).double(), oracles.squeeze(reserved, pruned), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit(dtype):
    reserved, pruned = clustered(torch.float32)
    query, keys, weight = tokens(3, 2, 3, 8), tokens(4, 2, 3, 9, 8), tokens(5, 24, 32)
    calls = {
        "match": lambda: ops.match(reserved, pruned),
        "squeeze": lambda: (ops.squeeze(reserved, pruned),),
        "class_attention": lambda: (ops.class_attention(query, keys),),
        "class_attention_folded": lambda: (ops.class_attention_folded(query, weight, reserved.expand(2, -1, -1)),),
        "received_attention": lambda: (ops.received_attention(keys, keys),),
    }
    expected = {name: call() for name, call in calls.items()}
    with torch.autocast("cpu", dtype):
        found = {name: call() for name, call in calls.items()}
    for name, results in expected.items():
        for a, b in zip(results, found[name], strict=True):
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name


@given(st.integers(1, 3), st.integers(1, 20), SEEDS, st.booleans(), st.data())
def test_split_is_a_partition_in_spatial_order(b, n, seed, ties, data):
    k = data.draw(st.integers(0, n))
    scores = tokens(seed, b, n)
    scores = scores.round() if ties else scores
    kept, pruned = ops.split(scores, k)
    assert kept.shape == (b, k)
    assert pruned.shape == (b, n - k)
    assert torch.equal(torch.cat([kept, pruned], 1).sort(dim=1).values, torch.arange(n).expand(b, -1))
    assert (kept.diff(dim=1) > 0).all()
    assert (pruned.diff(dim=1) > 0).all()
    if 0 < k < n:
        assert (scores.gather(1, kept).amin(1) >= scores.gather(1, pruned).amax(1)).all()


@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 12), SEEDS)
def test_take_is_gather(b, t, m, seed):
    x, index = tokens(seed, b, t, 4), torch.randint(t, (b, m), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(ops.take(x, index), x.gather(1, index[..., None].expand(-1, -1, 4)))
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.take(strided, index), ops.take(x, index))


@given(st.integers(1, 2), st.integers(1, 3), st.integers(2, 9), st.integers(1, 5), SEEDS, st.booleans())
def test_folded_class_attention_equals_unfolded(b, h, t, d, seed, biased):
    x, weight, offset = tokens(seed, b, t, 6), tokens(seed + 1, h * d, 6), tokens(seed + 2, h * d)
    query = tokens(seed + 3, b, h, d)
    bias = tokens(seed + 4, b, 1, 1, t) if biased else None
    keys = F.linear(x, weight, offset).view(b, t, h, d).transpose(1, 2)
    folded = ops.class_attention_folded(query, weight, x, bias)
    torch.testing.assert_close(folded, ops.class_attention(query, keys, bias), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folded.sum(dim=1), torch.ones(b))


@given(st.integers(1, 2), st.integers(1, 3), st.integers(2, 9), st.integers(1, 5), SEEDS, st.booleans())
def test_received_attention_equals_oracle_and_sums_to_one(b, h, t, d, seed, weighed):
    query, keys = tokens(seed, b, h, t, d), tokens(seed + 1, b, h, t, d)
    mass = tokens(seed + 2, b, t).exp() if weighed else None
    bias = None if mass is None else mass.log()[:, None, None]
    received = ops.received_attention(query, keys, bias, mass)
    torch.testing.assert_close(received.sum(dim=1), torch.ones(b))
    for i in range(b):
        own = torch.ones(t) if mass is None else mass[i]
        matrices = oracles.softmax(query[i].double() @ keys[i].double().mT + own.log())
        torch.testing.assert_close(received[i].double(), oracles.received_scores(matrices, own, 0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 10**12, -3])
def test_position_noise_is_fixed_and_spread(seed):
    noise = ops.position_noise(4096, seed, torch.device("cpu"))
    assert noise.dtype == torch.float32
    assert torch.equal(noise, ops.position_noise(4096, seed, torch.device("cpu")))
    assert torch.equal(noise[:100], ops.position_noise(100, seed, torch.device("cpu")))
    assert ((noise >= 0) & (noise < 1)).all()
    assert (noise.histc(16, 0, 1) / 256 - 1).abs().max() < 0.3
    assert abs(noise[:-1].sub(0.5) @ noise[1:].sub(0.5)) / 4095 < 0.01  # neighbours are not alike
    other = ops.position_noise(4096, seed + 1, torch.device("cpu"))
    assert abs(torch.corrcoef(torch.stack([noise, other]))[0, 1]) < 0.06


def test_position_noise_is_the_published_hash():
    """MurmurHash3's finaliser in plain integers, so that a table made elsewhere keeps the same tokens."""

    def finalise(h: int) -> int:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = ((h ^ (h >> shift)) * factor) % 2**32
        return h ^ (h >> 16)

    expected = [(finalise((i + 7 * 0x9E3779B1) % 2**32) >> 8) / 2**24 for i in range(200)]
    assert ops.position_noise(200, 7, torch.device("cpu")).tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("reserved", "pruned"),
    [((2, 3, 4), (2, 3, 5)), ((2, 3, 4), (1, 3, 4)), ((3, 4), (3, 4)), ((2, 3, 4), (3, 4)), ((2, 0, 4), (2, 3, 4))],
    ids=["channels", "batch", "unbatched", "one-unbatched", "no-host"],
)
def test_squeeze_names_shapes_that_do_not_fit(reserved, pruned):
    with pytest.raises(ValueError, match=r"reserved \[B, K, C\] with K >= 1") as error:
        ops.squeeze(torch.zeros(reserved), torch.zeros(pruned))
    assert str(list(reserved)) in str(error.value)
    assert str(list(pruned)) in str(error.value)


def test_zero_tokens_do_not_make_nan():
    y = ops.squeeze(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4))
    assert torch.equal(y, torch.zeros(1, 2, 4))


def test_gradients_are_right():
    reserved, pruned = (x.double().requires_grad_() for x in pair((2, 3, 4, 5), 0))
    hosts, cosine = ops.match(reserved, pruned)
    fused = ops.fuse(reserved, pruned, hosts, *ops.squeeze_weights(reserved, cosine))
    grads = torch.autograd.grad(fused.square().sum(), (reserved, pruned))
    oracle_in = [x.detach().clone().requires_grad_() for x in (reserved, pruned)]
    literal = torch.stack([literal_fuse(*one) for one in zip(*oracle_in, hosts.tolist(), strict=True)])
    expected = torch.autograd.grad(literal.square().sum(), oracle_in)
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def pairwise_results(n: int, channels: int = 8) -> dict[str, tuple[torch.Tensor, ...]]:
    """What every function gives that multiplies all tokens with all others, for n of them."""
    q, k, mass = tokens(0, 2, 2, n, channels), tokens(1, 2, 2, n, channels), tokens(2, 2, n).exp()
    a, b, c = tokens(3, 2, n // 2, channels), tokens(4, 2, n - n // 2, channels), tokens(5, 2, n, channels)
    return {
        "received": (ops.received_attention(q, k),),
        "received by mass": (ops.received_attention(q, k, mass.log()[:, None, None], mass),),
        "match": ops.match(b, a),
        "best_match": ops.best_match(a, b),
        "uniqueness": (ops.uniqueness(c, mass),),
    }


@pytest.mark.parametrize("n", [2, 5, 12, 13, 40])
def test_blocks_of_rows_change_nothing(n, monkeypatch):
    whole = pairwise_results(n)
    for name, value in (("_PRODUCTS", 1), ("_ROWS", 6), ("_TRIANGLE", 4)):
        monkeypatch.setattr(ops, name, value)
    for name, found in pairwise_results(n).items():
        for x, y in zip(found, whole[name], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=name)


def test_no_tokens_to_match():
    along, index = ops.best_match(torch.zeros(2, 0, 4), torch.zeros(2, 3, 4))
    assert along.shape == index.shape == (2, 0)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            self.numbers = max(self.numbers, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("n", [1000, 2000, 4000])
def test_memory_grows_with_tokens_and_not_with_their_square(n):
    with Largest() as largest, torch.inference_mode():
        pairwise_results(n)
    assert largest.numbers <= 2 * max(2**19, 256 * n)  # of two images


def test_one_block_where_the_number_of_tokens_is_a_symbol():
    class Scores(torch.nn.Module):
        def forward(self, q, k):
            hosts, cosine = ops.match(k[:, 0], q[:, 0])
            return ops.received_attention(q, k), ops.uniqueness(q[:, 0], k[:, 0, :, 0]), hosts, cosine

    length = {2: torch.export.Dim("n", min=4, max=5000)}
    q, k = tokens(0, 1, 2, 900, 8), tokens(1, 1, 2, 900, 8)
    exported = torch.export.export(Scores(), (q, k), dynamic_shapes=(length, length)).module()
    for n in (40, 300, 900, 1200):
        q, k = tokens(n, 1, 2, n, 8), tokens(n + 1, 1, 2, n, 8)
        for found, expected in zip(exported(q, k), Scores()(q, k), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("n", [196, 1500])
def test_what_is_compiled_has_few_blocks(n):
    blocks = []

    def count(graph, inputs):
        blocks.append(sum("softmax" in str(node.target) for node in graph.graph.nodes))
        return graph

    q, k = tokens(0, 1, 1, n, 8), tokens(1, 1, 1, n, 8)
    compiled = torch.compile(ops.received_attention, fullgraph=True, dynamic=False, backend=count)
    torch.testing.assert_close(compiled(q, k), ops.received_attention(q, k), rtol=1e-5, atol=1e-8)
    assert blocks == [1 if n == 196 else 4]


def literal_fuse(reserved: torch.Tensor, pruned: torch.Tensor, hosts: list[int]) -> torch.Tensor:
    rows = []
    for j, x in enumerate(reserved):
        guests = [p for p, host in zip(pruned, hosts, strict=True) if host == j]
        weights = [F.cosine_similarity(p, x, dim=0).exp() for p in guests]
        total = sum(weights, torch.tensor(math.e))
        rows.append((math.e * x + sum((w * p for w, p in zip(weights, guests, strict=True)), torch.zeros_like(x))) / total)
    return torch.stack(rows)
