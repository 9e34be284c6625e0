"""Matrix products of float32: register tiles against float64, and the choice of an engine."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from focalnet_det.ops.cpu import library as native
from focalnet_det.ops.cpu import products
from tests.helpers.compare import relative_error
from tests.helpers.native_blocks import needs_compiler

pytestmark = needs_compiler
# Rows, columns and terms: one tile and parts of tiles, several blocks, sums in parts, odd sides.
SHAPES = [(1, 1, 1), (37, 45, 70), (13, 16, 600), (7, 200, 5000), (400, 33, 1030), (800, 400, 20)]


@pytest.fixture
def choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: object) -> Iterator[Path]:
    """A folder without choices, for kernels that are loaded already."""
    monkeypatch.delenv(products.VARIABLE, raising=False)
    monkeypatch.setenv("FOCALNET_DET_CACHE", str(tmp_path))
    products._chosen.cache_clear()
    yield tmp_path
    products._chosen.cache_clear()


def factors(shape: tuple[int, int, int], a_turned: bool, b_turned: bool) -> tuple[Tensor, Tensor]:
    """Factors (m, k) and (k, n), which are transposed in memory if asked for."""
    torch.manual_seed(0)
    (m, n, k), a, b = shape, None, None
    a = torch.randn(k, m).T if a_turned else torch.randn(m, k)
    b = torch.randn(n, k).T if b_turned else torch.randn(k, n)
    return a, b


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("turned", [(False, True), (False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_equal_float64(
    shape: tuple, turned: tuple[bool, bool], add: bool, library: native.Library
) -> None:
    a, b = factors(shape, *turned)
    before = torch.randn(shape[0], shape[1])
    expected = a.double() @ b.double() + (before.double() if add else 0)
    actual = library.product_(a, b, before.clone(), add=add)
    assert relative_error(actual, expected) <= 2e-6


def test_tiles_read_parts_of_matrices(library: native.Library) -> None:
    a, b = torch.randn(50, 300)[3:40, 7:207], torch.randn(90, 512)[:70, 100:300].T
    out = library.product_(a, b, torch.empty(37, 70))
    assert relative_error(out, a.double() @ b.double()) <= 2e-6


@pytest.mark.parametrize("shape", [(5000, 96, 96), (96, 96, 5000), (30, 400, 300)])
def test_results_do_not_depend_on_threads(shape: tuple, library: native.Library) -> None:
    a, b = factors(shape, shape[2] > 1000, False)
    results = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.append(library.product_(a, b, torch.empty(shape[:2])))
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("engine", products.ENGINES)
def test_every_engine_computes_the_same(
    engine: str, choices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(products.VARIABLE, engine)
    x, weight, gradient = torch.randn(70, 40), torch.randn(30, 40), torch.randn(70, 30)
    bias, out = torch.randn(30), torch.randn(30, 40)
    for actual, expected in (
        (products.linear(x, weight, bias), x.double() @ weight.double().T + bias),
        (products.linear(x, weight), x.double() @ weight.double().T),
        (products.multiply(gradient, weight), gradient.double() @ weight.double()),
        (products.multiply(gradient.T, x), gradient.double().T @ x.double()),
        (
            products.multiply(gradient.T, x, out.clone(), add=True),
            out.double() + gradient.double().T @ x.double(),
        ),
        (products.multiply(x[:0], weight.T), torch.empty(0, 30).double()),
        (products.multiply(gradient[:0].T, x[:0]), torch.zeros(30, 40).double()),
    ):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)
    assert not list(choices.glob("products-*.json")), "a forced engine is not measured"


def test_the_fastest_engine_is_kept_on_disk(choices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(shape: products.Shape, engines: tuple[str, ...]) -> dict[str, float]:
        measured.append(shape)
        # By less than the repeats differ, onednn is no faster than tiles.
        fast = 0.97 if shape.kind == "forward" else 0.5
        return {"tiles": 1.0, "onednn": fast, "mkl": 2.0}

    monkeypatch.setattr(products, "measure", measure)
    for _ in range(2):  # the second time as another process
        assert products.choose_engine("forward", 5000, 96, 96) == "tiles"
        assert products.choose_engine("input", 5000, 96, 96) == "onednn"
        assert products.choose_engine("input", 9000, 90, 70) == "onednn"  # of the same class
        products._chosen.cache_clear()
    assert measured == [products.Shape(kind, 4096, 96, 96) for kind in ("forward", "input")]
    (file,) = choices.glob("products-*.json")
    assert sorted(json.loads(file.read_text()).values()) == ["onednn", "tiles"]


def test_a_damaged_file_is_measured_again(choices: Path) -> None:
    first = products.choose_engine("weight", 300, 24, 24)
    (file,) = choices.glob("products-*.json")
    key = "weight 4096 24 24"
    assert json.loads(file.read_text()) == {key: first}
    for content in ("{", "[]", json.dumps({key: "abacus"})):
        file.write_text(content)
        products._chosen.cache_clear()
        assert products.choose_engine("weight", 300, 24, 24) in products.ENGINES
        assert json.loads(file.read_text())[key] in products.ENGINES


def test_nothing_is_measured_where_nothing_can_be_kept(
    choices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setenv("FOCALNET_DET_CACHE", str(choices / "missing"))
    assert products.choose_engine("forward", 5000, 96, 96) == "tiles"


def test_the_environment_forces_an_engine(choices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.VARIABLE, "onednn")
    assert products.choose_engine("forward", 50, 96, 96) == "onednn"
    engines = products.native_engines(50, 96, 96)  # kernels in C++ cannot call it
    assert (engines.forward, engines.input, engines.weight) == (0, 0, 0)
    monkeypatch.setenv(products.VARIABLE, "mkl")
    assert products.native_engines(50, 96, 96).forward == products.NATIVE_ENGINES["mkl"]
    monkeypatch.setenv(products.VARIABLE, "abacus")
    with pytest.raises(ValueError, match="FOCALNET_DET_PRODUCTS=abacus: must be one of tiles"):
        products.choose_engine("forward", 50, 96, 96)
