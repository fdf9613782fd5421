"""kernels/layer/linear.py against torch.nn.functional."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from suite import DEVICE, DTYPES, relayout
from torch import Tensor

from fastfusion.kernels.layer import linear as linear_module
from fastfusion.kernels.layer.linear import TILES, Product, linear, linears, project_heads

# rows, in_features, out_features
SIZES = [(0, 97, 6), (1, 1000, 97), (3, 77, 160), (17, 160, 77), (130, 97, 97), (130, 6, 1)]
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
}


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE, dtype)


def product(
    rows: int, inner: int, features: int, dtype: torch.dtype = torch.float32, full: bool = True
) -> Product:
    weight = (values(features, inner, seed=1) * inner**-0.5).to(dtype)
    if not full:
        return Product(values(rows, inner, dtype=dtype), weight)
    return Product(
        values(rows, inner, dtype=dtype), weight, values(features, dtype=dtype, seed=2),
        values(rows, features, dtype=dtype, seed=3),
    )  # fmt: skip


def formula(given: Product, activation: str | None) -> Tensor:
    out = ACTIVATIONS[activation](F.linear(given.x, given.weight, given.bias))
    return out if given.residual is None else out + given.residual


def double(given: Product) -> Product:
    return Product(*(None if t is None else t.double() for t in given))  # type: ignore[arg-type]


def assert_like_torch(given: Product, actual: Tensor, activation: str | None = None) -> None:
    exact, plain = formula(double(given), activation), formula(given, activation)
    assert actual.dtype == plain.dtype and actual.shape == plain.shape
    # A row of one number, or one that relu makes all but zero, has an error of luck.
    assert_accurate(*(t.reshape(1, -1) if t.shape[-1] < 16 else t.reshape(-1, t.shape[-1])
                      for t in (actual, exact, plain)))  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("full", [True, False], ids=["full", "bare"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, inner, features", SIZES)
def test_accuracy(
    rows: int, inner: int, features: int, dtype: torch.dtype, full: bool, activation: str | None
) -> None:
    given = product(rows, inner, features, dtype, full)
    x, weight, bias, residual = given
    actual = linear(x, weight, bias, activation=activation, residual=residual)
    assert_like_torch(given, actual, activation)


@pytest.mark.parametrize("tile", TILES[2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles(tile: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile, aligned and with more than one of it in each direction where that is quick."""
    monkeypatch.setattr(linear_module, "_tile", lambda *_: TILES[dtype.itemsize][tile])
    given = product(70 if tile != "many" else 130, 160, 144, dtype)
    assert_like_torch(given, linears((given,))[0])


def test_which_tile() -> None:
    def chosen(*sizes: tuple[int, int, int], aligned: bool = True) -> Any:
        tile = linear_module._tile(2, list(sizes), aligned)
        return next(name for name, other in TILES[2].items() if other == tile)

    assert chosen((16, 768, 768)) == "single"
    assert chosen((16, 768, 768), (36, 768, 768)) == "few"
    assert chosen((640, 768, 768)) == "some"
    assert chosen((8192, 768, 768)) == "many"
    assert chosen((8192, 768, 97), aligned=False) == "unaligned"


def test_many_row_tiles_in_groups() -> None:
    """More row tiles than share a pass over the features, and a last group that is not full."""
    given = product(64 * 9 + 1, 16, 130)
    assert_like_torch(given, linears((given,))[0])


@pytest.mark.parametrize("layout", ["transposed", "offset", "reversed_last", "expanded"])
def test_any_strides(layout: str) -> None:
    given = product(6, 33, 20)
    views: list[Tensor] = []
    for tensor in (given.x, given.residual):
        assert tensor is not None
        tensor = tensor.view(2, 3, -1)
        expanded = tensor[:, :1].expand(tensor.shape)
        views.append(expanded if layout == "expanded" else relayout(tensor, layout))
    weight = relayout(given.weight, "offset" if layout == "transposed" else layout)
    given = Product(
        views[0], weight if layout != "expanded" else given.weight, given.bias, views[1]
    )
    assert_like_torch(given, linears((given,))[0])


def test_no_memory_is_left_unwritten() -> None:
    given = product(5, 33, 70)
    expected = linears((given,))[0]
    torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN
    try:
        actual = linears((given,))[0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(actual, expected)


def test_a_row_alone_has_the_same_bits() -> None:
    x, weight, bias, residual = product(48, 64, 96, torch.bfloat16)
    together = linear(x, weight, bias, activation="gelu", residual=residual)
    # numpy, which multiplies in the interpreter, adds up in another order for another tile.
    counts = (1, 17, 48, 200) if DEVICE == "cuda" else (17, 40)
    for count in counts:
        assert residual is not None
        rows, added = x.repeat(5, 1)[8 : 8 + count], residual.repeat(5, 1)[8 : 8 + count]
        some = linear(rows, weight, bias, activation="gelu", residual=added)
        assert torch.equal(some, together.repeat(5, 1)[8 : 8 + count])


def test_not_a_number_stays_in_its_row() -> None:
    for activation in ACTIVATIONS:
        x, weight, *_ = product(70, 40, 33)
        x[4, 7] = torch.nan
        expected = [row == 4 for row in range(70)]
        out = linear(x, weight, activation=activation)
        assert out.isnan().all(-1).tolist() == out.isnan().any(-1).tolist() == expected


def test_long_sums_of_one_sign() -> None:
    """A chain of 4,096 float32 additions would lose three digits more than blocks of them."""
    x, weight = values(3, 4096).abs(), values(20, 4096, seed=1).abs()
    assert_like_torch(Product(x, weight), linear(x, weight))


def test_two_products_in_one_launch() -> None:
    def both(*given: Product) -> None:
        for one, out in zip(given, linears(given, "relu"), strict=True):
            assert_like_torch(one, out, "relu")

    both(product(3, 77, 160), product(20, 160, 33))
    both(product(0, 77, 160), product(20, 160, 33))
    both(product(20, 160, 33), product(0, 77, 160))
    both(product(0, 77, 160), product(0, 160, 33))
    both(product(3, 77, 160, full=False), product(20, 160, 33))


def test_projection_to_heads() -> None:
    """Each part is a view of one product: nothing is copied, a row's elements are side by side."""
    first = Product(values(2, 5, 33), values(2 * 3 * 8, 33, seed=1), values(2 * 3 * 8, seed=2))
    second = Product(values(2, 7, 20), values(3 * 8, 20, seed=3), values(3 * 8, seed=4))
    (scored, value), (key,) = project_heads((first, second), (2, 1), 3)
    expected = linear(*first[:3]).view(2, 5, 2, 3, 8)
    assert torch.equal(scored, expected[:, :, 0].transpose(1, 2))
    assert torch.equal(value, expected[:, :, 1].transpose(1, 2))
    assert key.shape == (2, 3, 7, 8) and scored.stride(-1) == key.stride(-1) == 1
    assert scored.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    assert_like_torch(second, key.transpose(1, 2).flatten(2))


def test_errors() -> None:
    x, weight, bias, residual = product(2, 8, 4)
    with pytest.raises(ValueError, match=r"do not fit: \[\(2, 7\), \(4, 8\)"):
        linear(x[:, :7], weight)
    with pytest.raises(ValueError, match="do not fit"):
        linear(x, weight, bias, residual=x)
    with pytest.raises(TypeError, match="torch.bfloat16"):
        linear(x, weight.bfloat16())
    with pytest.raises(TypeError, match="torch.float64"):
        linear(x.double(), weight.double())
    with pytest.raises(ValueError, match="activation must be one of"):
        linear(x, weight, activation="silu")
