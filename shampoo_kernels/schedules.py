"""Minimax coefficients of the matrix iterations for inverse p-th roots and polar factors.

Every iterate is a polynomial of one matrix, so one number tells all: an eigenvalue ratio λ in
(0, 1] becomes s = λ^(1/p), a step maps it to s*h(s^p), h(M) = c0 + c1*M + ..., the aim is s = 1.
Each step is the h of its degree that minimises max |s*h(s^p) - 1| on the interval the step before
has left, as in Polar Express (Amsel et al., arXiv 2505.16932) and CANS (Grishina et al., arXiv
2506.10935), for any p.
"""

import functools
import itertools
import math
import numbers
from collections.abc import Sequence

Step = tuple[float, ...]

DEGREES = (1, 2, 4)
# By degree: below this the optimum cannot be told from its limit, the exchange becomes singular.
_BINOMIAL_BELOW = {1: 1e-5, 2: 1e-5, 4: 1e-2}


def minimax_coefficients(
    floor: float,
    p: int,
    degree: int | Sequence[int],
    *,
    tolerance: float = 1e-5,
    cushion: float = 0.0,
    headroom: float = 0.0,
) -> tuple[Step, ...]:
    """The steps that bring every eigenvalue in [floor, 1] to its inverse p-th root.

    Step k multiplies the root X by h_k(M), where M = X^p A; eigenvalues below the floor grow by the
    largest possible factor and saturate (an implicit ridge). Above 1 there is no room: an excess of
    a tenth of the floor is harmless, a larger one may diverge, so divide by a strict upper bound.

    Args:
        floor: smallest eigenvalue that is designed for, relative to the bound the matrix is divided
            by; below 1, and at least 1e-13^p (float64 coefficients resolve no less) and 1e-60.
        p: the root, an integer from 1 to 64.
        degree: of h in M, 1, 2 or 4; or those of the steps in turn, the last of all that follow.
        tolerance: the schedule ends with the first step that leaves max |s - 1| at most this; from
            1e-14 to 0.1. The default suits float32; float64 wants 1e-14, one or two steps more.
        cushion: in [0, 0.9]. The plain optimum also throws eigenvalues that are already near 1
            back towards 0, to be won again from what rounding has left of them. With a cushion no
            step is designed for values of s below cushion * the largest, which keeps the others
            away from 0 at little or no cost in steps (the `cushion` of Polar Express).
        headroom: in [0, 0.1]. s = 2, which the first steps reach, is a repelling fixed point of the
            next: a value that rounding lifts above the interval moves away tenfold per step. With
            headroom every step is designed for values up to (1 + headroom) times as far above 1 as
            exact arithmetic gets (the safety factor of Polar Express, but it fades out near 1).

    Returns:
        One tuple (c0, c1, ..., c_degree) per step. Minimax steps; once the remaining error is below
        1e-5 (degree 4: 1e-2), the binomial step that they tend to.

    Raises:
        TypeError, ValueError: an argument of another type or outside of its range.
    """
    name = "minimax_coefficients"
    _check_integer(name, "p", p, 64)
    degrees = tuple(degree) if isinstance(degree, Sequence) else (degree,)
    for each in degrees or (None,):
        _check_degree(name, each)
    _check_number(name, "floor", floor)
    least = 10.0 ** -min(13 * int(p), 60)
    if not least <= floor < 1:
        raise ValueError(f"{name}: floor must be in [{least:g}, 1) for p={p}, got {floor!r}")
    _check_number(name, "tolerance", tolerance)
    if not 1e-14 <= tolerance <= 0.1:
        raise ValueError(f"{name}: tolerance must be in [1e-14, 0.1], got {tolerance!r}")
    _check_number(name, "cushion", cushion)
    if not 0 <= cushion <= 0.9:
        raise ValueError(f"{name}: cushion must be in [0, 0.9], got {cushion!r}")
    _check_number(name, "headroom", headroom)
    if not 0 <= headroom <= 0.1:
        raise ValueError(f"{name}: headroom must be in [0, 0.1], got {headroom!r}")
    return _schedule(
        float(floor), int(p), tuple(map(int, degrees)), float(tolerance), float(cushion),
        float(headroom),
    )  # fmt: skip


