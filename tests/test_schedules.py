"""Minimax coefficients: published tables, equioscillation, convergence everywhere."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_kernels import minimax_coefficients
from shampoo_kernels.ops import iterations, roots
from shampoo_kernels.schedules import DEGREES, in_squares, schedule_error

# (p, degree, floor): (steps, eps of those steps, coefficients as printed), from a Remez exchange on
# a grid of 40,000 points, so that the printed digits are good to about 1e-7 relative.
TABLES = {
    (2, 2, 1e-3): (4, 1.9e-5, """
        7.30891105 -20.5327715 14.9933812 2.87765648 -2.15103323 0.472012049
        2.02927681 -1.41245207 0.391580433 1.87602953 -1.25114344 0.375114363"""),
    (2, 2, 1e-4): (5, 1.2e-6, """
        8.09336854 -23.6204304 17.4461518 3.63658555 -2.72192675 0.536546288
        2.66129998 -1.97715452 0.452616407 1.95617164 -1.33750775 0.383852701
        1.87516556 -1.25018395 0.375018395"""),
    (2, 2, 1e-6): (6, 9.2e-4, """
        8.47032881 -25.1080747 18.6292756 4.1828342 -3.10870114 0.580606687
        3.96185728 -2.95406375 0.562976119 3.28658622 -2.46472014 0.507357697
        2.27374999 -1.64466036 0.416190927 1.8887162 -1.26515722 0.376518925"""),
    (2, 1, 1e-4): (7, 2.55e-4, """
        5.03983928 -4.98944588 2.46716105 -0.632321228 2.29680102 -0.609725605
        2.00196109 -0.569975138 1.6801229 -0.525491062 1.52149311 -0.503066873
        1.50029791 -0.500042558"""),
    (4, 2, 1e-3): (4, 4e-8, """
        3.26936729 -8.08398259 6.2346669 1.59190209 -0.60229043 0.0993500441
        1.41931377 -0.569116318 0.150530698 1.40625785 -0.562504279 0.156246434"""),
    (4, 2, 1e-4): (4, 2.3e-4, """
        3.85003183 -10.8538603 8.61893381 1.80992106 -0.587777731 0.0647852106
        1.50393967 -0.594515591 0.121161496 1.40862331 -0.563776924 0.155178766"""),
    (4, 2, 1e-6): (6, 1.5e-8, """
        4.54746455 -14.2209197 11.5296522 2.18520699 -0.537577196 0.0362224482
        1.90748166 -0.575101351 0.0547181804 1.57613251 -0.601797725 0.102802811
        1.41660329 -0.567823616 0.151682873 1.40625396 -0.562502159 0.156248201"""),
    (4, 1, 1e-4): (6, 2.3e-4, """
        3.08042592 -2.77241106 1.58790006 -0.158509045 1.45377298 -0.189217472
        1.32586332 -0.225599205 1.26012444 -0.24663993 1.25017229 -0.249942574"""),
    (4, 1, 1e-6): (8, 1.1e-4, """
        3.50305582 -3.39227957 1.7592021 -0.129999026 1.68271566 -0.141375589
        1.57212598 -0.161716087 1.43613921 -0.193836166 1.31322316 -0.229533874
        1.25697959 -0.247680452 1.25008167 -0.249972778"""),
    (1, 1, 1e-3): (7, 6.1e-4, """
        7.96023066 -7.95227838 3.93762286 -1.96881143 3.76859184 -1.88429592
        3.28401638 -1.64200819 2.51916853 -1.25958427 2.06973345 -1.03486673
        2.00121643 -1.00060821"""),
}  # fmt: skip


def apply(steps, s, p):
    """s after the schedule; every step s <- s*h(s^p), in the dtype of s."""
    for step in steps:
        M, h = s**p, torch.zeros_like(s)
        for c in reversed(step):
            h = h * M + c
        s = s * h
    return s


@pytest.mark.parametrize(("p", "degree", "floor"), TABLES)
def test_tables(p, degree, floor):
    count, eps, printed = TABLES[p, degree, floor]
    steps = minimax_coefficients(floor, p, degree)[:count]
    flat = list(itertools.chain(*steps))
    assert flat == pytest.approx([float(x) for x in printed.split()], rel=3e-7, abs=2e-9)
    assert schedule_error(steps, floor, p) == pytest.approx(eps, rel=0.1)


@pytest.mark.parametrize(
    ("p", "degree", "floor", "steps"), [
        (2, 2, 1e-4, 5), (2, 2, 1e-6, 7), (2, 1, 1e-4, 8), (2, 1, 1e-6, 10),
        (4, 2, 1e-4, 5), (4, 2, 1e-6, 6), (4, 1, 1e-4, 7), (4, 1, 1e-6, 9)]
)  # fmt: skip
def test_default_length(p, degree, floor, steps):
    """The M-form's product counts (17 and 25 for p=2, degree 2) rest on these lengths."""
    assert len(minimax_coefficients(floor, p, degree)) == steps


