"""Every form of noise against a slow computation; gradients, compiled code, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise, product

import pytest
import torch

from twodice.errors import ConfigError, ContractError, ShapeError
from twodice.kernels import dispatch
from twodice.kernels import dropout as bernoulli
from twodice.kernels import noise as kernel
from twodice.kernels.dropout import dropout
from twodice.kernels.noise import Noise, kept, noisy
from twodice.random.draws import threshold
from twodice.random.keys import Key
from twodice.random.philox import philox4x32

KEY = Key(7).child("test")
SHAPES = {
    "btc": (2, 3, 9),
    "tbc": (3, 2, 9),
    "bc": (2, 9),
    "bhts": (2, 2, 3, 9),
    "bct": (2, 9, 3),
    "bchw": (2, 9, 2, 3),
}
BERNOULLI = ["unit", "feature", "block(4)", "feature+block(3)"]
TEXTS = [*BERNOULLI, "gaussian", "feature+gaussian", "block(4)+gaussian"]
LEVELS = dispatch.native.simd_levels() if dispatch.native is not None else []
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    level, threads = dispatch.native and dispatch.native.simd(), torch.get_num_threads()
    yield
    if level:
        dispatch.native.set_simd(level)
    torch.set_num_threads(threads)


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> object:
    """`noisy` by the readable twins."""

    def call(*args: object, **options: object) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "_native", None)
            patch.setattr(bernoulli, "_native", None)
            patch.setattr(dispatch, "say_once_when_slow", lambda: None)
            return noisy(*args, **options)  # type: ignore[arg-type]

    return call


def ramp(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.linspace(-1, 2, math.prod(shape), dtype=torch.float64).reshape(shape).to(dtype)


def slow_lane(key: int, step: int, example: int, position: int, head: int, column: int) -> int:
    words = philox4x32(head << 20 | column // 8, position, example, step, key)
    return [half for word in words for half in (word & 0xFFFF, word >> 16)][column % 8]


def slow_normal(key: int, step: int, example: int, position: int, head: int, column: int) -> float:
    words = philox4x32(head << 20 | column // 4, position, example, step, key)
    length, around = words[column % 4 // 2 * 2 : column % 4 // 2 * 2 + 2]
    radius = math.sqrt(-2 * math.log((length + 0.5) / 2**32))
    low = around % 2**30
    angle = (around // 2**30) * math.pi / 2 + (low + 0.5 - 2**29) * math.pi / 2**31
    return radius * (math.sin(angle) if column % 2 else math.cos(angle))


def slow(
    shape: tuple[int, ...], layout: str, t: int, noise: Noise, steps: list[int], example: list[int]
) -> torch.Tensor:
    """The multipliers of a tensor, unit by unit."""
    m = torch.empty(shape, dtype=torch.float64)
    bits = KEY.child("gaussian").seed if noise.form == "gaussian" else KEY.seed
    for index in product(*map(range, shape)):
        at = dict(zip(layout, index, strict=True))
        position = at["h"] * shape[3] + at["w"] if layout == "bchw" else at.get("t", 0)
        head = at["h"] if layout == "bhts" else 0
        column = at["s"] if layout == "bhts" else at["c"]
        where = (
            bits,
            steps[at["b"]],
            example[at["b"]],
            0 if noise.locked else position,
            head,
            column // noise.block,
        )
        if noise.form == "gaussian":
            m[index] = 1 + math.sqrt(t / (65536 - t)) * slow_normal(*where)
        else:
            m[index] = 65536 / (65536 - t) if slow_lane(*where) >= t else 0.0
    return m


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("layout", SHAPES)
def test_every_noise_in_every_layout_is_the_slow_computation(layout: str, text: str) -> None:
    noise, shape, examples = Noise.parse(text), SHAPES[layout], torch.tensor([5, 3])
    for steps in (17, torch.tensor([17, 17]), torch.tensor([4, 2**32 - 1])):
        y = noisy(
            torch.ones(shape, dtype=torch.float64), 20000, KEY, steps,
            noise=noise, examples=examples, layout=layout,
        )  # fmt: skip
        each = [steps, steps] if isinstance(steps, int) else steps.tolist()
        m = slow(shape, layout, 20000, noise, each, [5, 3])
        assert torch.equal(y == 0, m == 0)
        assert torch.allclose(y, m, rtol=0, atol=0 if noise.form == "bernoulli" else 1e-13)
        if noise.form == "bernoulli":
            assert torch.equal(
                kept(20000, KEY, steps, shape, noise=noise, examples=examples, layout=layout), m != 0
            )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_native_is_the_readable_twin_bit_for_bit(level: str, dtype: torch.dtype, twin: object) -> None:
    dispatch.native.set_simd(level)
    wide = {
        "btc": (2, 3, 2300),
        "bc": (5, 131),
        "bhts": (2, 3, 2, 70),
        "bct": (2, 70, 5),
        "bchw": (2, 33, 3, 4),
    }
    for layout, shape in wide.items():
        x = ramp(shape, dtype)
        for text in (*TEXTS, "block(100000)+gaussian"):
            for step in (3, torch.arange(shape[0])):
                for t in (0, 6554, 65535):
                    args = (x, t, KEY, step)
                    options = {"noise": Noise.parse(text), "layout": layout}
                    ours, reference = noisy(*args, **options), twin(*args, **options)  # type: ignore[operator]
                    assert torch.equal(ours, reference), (layout, text, t)


@pytest.mark.parametrize("text", ["gaussian", "block(3)", "feature+gaussian", "block(3)+gaussian"])
def test_native_is_the_twin_for_given_coordinates_and_any_stride(text: str, twin: object) -> None:
    noise, big = Noise.parse(text), ramp((4, 6, 40), torch.float32)
    packed, places = torch.arange(24).reshape(4, 6) * 285_212_671 % 2**32, torch.arange(5, 11)[None]
    for x in (big, big[:, :, ::3], big.transpose(0, 2).contiguous().transpose(0, 2), big.expand(4, 6, 40)):
        for examples, positions in ((None, places), (packed, packed.flip(0)), (packed[:, 0], None)):
            args, options = (x, 9999, KEY, 5), {"noise": noise, "examples": examples, "positions": positions}
            assert torch.equal(noisy(*args, **options), twin(*args, **options))  # type: ignore[operator]
    weights, keys = ramp((2, 3, 4, 5)), torch.tensor([[900, 3, 4, 5, 2**22 - 1], [0, 1, 2, 3, 4]])
    first, rows = torch.tensor([[900], [2**22 - 5]]), torch.tensor([5, 9])
    for step in (5, rows):
        for columns in (keys, keys[:1], first, first[:1]):
            args, options = (weights, 9999, KEY, step), {"noise": noise, "layout": "bhts"}
            ours = noisy(*args, key_positions=columns, **options)
            assert torch.equal(ours, twin(*args, key_positions=columns, **options))  # type: ignore[operator]
            if columns.shape[1] == 1:
                every = columns + torch.arange(5)
                assert torch.equal(ours, noisy(*args, key_positions=every, **options))
    image = ramp((2, 8, 6, 10))
    for x in (image.to(memory_format=torch.channels_last), image[:, :, ::2, ::3], image.transpose(2, 3)):
        args, options = (x, 9999, KEY, 5), {"noise": noise, "layout": "bchw"}
        assert torch.equal(noisy(*args, **options), twin(*args, **options))  # type: ignore[operator]
    flat = ramp((24, 7))
    args = (flat, 9999, KEY, 5)
    options = {"noise": noise, "layout": "nc", "examples": packed, "positions": packed.flip(0)}
    assert torch.equal(noisy(*args, **options), twin(*args, **options))  # type: ignore[operator]


def test_threads_change_no_bit() -> None:
    x = ramp((3, 40, 700), torch.float32)
    torch.set_num_threads(1)
    one = noisy(x, 6554, KEY, 3, noise=Noise("gaussian"))
    torch.set_num_threads(5)
    assert torch.equal(noisy(x, 6554, KEY, 3, noise=Noise("gaussian")), one)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("layout", ["btc", "bchw", "bhts"])
def test_gradcheck_at_a_fixed_key(layout: str, text: str) -> None:
    x = ramp(SHAPES[layout]).requires_grad_()
    for step in (3, torch.tensor([3, 8])):
        assert torch.autograd.gradcheck(
            lambda x: noisy(x, 20000, 7, step, noise=Noise.parse(text), layout=layout),  # noqa: B023
            (x,),
        )


def test_nothing_of_the_size_of_the_input_is_kept() -> None:
    x = torch.ones(2, 4, 32, requires_grad=True)
    for text in TEXTS:
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            noisy(x, 6554, 7, 3, noise=Noise.parse(text), examples=torch.tensor([5, 6]))
        assert sum(t.numel() for t in saved) <= 2
        saved.clear()
        first = torch.tensor([[7], [39]])  # columns that count on from the first are not kept one by one
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            noisy(x[:, None], 6554, 7, 3, noise=Noise.parse(text), key_positions=first, layout="bhts")
        assert sum(t.numel() for t in saved) <= 2


def test_steps_and_thresholds_changed_before_the_backward_pass_do_no_harm() -> None:
    x = torch.ones(2, 4, 32, requires_grad=True)
    steps, t = torch.tensor([3, 9]), torch.tensor(20000)
    for text in TEXTS:
        y = noisy(x, t, 7, steps, noise=Noise.parse(text))
        steps += 1
        t += 1
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad, y)


def test_a_step_for_each_row_is_each_row_at_its_step() -> None:
    x, steps = ramp((4, 3, 40), torch.float32), torch.tensor([9, 9, 2, 9])
    for text in TEXTS:
        noise = Noise.parse(text)
        each = [
            noisy(x[i : i + 1], 20000, KEY, int(n), noise=noise, examples=torch.tensor([i]))
            for i, n in enumerate(steps)
        ]
        assert torch.equal(noisy(x, 20000, KEY, steps, noise=noise), torch.cat(each))
    assert torch.equal(
        noisy(x, 20000, KEY, torch.tensor([3, 3, 3, 3])), dropout(x, 20000, KEY, 3)
    )  # the same numbers as one step


@pytest.mark.parametrize("text", BERNOULLI)
def test_bernoulli_noise_is_nested_in_the_rate(text: str) -> None:
    noise = Noise.parse(text)
    masks = [kept(threshold(p), KEY, 3, (4, 8, 64), noise=noise) for p in (0.0, 0.1, 0.2, 0.5, 0.9, 1.0)]
    assert all(bool((~wide | narrow).all()) for narrow, wide in pairwise(masks))
    assert masks[0].all() and not masks[-1].any()


def test_a_rate_of_zero_is_neutral_and_infinity_is_dropped_by_selection() -> None:
    x = torch.tensor([[[1.5, -0.0, math.inf, 3.0]]])
    for text in TEXTS:
        assert torch.equal(noisy(x, 0, KEY, 3, noise=Noise.parse(text)), x)
    wild = torch.full((2, 3, 64), math.nan)
    y = noisy(wild, 32768, KEY, 3, noise=Noise(block=4))
    mask = kept(32768, KEY, 3, (2, 3, 64), noise=Noise(block=4))
    assert torch.equal(y.isnan(), mask) and not y[~mask].any()


def test_compiled_code_has_the_bits_of_eager_in_one_graph() -> None:
    torch._dynamo.reset()
    graphs = 0

    def counting(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    def layer(x: torch.Tensor, t: torch.Tensor, step: torch.Tensor, examples: torch.Tensor) -> torch.Tensor:
        for text in TEXTS:
            x = noisy(x * 1.0, t, Key(2**63 + 7), step, noise=Noise.parse(text), examples=examples)
        return x

    run = torch.compile(layer, backend=counting, fullgraph=True)
    examples = torch.tensor([5, 9])
    for number in range(20):
        t, step = torch.tensor(threshold(number / 40)), torch.tensor([number, number + 1])
        x = ramp((2, 3, 40), torch.float32).requires_grad_()
        ours, plain = run(x, t, step, examples), layer(x, t, step, examples)
        assert torch.equal(ours, plain)
        assert torch.equal(torch.autograd.grad(ours.sum(), x)[0], torch.autograd.grad(plain.sum(), x)[0])
    assert graphs == 1


def test_the_registered_operation_passes_torchs_own_checks() -> None:
    x, one = ramp((2, 3, 4)).requires_grad_(), torch.tensor(1)
    torch.library.opcheck(
        torch.ops.twodice.noisy.default,
        (x, one * 20000, one * 7, one * 3, None, None, None, "btc", "gaussian", True, 2),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


GAUSSIAN, LOCKED = Noise("gaussian"), Noise("gaussian", locked=True)


@pytest.mark.parametrize(
    ("t", "step", "options", "message"),
    [
        (65536, 1, {"noise": GAUSSIAN}, "must be below 1"),
        (-1, 1, {"noise": GAUSSIAN}, "threshold must be in"),
        (1, 2**32, {"noise": GAUSSIAN}, "step must be in"),
        (1, torch.tensor([0, 2**32]), {}, "step must be in"),
        (1, torch.arange(3), {}, "one for each of the 2 rows"),
        (1, torch.zeros(2, 3).long(), {}, r"or \(B,\)"),
        (1, 1, {"noise": Noise(locked=True), "positions": torch.full((1, 3), -1)}, "position must be in"),
        (
            1,
            1,
            {"noise": LOCKED, "positions": torch.full((1, 3), -1)},
            "position must be in",
        ),
        (1, 1, {"noise": GAUSSIAN, "examples": torch.tensor([0, 2**32])}, "example must be in"),
        (1, 1, {"noise": Noise(block=2), "examples": torch.arange(3)}, "examples must be"),
        (1, 1, {"noise": GAUSSIAN, "layout": "btd"}, "did you mean 'btc'"),
        (1, 1, {"noise": GAUSSIAN, "layout": "bc"}, "needs 2 dimensions"),
    ],
)
def test_what_does_not_fit_is_named(t: int, step: object, options: dict, message: str) -> None:
    with pytest.raises((ConfigError, ShapeError), match=message):
        noisy(torch.ones(2, 3, 4), t, KEY, step, **options)  # type: ignore[arg-type]


def test_types_masks_and_columns_that_are_not_served_are_named() -> None:
    with pytest.raises(ShapeError, match="int32"):
        noisy(torch.ones(2, 3, 4, dtype=torch.int32), 1, 1, 1, noise=GAUSSIAN)
    with pytest.raises(ConfigError, match="has no mask"):
        kept(1, 1, 1, (2, 3, 4), noise=GAUSSIAN)
    with pytest.raises(ConfigError, match="column of gaussian"):
        keys = torch.tensor([[2**22]])
        noisy(torch.ones(1, 1, 1, 1), 1, 1, 1, noise=GAUSSIAN, layout="bhts", key_positions=keys)


@pytest.mark.parametrize("text", TEXTS)
def test_gradients_of_any_order_and_forward_mode_are_the_same_noise(text: str) -> None:
    noise = Noise.parse(text)
    x = ramp((2, 3, 9)).requires_grad_()
    m = noisy(torch.ones(2, 3, 9, dtype=torch.float64), 20000, 7, 3, noise=noise)
    assert torch.autograd.gradgradcheck(lambda x: noisy(x, 20000, 7, 3, noise=noise) ** 2, (x,))
    (found, tangent) = torch.func.jvp(
        lambda x: noisy(x, 20000, 7, 3, noise=noise), (x.detach(),), (torch.ones_like(x),)
    )
    assert torch.equal(tangent, m) and torch.equal(found, noisy(x.detach(), 20000, 7, 3, noise=noise))


def test_vmap_is_refused_where_all_elements_would_get_one_mask() -> None:
    with pytest.raises(ContractError, match="vmap"):
        torch.vmap(lambda x: noisy(x, 20000, 7, 3, noise=Noise(block=2)))(torch.ones(4, 2, 3, 8))


def test_nothing_is_fine() -> None:
    for shape, text in product(((0, 3, 4), (2, 0, 4), (2, 3, 0)), TEXTS):
        noise = Noise.parse(text)
        assert noisy(torch.ones(shape), 6554, 1, 1, noise=noise).shape == shape
        assert noisy(torch.ones(shape), 65536 * (noise.form == "bernoulli"), 1, 1, noise=noise).shape == shape