def in_squares(step: Step) -> Step:
    """(a, b, c, s, t) with h(M) = a I + b M + c Q², Q = t I + s M + M²: a step of degree 4 by two
    products of a matrix by itself. With degree 1 or 2 it is (a, b) or (a, b, c), and Q = M."""
    if len(step) <= 3:
        return step
    c0, c1, c2, c3, c4 = step
    s = c3 / (2 * c4)
    t = (c2 / c4 - s * s) / 2
    return c0 - c4 * t * t, c1 - 2 * c4 * s * t, c4, s, t


def schedule_error(steps: tuple[Step, ...], floor: float, p: int) -> float:
    """max |s - 1| over all eigenvalues in [floor, 1] after the whole schedule.

    This is the largest relative error of the root in exact arithmetic: the image of an interval is
    known from its ends and the extrema in between.
    """
    low, high = floor ** (1 / p), 1.0
    for step in steps:
        low, high = _image(step, p, low, high)
    return max(abs(high - 1), abs(1 - low))


def reaches(steps: tuple[Step, ...], floor: float, p: int) -> tuple[float, ...]:
    """For every step the largest ||M - I||_2 with which a matrix may start there: all values of
    s = M^(1/p) then lie in the interval that the steps before leave, which the rest is made for.

    0.1 % less than that, for the rounding of a measured norm.
    """
    low, high = floor ** (1 / p), 1.0
    found = []
    for step in steps:
        found.append(0.999 * max(0.0, min(1 - low**p, high**p - 1)))
        low, high = _image(step, p, low, high)
    return tuple(found)


@functools.lru_cache(maxsize=256)
def _schedule(
    floor: float, p: int, degrees: tuple[int, ...], tolerance: float, cushion: float,
    headroom: float,
) -> tuple[Step, ...]:  # fmt: skip
    low, high = floor ** (1 / p), 1.0
    steps: list[Step] = []
    while not steps or max(high - 1, 1 - low) > tolerance:
        degree = degrees[min(len(steps), len(degrees) - 1)]
        step, low, high = _step(p, degree, low, high, cushion)
        steps.append(step)
        high += headroom * (high - 1)
    return tuple(steps)


@functools.lru_cache(maxsize=1024)
def _step(
    p: int, degree: int, low: float, high: float, cushion: float
) -> tuple[Step, float, float]:
    """The next step, and the interval that it leaves of [low, high]."""
    if max(high - 1, 1 - low) < _BINOMIAL_BELOW[degree]:
        step = _binomial(p, degree)
    else:
        a = max(low, cushion * high)
        step = _minimax(p, degree, a, high)
        if a > low:
            step = _centred(step, p, low, high)
    return step, *_image(step, p, low, high)


def _centred(step: Step, p: int, low: float, high: float) -> Step:
    """The multiple of the step whose image of [low, high] has 1 in its middle."""
    C = 2 / sum(_image(step, p, low, high))
    return tuple(C * c for c in step)


def _binomial(p: int, degree: int) -> Step:
    """h = sum_i b_i (1 - M)^i, the expansion of M^(-1/p) at 1, as powers of M."""
    b = [1.0]
    for i in range(1, degree + 1):
        b.append(b[-1] * (1 / p + i - 1) / i)
    return tuple(
        (-1) ** j * sum(b[i] * math.comb(i, j) for i in range(j, degree + 1))
        for j in range(degree + 1)
    )


def _minimax(p: int, degree: int, a: float, b: float) -> Step:
    """Remez exchange over (a, x1, ..., b) for q(s) = s (1 + c1 M + ...), scaled at the end.

    With c0 = 1, q(x[i]) = q(x[i + 2]) are linear equations whose coefficients are positive divided
    differences: nothing cancels, even for a = 1e-12. The new nodes are the extrema of q.
    """
    inner = [
        a + (b - a) * (1 - math.cos(math.pi * i / (degree + 1))) / 2 for i in range(1, degree + 1)
    ]
    for _ in range(40):  # convergence is quadratic; narrow intervals end in a little noise
        x = [a, *inner, b]
        rows = [
            [_divided_difference(i * p, upper, lower) for i in range(1, degree + 1)]
            for lower, upper in zip(x, x[2:], strict=False)
        ]
        step = (1.0, *_solve(rows, [-1.0] * degree))
        old, inner = inner, _extrema(step, p)
        if all(abs(x - y) <= 1e-9 * x for x, y in zip(inner, old, strict=True)):
            break
    return _centred(step, p, a, b)