def test_published_sets():
    """CANS (arXiv 2506.10935) and the first step of OKLS, whose λ-ratio is 7.225e-7."""
    cans = minimax_coefficients(1e-6, 2, 2)
    assert cans[0] == pytest.approx((8.4703, -25.1081, 18.6293), abs=5e-5)
    assert cans[1] == pytest.approx((4.1828, -3.1087, 0.5806), abs=5e-5)
    okls = minimax_coefficients(7.225e-7, 2, 1)
    assert okls[0] == pytest.approx((5.1825036, -5.1780985), abs=5e-8)
    assert okls[-1] == pytest.approx((1.5, -0.5), abs=1e-9)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("degree", DEGREES)
def test_limit_is_the_binomial_step(p, degree):
    """The last step of a long schedule expands sum_i b_i (1-M)^i with b_i of (1-y)^(-1/p)."""
    step = minimax_coefficients(1e-4, p, degree, tolerance=1e-14)[-1]
    for y in (0.0, 0.3, 1.0, 2.0):
        expansion = b = 1.0
        for i in range(1, degree + 1):
            b *= (1 / p + i - 1) / i
            expansion += b * y**i
        assert sum(c * (1 - y) ** i for i, c in enumerate(step)) == pytest.approx(expansion)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_degrees_in_turn(p):
    """Each step has its own degree, the last one all that follow, and is the best of its interval:
    as good as where it comes first."""
    steps = minimax_coefficients(1e-4, p, (1, 2, 4), cushion=0.1)
    assert [len(step) - 1 for step in steps] == [1, 2] + [4] * (len(steps) - 2)
    assert steps == minimax_coefficients(1e-4, p, [1, 2, 4, 4], cushion=0.1)
    assert steps[:1] == minimax_coefficients(1e-4, p, 1, cushion=0.1)[:1]
    assert schedule_error(steps, 1e-4, p) <= 1e-5


