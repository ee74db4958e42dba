"""Minimax coefficients of the matrix iterations for inverse p-th roots and polar factors.

Every iterate is a polynomial of one matrix, so one number tells all: an eigenvalue ratio λ in
(0, 1] becomes s = λ^(1/p), a step maps it to s*h(s^p), h(M) = c0 + c1*M + c2*M², the aim is s = 1.
Each step is the h of its degree that minimises max |s*h(s^p) - 1| on the interval the step before
has left, as in Polar Express (Amsel et al., arXiv 2505.16932) and CANS (Grishina et al., arXiv
2506.10935), for any p.
"""

import functools
import math
import numbers

Step = tuple[float, ...]

# Below this the optimum cannot be told from its limit, and the exchange becomes singular.
_BINOMIAL_BELOW = 1e-5


def minimax_coefficients(
    floor: float,
    p: int,
    degree: int,
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
        degree: of h in M, 1 or 2.
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
        One tuple (c0, c1) or (c0, c1, c2) per step. Minimax steps; once the remaining error is
        below 1e-5, the binomial step that they tend to.

    Raises:
        TypeError, ValueError: an argument of another type or outside of its range.
    """
    name = "minimax_coefficients"
    _check_integer(name, "p", p, 64)
    _check_integer(name, "degree", degree, 2)
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
        float(floor), int(p), int(degree), float(tolerance), float(cushion), float(headroom)
    )


def schedule_error(steps: tuple[Step, ...], floor: float, p: int) -> float:
    """max |s - 1| over all eigenvalues in [floor, 1] after the whole schedule.

    This is the largest relative error of the root in exact arithmetic. The steps have degree 1
    or 2, so the image of an interval is known exactly from its ends and the extrema in between.
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
    floor: float, p: int, degree: int, tolerance: float, cushion: float, headroom: float
) -> tuple[Step, ...]:
    low, high = floor ** (1 / p), 1.0
    steps: list[Step] = []
    while not steps or max(high - 1, 1 - low) > tolerance:
        if max(high - 1, 1 - low) < _BINOMIAL_BELOW:
            step = _binomial(p, degree)
        else:
            a = max(low, cushion * high)
            step = _minimax_1(p, a, high) if degree == 1 else _minimax_2(p, a, high)
            if a > low:
                step = _centred(step, p, low, high)
        steps.append(step)
        low, high = _image(step, p, low, high)
        high += headroom * (high - 1)
    return tuple(steps)


def _centred(step: Step, p: int, low: float, high: float) -> Step:
    """The multiple of the step whose image of [low, high] has 1 in its middle."""
    C = 2 / sum(_image(step, p, low, high))
    return tuple(C * c for c in step)


def _binomial(p: int, degree: int) -> Step:
    """h = sum_i b_i (1 - M)^i, the expansion of M^(-1/p) at 1, as powers of M."""
    b1 = 1 / p
    if degree == 1:
        return (1 + b1, -b1)
    b2 = b1 * (1 + p) / (2 * p)
    return (1 + b1 + b2, -b1 - 2 * b2, b2)


def _minimax_1(p: int, a: float, b: float) -> Step:
    """h = C (T - M), f(s) = s (T - s^p): f(a) = f(b) gives T, and C centres the range on 1."""
    T = _divided_difference(p, b, a)
    top = (T / (p + 1)) ** (1 / p) * T * p / (p + 1)
    C = 2 / (top + a * (T - a**p))
    return (C * T, -C)


def _minimax_2(p: int, a: float, b: float) -> Step:
    """Remez exchange over (a, x1, x2, b) for q(s) = s (1 + c1 M + c2 M²), scaled at the end.

    With c0 = 1, q(a) = q(x2) and q(x1) = q(b) are two linear equations whose coefficients are
    positive divided differences: nothing cancels, even for a = 1e-12. The new nodes are exact, the
    roots of a quadratic: q'(s) = 1 + (1+p) c1 M + (1+2p) c2 M².
    """
    x1, x2 = b - 0.75 * (b - a), b - 0.25 * (b - a)
    for _ in range(40):  # convergence is quadratic; narrow intervals end in a little noise
        u1, u2 = _divided_difference(p, x2, a), _divided_difference(2 * p, x2, a)
        v1, v2 = _divided_difference(p, b, x1), _divided_difference(2 * p, b, x1)
        determinant = u1 * v2 - u2 * v1
        c1, c2 = (u2 - v2) / determinant, (v1 - u1) / determinant
        old = x1, x2
        x1, x2 = _extrema((1.0, c1, c2), p)
        if abs(x1 - old[0]) <= 1e-9 * x1 and abs(x2 - old[1]) <= 1e-9 * x2:
            break
    return _centred((1.0, c1, c2), p, a, b)


def _divided_difference(k: int, x: float, y: float) -> float:
    """(x^(k+1) - y^(k+1)) / (x - y) = sum_i x^i y^(k-i) without cancellation, x >= y > 0."""
    if x == y:
        return (k + 1) * x**k
    t = math.log1p((x - y) / y)
    return x**k * math.expm1(-(k + 1) * t) / math.expm1(-t)


def _value(step: Step, p: int, s: float) -> float:
    M = s**p
    h = 0.0
    for c in reversed(step):
        h = h * M + c
    return s * h


def _extrema(step: Step, p: int) -> tuple[float, ...]:
    """Where d/ds of s*h(s^p) vanishes, s > 0, in ascending order."""
    c0, c1, c2 = step[0], step[1] * (1 + p), (step[2] * (1 + 2 * p) if len(step) > 2 else 0.0)
    if c2 == 0:
        roots = [-c0 / c1]
    else:
        # c1 < 0 < c2 in every minimax step; a double root may round to a negative discriminant.
        half = -c1 / 2 + math.sqrt(max(c1 * c1 / 4 - c0 * c2, 0.0))
        roots = [c0 / half, half / c2]
    return tuple(M ** (1 / p) for M in roots)


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


def _check_number(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a float, got {type(value).__name__}")