def _solve(rows: list[list[float]], right: list[float]) -> list[float]:
    """The solution of a small dense system, by elimination with pivots."""
    rows = [[*row, value] for row, value in zip(rows, right, strict=True)]
    n = len(rows)
    for k in range(n):
        pivot = max(range(k, n), key=lambda i: abs(rows[i][k]))
        rows[k], rows[pivot] = rows[pivot], rows[k]
        for i in range(k + 1, n):
            factor = rows[i][k] / rows[k][k]
            rows[i] = [x - factor * y for x, y in zip(rows[i], rows[k], strict=True)]
    x = [0.0] * n
    for k in reversed(range(n)):
        x[k] = (rows[k][n] - sum(rows[k][j] * x[j] for j in range(k + 1, n))) / rows[k][k]
    return x


def _divided_difference(k: int, x: float, y: float) -> float:
    """(x^(k+1) - y^(k+1)) / (x - y) = sum_i x^i y^(k-i) without cancellation, x >= y > 0."""
    if x == y:
        return (k + 1) * x**k
    t = math.log1p((x - y) / y)
    return x**k * math.expm1(-(k + 1) * t) / math.expm1(-t)


def _value(step: Step, p: int, s: float) -> float:
    return s * _horner(step, s**p)[0]


def _extrema(step: Step, p: int) -> list[float]:
    """Where d/ds of s*h(s^p) vanishes, s > 0, in ascending order."""
    slope = [(1 + i * p) * c for i, c in enumerate(step)]
    return [M ** (1 / p) for M in _positive_roots(slope)]


def _positive_roots(c: list[float]) -> list[float]:
    """Where sum_i c_i M^i changes its sign, M > 0, ascending; all its roots being real, they lie
    between those of its derivative."""
    while len(c) > 1 and c[-1] == 0:
        c = c[:-1]
    if len(c) == 1:
        return []
    most = 1 + max(abs(x / c[-1]) for x in c)  # Cauchy's bound
    turns = _positive_roots([i * x for i, x in enumerate(c)][1:])
    edges = [0.0, *turns, most]
    found = (_root_between(c, low, high) for low, high in itertools.pairwise(edges))
    return [root for root in found if root is not None]


def _root_between(c: list[float], low: float, high: float) -> float | None:
    """Newton's method, with bisection where it leaves the bracket."""
    ascending = _horner(c, high)[0] > 0
    if ascending == (_horner(c, low)[0] > 0):
        return None
    x = (low + high) / 2
    for _ in range(200):
        value, slope = _horner(c, x)
        low, high = (low, x) if (value > 0) == ascending else (x, high)
        next_ = x - value / slope if slope else low
        if not low < next_ < high:
            next_ = (low + high) / 2
        if abs(next_ - x) <= 1e-15 * x:
            break
        x = next_
    return x


def _horner(c: Sequence[float], x: float) -> tuple[float, float]:
    """The polynomial sum_i c_i x^i and its derivative at x."""
    value = slope = 0.0
    for coefficient in reversed(c):
        slope = slope * x + value
        value = value * x + coefficient
    return value, slope


def _image(step: Step, p: int, low: float, high: float) -> tuple[float, float]:
    """The exact image of [low, high] under s -> s*h(s^p)."""
    inner = [s for s in _extrema(step, p) if low < s < high]
    values = [_value(step, p, s) for s in (low, *inner, high)]
    return min(values), max(values)


def _check_integer(op: str, name: str, value: object, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not 1 <= int(value) <= most:
        raise ValueError(f"{op}: {name} must be from 1 to {most}, got {value}")


def _check_degree(op: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral | None):
        raise TypeError(f"{op}: degree must be an int or ints, got {type(value).__name__}")
    if value not in DEGREES:
        raise ValueError(
            f"{op}: degree must be 1, 2 or 4, got {'none' if value is None else value}"
        )


def _check_number(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a float, got {type(value).__name__}")