@pytest.mark.parametrize("degree", DEGREES)
def test_in_squares_is_the_same_polynomial(degree):
    """To the rounding of c Q² against what remains of it where h is small."""
    for step in minimax_coefficients(1e-6, 2, degree, cushion=0.05):
        a, b, *rest = in_squares(step)
        for M in (0.0, 1e-3, 0.1, 0.5, 1.0, 1.5):
            c, s, t = (*rest, 0.0, 0.0, 0.0)[:3]
            Q = t + s * M + M * M if s else M
            expected = sum(coefficient * M**i for i, coefficient in enumerate(step))
            assert a + b * M + c * Q * Q == pytest.approx(expected, rel=1e-11, abs=1e-11)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("p", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("floor", [1e-2, 2e-4, 1e-6])
def test_the_schedule_counts_what_the_m_form_multiplies(p, floor):
    steps = roots.schedule("newton", floor, p, torch.float32)
    A = torch.eye(3, dtype=torch.float64).expand(2, 3, 3) * 0.3
    with Products() as products:
        X, residual = iterations.newton(A, p, steps)
    assert products.count == roots.products(steps, p)
    assert residual.max() < roots.RESIDUAL_LIMIT
    assert (X.diagonal(dim1=-2, dim2=-1) - 0.3 ** (-1 / p)).abs().max() < 3e-7 * 0.3 ** (-1 / p)


@pytest.mark.parametrize(
    ("p", "floor", "count", "by_degree_2"),
    [(2, 3e-4, 15, 17), (2, 2e-4, 16, 17), (2, 1e-4, 16, 17), (2, 1e-6, 23, 25), (4, 2e-4, 18, 21),
     (4, 1e-6, 24, 26)],
)  # fmt: skip
def test_steps_of_degree_4_save_products(p, floor, count, by_degree_2):
    """Although theirs end closer to the root, and with a cushion."""
    assert roots.products(roots.schedule("newton", floor, p, torch.float32), p) == count
    assert roots.products(minimax_coefficients(floor, p, 2), p) == by_degree_2


def test_a_higher_degree_needs_no_more_steps():
    for p, k in itertools.product((1, 2, 4, 64), range(1, 9)):
        lengths = [len(minimax_coefficients(10.0**-k, p, degree)) for degree in DEGREES]
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 16, 64])
@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("floor", [1e-2, 1e-4, 1e-6, 1e-8])
def test_equioscillation(p, degree, floor):
    """Each step's error alternates degree + 2 times at equal height: no other step does better."""
    low, high = floor ** (1 / p), 1.0
    for step in minimax_coefficients(floor, p, degree):
        eps = max(high - 1, 1 - low)
        if eps < 1e-4:  # below, the height (about eps^2 or eps^3) drowns in the grid's rounding
            break
        grid = torch.cat([
            torch.logspace(math.log10(low), math.log10(high), 4001, dtype=torch.float64),
            torch.linspace(low, high, 4001, dtype=torch.float64),
        ]).clamp(low, high).sort().values  # fmt: skip
        error = apply([step], grid, p) - 1
        height = error.abs().max().item()
        alternations = [error[0].sign().item()] if error[0].abs() > 0.999 * height else []
        for value in error[error.abs() > 0.999 * height].tolist():
            if not alternations or math.copysign(1, value) != alternations[-1]:
                alternations.append(math.copysign(1, value))
        assert len(alternations) == degree + 2, (step, low, high)
        low, high = 1 - height, 1 + height
        if height < (1e-2 if degree == 4 else 1e-9 if degree == 2 else 0):  # binomial from here on
            break


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("tolerance", [1e-5, 1e-14])
def test_converges_for_every_root_and_floor(degree, tolerance):
    """The composed error is at most the tolerance plus the rounding of s^p on [floor, 1].

    An error u in s is an error of p*u in s^p and O(u) in s after the step, since h ~ M^(-1/p).
    """
    u = torch.finfo(torch.float64).eps
    for p, floor in itertools.product(range(1, 65), (1e-2, 1e-4, 1e-6, 1e-8)):
        steps = minimax_coefficients(floor, p, degree, tolerance=tolerance)
        grid = torch.logspace(math.log10(floor), 0, 2001, dtype=torch.float64)
        s = apply(steps, (grid ** (1 / p)), p)
        assert (s - 1).abs().max() <= tolerance + 20 * u, (p, floor)
        assert schedule_error(steps, floor, p) <= tolerance


@pytest.mark.parametrize("floor", [1e-12, 1e-24])
def test_tiny_floors(floor):
    """Floors that a polar factor wants; the first steps cancel in s^p near 1, hence the slack."""
    steps = minimax_coefficients(floor, 2, 2, tolerance=1e-14)
    s = torch.logspace(math.log10(floor) / 2, 0, 4001, dtype=torch.float64)
    assert (apply(steps, s, 2) - 1).abs().max() < 1e-13
    assert len(steps) <= (13 if floor == 1e-12 else 22)


@settings(max_examples=100, deadline=None)
@given(
    p=st.integers(1, 64),
    degree=st.sampled_from(DEGREES),
    exponent=st.floats(-8, -2),
    below=st.floats(1e-30, 1),
)
def test_outside_of_the_design_interval(p, degree, exponent, below):
    """Below the floor: monotone saturation. Above 1: harmless up to a tenth of the floor."""
    floor = 10**exponent
    steps = minimax_coefficients(floor, p, degree)
    cap = math.prod(step[0] for step in steps)
    s = torch.tensor([below * floor, floor, 1 + 0.1 * floor], dtype=torch.float64) ** (1 / p)
    under, at_floor, over = apply(steps, s, p)
    assert 0 < under <= (1 + 1e-12) * at_floor + 1e-5
    assert under <= cap * s[0] * (1 + 1e-12)
    assert abs(over - 1) < 0.05


