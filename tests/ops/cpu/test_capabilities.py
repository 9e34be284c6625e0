"""What is chosen by the instructions of a CPU, and how the CPU is asked."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from focalnet_det.layers import PatchEmbed
from focalnet_det.ops.cpu import capabilities
from focalnet_det.ops.cpu.capabilities import Capabilities
from focalnet_det.ops.focal_block import policy

# Which types each set of instructions computes in, by hand.
SIXTEEN = {
    "none": set(),
    "avx2": set(),
    "avx512": set(),
    "bf16": {torch.bfloat16},
    "fp16": {torch.bfloat16, torch.float16},
    "amx": {torch.bfloat16, torch.float16},
}


@pytest.fixture
def undecided() -> None:
    """Nothing is decided yet, nor afterwards."""
    capabilities.cpu.cache_clear()
    yield
    capabilities.cpu.cache_clear()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_to_compute_in(dtype: torch.dtype, autocast: bool, every_cpu: str) -> None:
    x = torch.randn(2, 3).to(torch.float32 if autocast else dtype)
    wanted = dtype if dtype in SIXTEEN[every_cpu] else torch.float32
    with torch.autocast("cpu", dtype, enabled=autocast):
        assert policy.compute_dtype(x) == (wanted, dtype)
        assert policy.is_dtype_emulated(x) == (wanted == torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_types_are_the_same_on_every_cpu(dtype: torch.dtype, every_cpu: str) -> None:
    x = torch.randn(2, dtype=dtype)
    assert policy.compute_dtype(x) == (dtype, dtype)
    assert not policy.is_dtype_emulated(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convolutions_in_sixteen_bits(dtype: torch.dtype, every_cpu: str) -> None:
    """Overlapping patches, which a stock layer embeds, in its type or in float32."""
    module = PatchEmbed(3, 8, stride=2, overlap_kernel=3, overlap_padding=1)
    seen = []
    convolve = nn.Conv2d.forward

    def forward(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.dtype)
        return convolve(self, x)

    x = torch.randn(2, 3, 6, 8)
    expected = module(x)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.Conv2d, "forward", forward)
        actual = module.to(dtype)(x.to(dtype))
    assert seen == [dtype if dtype in SIXTEEN[every_cpu] else torch.float32]
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected.detach(), rtol=0.05, atol=0.05)


def test_every_level_adds_to_the_one_before() -> None:
    names = list(capabilities.LEVELS)
    for lower, higher in itertools.pairwise(names):
        before, after = (vars(capabilities.LEVELS[name].capabilities) for name in (lower, higher))
        assert all(after[key] for key, there in before.items() if there)
        assert before != after


def test_the_environment_names_another_cpu(
    undecided: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(capabilities.VARIABLE, "avx512")
    assert capabilities.cpu() == Capabilities(avx2=True, avx512=True)
    capabilities.cpu.cache_clear()
    monkeypatch.setenv(capabilities.VARIABLE, "")
    assert capabilities.cpu() == capabilities.detect()
    capabilities.cpu.cache_clear()
    monkeypatch.setenv(capabilities.VARIABLE, "avx3")
    with pytest.raises(ValueError, match="FOCALNET_DET_CPU=avx3: must be one of none, avx2, avx5"):
        capabilities.cpu()


# As Linux lists them: arch/x86/include/asm/cpufeatures.h, arch/arm64/kernel/cpuinfo.c.
WORDS = {
    "sse sse4_2 avx": Capabilities(),
    "avx avx2 fma": Capabilities(avx2=True),
    "avx2 avx512f": Capabilities(avx2=True),  # Xeon Phi has few of the instructions
    "avx2 avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16": Capabilities(
        avx2=True, avx512=True, bfloat16=True
    ),
    "avx2 avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16 avx512_fp16 amx_bf16 amx_tile": (
        Capabilities(avx2=True, avx512=True, bfloat16=True, float16=True, amx=True)
    ),
    "avx2 amx_fp16": Capabilities(avx2=True, float16=True),
    "fp asimd asimdhp i8mm bf16": Capabilities(bfloat16=True),
}


@pytest.mark.parametrize("asked", ["torch", "linux"])
@pytest.mark.parametrize("words", WORDS)
def test_detection(words: str, asked: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    functions = SimpleNamespace()
    if asked == "torch":
        # Its names for AVX-512 all have an underscore; values need not be true or false.
        names = {name.replace("avx512", "avx512_").replace("__", "_") for name in words.split()}
        known = dict.fromkeys(names, True) | {"sve2": False, "architecture": "any", "cores": 1}
        functions.get_capabilities = lambda: known
    else:
        file = tmp_path / "cpuinfo"
        key = "Features" if "asimd" in words else "flags\t"
        file.write_bytes(f"model name\t: A\xff\n{key}\t: {words}\n\n".encode("latin-1"))
        monkeypatch.setattr(capabilities, "CPUINFO", file)
    monkeypatch.setattr(torch, "cpu", functions)
    assert capabilities.detect() == WORDS[words]


def test_what_a_level_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "detect", lambda: Capabilities(avx2=True, amx=True))
    assert capabilities.missing(capabilities.LEVELS["avx2"]) == []
    assert capabilities.missing(capabilities.LEVELS["bf16"]) == ["avx512", "bfloat16"]


def test_fingerprints_of_other_and_of_unknown_machines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fingerprint(text: str | None) -> str:
        file = tmp_path / "cpuinfo"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        monkeypatch.setattr(capabilities, "CPUINFO", file)
        return capabilities.fingerprint()

    monkeypatch.setattr(torch, "cpu", SimpleNamespace())
    first = fingerprint("processor : 0\nflags : avx2\ncpu MHz : 1\n")
    assert first == fingerprint("processor : 1\nflags : avx2\ncpu MHz : 2\n")
    assert first != fingerprint("processor : 0\nflags : avx2 avx512f\n")
    assert first != fingerprint("model name : another\nflags : avx2\n")
    monkeypatch.setattr(capabilities.platform, "node", lambda: "one")
    unknown = fingerprint(None)
    monkeypatch.setattr(capabilities.platform, "node", lambda: "two")
    assert unknown != fingerprint(None)
