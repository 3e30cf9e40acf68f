"""The Triton kernels against `Stage.squeeze` on a CPU: on a GPU where there is one, and in Triton's interpreter, which has to be
chosen before Triton is imported: `test_in_the_interpreter` runs this file once more, in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from squeezevit.core import kernels, ops
from squeezevit.core.reducer import Carry, Stage

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter")
gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
here = pytest.mark.skipif(INTERPRETED, reason="starts a process of its own")

SIZES = [(1, 70, 37, 192), (0, 1, 5, 48), (5, 33, 1, 384), (1, 10, 33, 1024), (1, 1, 1, 20)]  # P, K, R, C
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # the interpreter cuts bfloat16 off, unrounded


def case(P, K, R, C, dtype=torch.float32, clustered=False):  # -> tokens [2, P + K + R, C], kept [2, K], pruned [2, R]
    x = torch.randn(2, P + K + R, C)
    if clustered:
        x = torch.randn(2, 4, C).repeat(1, x.shape[1] // 4 + 1, 1)[:, : x.shape[1]] + 0.02 * x
    return x.to(dtype), *ops.split(torch.rand(2, K + R), K)


def on_device(*tensors):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in tensors]


def check(x, P, kept, pruned, mass=None, alike=None):
    """As on the CPU path, lonely tokens and the prefix to the bit; hosts may differ where cosines do by less than rounding."""
    tokens, hosts, masses = (y if y is None else y.cpu() for y in kernels.squeeze(*on_device(x, P, kept, pruned, mass, alike)))
    stage = Stage(x, P, kept.shape[1], 0, True, Carry(x.shape[1] - P, mass), attend=lambda: None)
    want, want_hosts, want_masses = stage.squeeze(kept, pruned, mass is not None, alike)
    torn, by = (hosts != want_hosts).float(), x[:, P:] if alike is None else alike
    assert tokens.is_contiguous() and hosts.dtype == torch.int64 and torn.mean() < 0.05
    a, b = (F.normalize(ops.take(by, index).double(), dim=-1) for index in (pruned, kept))
    cosine = a @ b.mT
    assert (cosine.amax(dim=2) - cosine.gather(2, hosts[..., None])[..., 0]).max() < 1e-6
    either = torch.zeros(tokens.shape[:2]).scatter_add(1, hosts + P, torn).scatter_add(1, want_hosts + P, torn) > 0
    torch.testing.assert_close(tokens[~either], want[~either], rtol=CLOSE[x.dtype], atol=CLOSE[x.dtype])
    assert mass is masses is None or torch.allclose(masses[~either], want_masses[~either])
    before = torch.cat([x[:, :P], ops.take(x[:, P:], kept)], dim=1)
    lonely = torch.ones(tokens.shape[:2], dtype=torch.bool).scatter(1, hosts + P, False)
    assert torch.equal(tokens[lonely].view(torch.int16), before[lonely].view(torch.int16))


@runs
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("clustered", [False, True], ids=["random", "clustered"])
def test_equals_the_cpu_path(size, clustered):
    x, *split = case(*size, clustered=clustered)
    check(x, size[0], *split)


@runs
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_dtypes(dtype):
    x, kept, pruned = case(1, 40, 33, 72, dtype, clustered=True)
    check(x, 1, kept, pruned)
    check(x, 1, kept, pruned, mass=torch.rand(x.shape[:2]) + 1)
    check(x, 1, kept, pruned, mass=torch.randint(1, 9, x.shape[:2]).float(), alike=torch.randn(2, 73, 24).to(dtype))


@runs
def test_any_strides():
    x, kept, pruned = case(1, 12, 9, 32)
    check(x.mT.contiguous().mT, 1, kept, pruned, alike=torch.randn(2, 30, 3, 16)[:, 9:, 1])
    check(x[:, :, ::2], 1, kept.repeat_interleave(2, dim=1)[:, ::2], pruned, mass=torch.rand(22, 2).T + 1)
    check(x[:1].expand(2, -1, -1), 1, kept, pruned)


@runs
def test_of_equal_hosts_the_first():
    x, kept, pruned = case(1, 140, 20, 48)
    x = (4 * x).round()  # whole numbers, whose products are exact in whatever order a processor adds them: equal hosts tie
    first, second = kept[:, :70, None] + 1, kept[:, 70:, None] + 1
    x = x.scatter(1, second.expand(-1, -1, 48), x.gather(1, first.expand(-1, -1, 48)))
    assert kernels.squeeze(*on_device(x, 1, kept, pruned))[1].max() < 70
    check(x, 1, kept, pruned)


@runs
def test_zero_tokens_and_their_signs():
    x, kept, pruned = case(2, 6, 5, 16)
    x[:, :6] = -0.0
    check(x, 2, kept, pruned)


@runs
@pytest.mark.parametrize("mass", [False, True], ids=["weights", "mass"])
def test_compiles_whole(mass):
    x, kept, pruned = on_device(*case(1, 12, 9, 48))
    args = (x, 1, kept, pruned, torch.ones_like(x[:, :, 0]) if mass else None, x[:, 1:, :20])
    torch.library.opcheck(torch.ops.squeezevit.squeeze.default, args)
    compiled = torch.compile(kernels.squeeze, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    torch.testing.assert_close(compiled(*args), kernels.squeeze(*args))


@runs
def test_the_same_bits_in_every_run():
    x, kept, pruned = on_device(*case(1, 40, 33, 72))
    once, again = (kernels.squeeze(x, 1, kept, pruned)[0] for _ in range(2))
    assert torch.equal(once, again)


@gpu
def test_replays_in_a_cuda_graph():
    x, kept, pruned = on_device(*case(1, 70, 37, 192, torch.bfloat16))
    kernels.squeeze(x, 1, kept, pruned)
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        out = kernels.squeeze(x, 1, kept, pruned)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, kernels.squeeze(x, 1, kept, pruned), rtol=0, atol=0)


@gpu
def test_usable_only_when_asked_for_and_without_gradients(monkeypatch):
    x = torch.rand(1, 5, 8, device="cuda")
    for said in "01":
        monkeypatch.setenv("SQUEEZEVIT_TRITON", said)
        assert kernels.usable(x, None) == (said == "1")
    assert not kernels.usable(x.double()) and not kernels.usable(x, x.clone().requires_grad_())


@here
@pytest.mark.skipif(not kernels.INSTALLED, reason="needs Triton")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr


@here
def test_without_triton():
    code = """if True:
        import sys; sys.modules["triton"] = None
        import torch; from squeezevit.core import kernels
        index = torch.zeros(1, 1, dtype=torch.int64)
        try: kernels.squeeze(torch.rand(1, 5, 8), 1, index, index)
        except kernels.MissingExtraError as error: sys.exit("pip install triton" not in str(error))
        sys.exit("not raised")"""
    subprocess.run([sys.executable, "-c", code], check=True)