def test_cushion_keeps_what_is_near_one_away_from_zero():
    """Without it, some s in [0.1, 1] is thrown down to about the floor and has to climb again."""
    start = torch.linspace(0.1, 1, 2001, dtype=torch.float64)
    least, lengths = [], []
    for cushion in (0.0, 0.1):
        steps = minimax_coefficients(1e-8, 2, 2, cushion=cushion)
        paths = [apply(steps[:k], start, 2) for k in range(len(steps) + 1)]
        least.append(torch.stack(paths).min().item())
        lengths.append(len(steps))
        assert schedule_error(steps, 1e-8, 2) <= 1e-5
    assert least[0] < 2e-3
    assert least[1] > 0.09
    assert lengths[1] <= lengths[0] + 1


@pytest.mark.parametrize("cushion", [0.0, 0.01, 0.1])
@pytest.mark.parametrize(("p", "degree"), [(2, 2), (2, 1), (4, 2), (1, 2), (2, 4)])
def test_headroom_survives_rounding(p, degree, cushion):
    """A relative error of 1e-6 upwards in every step, as in float32, stays bounded."""
    floor = 1e-6**p
    ends = []
    for headroom in (0.0, 0.01):
        steps = minimax_coefficients(floor, p, degree, cushion=cushion, headroom=headroom)
        assert schedule_error(steps, floor, p) <= 1e-5
        s = torch.logspace(-6, 0, 2001, dtype=torch.float64)
        for step in steps:
            s = apply([step], s, p) * (1 + 1e-6)
        ends.append((s - 1).abs().nan_to_num(nan=torch.inf).max().item())
    assert ends[1] < 2e-5
    if (p, degree) == (2, 2):
        assert ends[0] > 1


@settings(max_examples=200, deadline=None)
@given(
    p=st.integers(1, 64),
    degree=st.sampled_from(DEGREES),
    exponent=st.floats(-12.9, -1e-9),
    cushion=st.floats(0, 0.9),
    headroom=st.floats(0, 0.1),
    tolerance=st.sampled_from([1e-14, 1e-5, 0.1]),
)
def test_every_valid_argument_gives_a_schedule(p, degree, exponent, cushion, headroom, tolerance):
    options = {"tolerance": tolerance, "cushion": cushion, "headroom": headroom}
    steps = minimax_coefficients(10**exponent, p, degree, **options)
    assert len(steps) <= 50
    assert schedule_error(steps, 10**exponent, p) <= tolerance


def test_more_steps_for_smaller_floors():
    for p, degree in itertools.product((1, 2, 4, 64), DEGREES):
        lengths = [len(minimax_coefficients(10.0**-k, p, degree)) for k in range(1, 9)]
        assert lengths == sorted(lengths)


def test_is_cached_and_plain():
    steps = minimax_coefficients(1e-6, 2, 2)
    assert steps is minimax_coefficients(1e-6, 2, 2)
    assert all(type(c) is float for step in steps for c in step)


@pytest.mark.parametrize(("floor", "p", "degree", "keywords", "error", "words"), [
    (0.0, 2, 2, {}, ValueError, "floor must be in"),
    (1.0, 2, 2, {}, ValueError, "floor must be in"),
    (float("nan"), 2, 2, {}, ValueError, "floor must be in"),
    (1e-27, 2, 2, {}, ValueError, r"\[1e-26, 1\) for p=2, got 1e-27"),
    ("1", 2, 2, {}, TypeError, "floor must be a float, got str"),
    (1e-4, 0, 2, {}, ValueError, "p must be from 1 to 64, got 0"),
    (1e-4, 65, 2, {}, ValueError, "p must be from 1 to 64, got 65"),
    (1e-4, 2.0, 2, {}, TypeError, "p must be an int, got float"),
    (1e-4, True, 2, {}, TypeError, "p must be an int, got bool"),
    (1e-4, 2, 3, {}, ValueError, "degree must be 1, 2 or 4, got 3"),
    (1e-4, 2, (), {}, ValueError, "degree must be 1, 2 or 4, got none"),
    (1e-4, 2, (1, 2.0), {}, TypeError, "degree must be an int or ints, got float"),
    (1e-4, 2, 2, {"tolerance": 1e-16}, ValueError, "tolerance must be in"),
    (1e-4, 2, 2, {"cushion": 0.91}, ValueError, "cushion must be in"),
    (1e-4, 2, 2, {"headroom": -0.1}, ValueError, "headroom must be in"),
])  # fmt: skip
def test_errors(floor, p, degree, keywords, error, words):
    with pytest.raises(error, match=words):
        minimax_coefficients(floor, p, degree, **keywords)
