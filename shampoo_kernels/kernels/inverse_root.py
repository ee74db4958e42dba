"""Inverse p-th roots by the product kernel: `newton` and `product` of ops/iterations.py on a GPU.

Same algebra, schedules and residual; nothing here synchronises. Both take scaled stacks (B, n, n)
float32, contiguous, and return (X, residual (B,)).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo_kernels.kernels.launch import divided
from shampoo_kernels.kernels.product import product as multiply
from shampoo_kernels.schedules import in_squares

Coefficients = Sequence[tuple[float, ...]]

# Blocks are worked on in chunks of this size, which bounds the workspace. Not measured yet; where
# a chunk's working set, 16 MB a block of 1024, stays in an H100's 50 MB L2, smaller may be faster.
_CHUNK_BYTES = 64 << 20
_FP16_CEILING = 16384.0


def chunks(batch: int, n: int) -> list[slice]:
    """The blocks, in slices whose float32 entries are at most _CHUNK_BYTES, or one block."""
    size = max(1, _CHUNK_BYTES // max(4 * n * n, 1))
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def arithmetic(method: str, n: int, p: int, floor: float, precision: str) -> str:
    """What an iteration multiplies in, at least as good as `precision` asks for.

    "newton": a precision; "product": the dtype of the operands, whose rounding u makes an error of
    about u/sqrt(floor*n) in P. Emulated on the families of tests/matrices.py at n = 33 to 512: at
    these floors the residual stays below its limit of 0.05; one decade lower it does not (low rank
    and Hilbert, of which most eigenvalues lie at the ridge), though the root is as good as 1e-2.
    """
    if method == "newton":
        return "high" if precision != "highest" and floor >= 1e-4 else "highest"
    if precision == "highest" or n < 32 or floor < (1e-3 if p == 4 else 1e-4):
        return "float32"
    return "bfloat16" if precision == "medium" and floor >= 1e-3 and p <= 2 else "float16"


def iterate(
    method: str, A: Tensor, scale: Tensor, usable: Tensor, ridge: float, p: int,
    coefficients: Coefficients, arithmetic: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ "newton" or "product" on (A / scale + ridge*I) / (1 + ridge), or on I where a block is not
    `usable`.

    Only the lower triangle of A is read, and nothing of blocks that are not usable.
    """
    if A.numel() == 0:
        return A.clone(), A.new_zeros(A.shape[0])
    stacks = [torch.empty(A.shape, dtype=A.dtype, device=A.device)]
    a = torch.where(usable, ridge / (1 + ridge), 1.0).to(A.dtype)
    lift, inverse = divided(scale)
    b = torch.where(usable, inverse / (1 + ridge), 0.0)
    measured = multiply(None, None, stacks[0], op="newton", a=a, b=b, c=0.0, C=A, lift=lift,
                        symmetric=True, measure="distance")  # fmt: skip
    assert measured is not None
    form = newton if method == "newton" else product
    return form(stacks, p, coefficients, measured, arithmetic)


def newton(
    stacks: list[Tensor], p: int, coefficients: Coefficients, measured: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """M-form: X <- X h(M), M <- h(M)^p M from X = I, M = stacks.pop(), max |M - I| as `measured`.

    Every product is one of commuting polynomials, computed by half and mirrored. At most four
    stacks are alive.
    """

    def symmetric(A: Tensor, B: Tensor, **epilogue: Any) -> Tensor:
        D = torch.empty_like(B)
        found = multiply(A, B, D, op="newton", symmetric=True, precision=precision, **epilogue)
        if found is not None:
            stacks.append(found)
        return D

    def polynomial(M: Tensor, coefficient: tuple[float, ...]) -> Tensor:
        a, b, *rest = in_squares(coefficient)
        c, *inner = rest or (0.0,)
        Q = symmetric(M, M, a=inner[1], b=inner[0], C=M) if inner else M
        return symmetric(Q, Q, a=a, b=b, c=c, C=M)

    M = stacks.pop()
    X = h = polynomial(M, coefficients[0])
    for step, coefficient in enumerate(coefficients[1:], 2):
        last, power = step == len(coefficients), p
        while True:  # right-to-left powers: h is squared, and multiplied to M where p has a bit
            if power & 1:
                M = symmetric(h, M, measure="distance" if last and power == 1 else None)
            power >>= 1
            if not power:
                break
            h = symmetric(h, h)
        del h
        h = polynomial(M, coefficient)
        X = symmetric(X, h)
    return X, (stacks.pop() if stacks else measured).amax(1)


def product(
    stacks: list[Tensor], p: int, coefficients: Coefficients, measured: Tensor, dtype: str
) -> tuple[Tensor, Tensor]:
    """Product form, p in {1, 2, 4}: P = X^(p/2) Y, W = h(P) - a*I, X <- a X + W X, and

        p = 2: Y <- a Y + Y W;     p = 4: Y <- a² Y + Y (2 a W + W²)     from X = I, Y = A.

    X and Y are kept in float32, operands are `dtype`. Nothing is symmetrised before the end.
    p = 1 is the square of p = 2 and of its schedule. At most four stacks are alive.
    """
    if p == 1:
        X, distance = product(stacks, 2, coefficients, measured, dtype)
        D = torch.empty_like(X)
        multiply(X, X, D, op="newton", symmetric=True, precision="highest")
        return D, distance
    pair = _Pair(stacks.pop(), p, *coefficients[0], dtype=getattr(torch, dtype))
    for step, (a, *rest) in enumerate(coefficients[1:], 2):
        measured = pair.polynomial(*rest)
        pair.advance(a, last=step == len(coefficients))
    X = pair.root
    del pair
    return (X + X.mT).div_(2), measured.amax(1)


class _Pair:
    """X and Y of the product form, after its first step.

    Operands take turns in four buffers: `free` are those whose last reader has been launched. In 16
    bits the four are two stacks, and beside them stand float32 masters of X and Y, that of Y in A's
    place, which are updated in place; X and Y are multiplied by a power of two, `scale`, there. In
    float32 A's place is the fourth buffer, and an operand is its own master.
    """

    def __init__(
        self, A: Tensor, p: int, a: float, b: float, c: float = 0.0, *, dtype: torch.dtype
    ):
        self.p, self.ceiling, self.dtype = p, a, dtype
        self.wide = dtype == torch.float32
        new = [torch.empty(A.shape, dtype=dtype, device=A.device) for _ in range(4 - self.wide)]
        self.free, self.scale = new, self._scale()
        operand = A
        if not self.wide:
            operand = self.free.pop()
            _product(None, None, operand, b=1.0, c=0.0, C=A)
        self.X = self.free.pop()
        self.masters = None if self.wide else [torch.empty_like(A), A]
        X = self.X if self.masters is None else self.masters[0]
        narrow = {} if self.wide else {"D16": self.X, "scale16": self.scale}
        _product(operand, operand, X, a=a, b=b, c=c, C=A, **narrow)
        self.W = self.free.pop()
        _product(None, None, self.W, a=-a, b=1.0, c=0.0, C=X)
        T = self._double(a)
        self.Y = self.free.pop()
        Y = self.Y if self.masters is None else self.masters[1]
        narrow = {} if self.wide else {"D16": self.Y, "scale16": self.scale}
        _product(operand, T, Y, b=a ** (p // 2), C=A, **narrow)
        self.free += [T, operand]

    @property
    def root(self) -> Tensor:
        return self.X if self.masters is None else self.masters[0]

    def polynomial(self, b: float, c: float = 0.0) -> Tensor:
        """W <- b P + c P²; returns the measured max |P - I|."""
        P, undo = self.free.pop(), self.scale**-2
        if self.p == 2:
            measured = _product(self.X, self.Y, P, c=undo, measure="distance")
        else:
            T, P = P, self.free.pop()
            _product(self.X, self.Y, T, c=undo)
            measured = _product(self.X, T, P, c=1 / self.scale, measure="distance")
            self.free.append(T)
        self.W = self.free.pop()
        _product(P, P, self.W, b=b, c=c, C=P)
        self.free.append(P)
        assert measured is not None
        return measured

    def advance(self, a: float, last: bool) -> None:
        """X <- a X + W X and, if there is a step to come, Y."""
        undo = 1 / self.scale
        self.ceiling *= a
        if not last:
            self.scale = self._scale()
        X, self.X = self.X, self.free.pop()
        self._update(0, self.W, X, X, self.X, a, undo)
        self.free.append(X)
        if last:
            return
        T = self._double(a)
        Y, self.Y = self.Y, self.free.pop()
        self._update(1, Y, T, Y, self.Y, a ** (self.p // 2), undo)
        self.free += [T, Y]

    def _update(
        self, index: int, A: Tensor, B: Tensor, old: Tensor, new: Tensor, b: float, c: float
    ) -> None:
        if self.masters is None:
            _product(A, B, new, b=b, c=c, C=old)
        else:
            master = self.masters[index]
            _product(A, B, master, b=b, c=c, C=master, D16=new, scale16=self.scale)

    def _double(self, a: float) -> Tensor:
        """What Y is multiplied by: W for p = 2, for p = 4 also T = 2 a W + W², and W is free."""
        if self.p == 2:
            return self.W
        T = self.free.pop()
        _product(self.W, self.W, T, b=2 * a, C=self.W)
        self.free.append(self.W)
        return T

    def _scale(self) -> float:
        """X reaches the product of all a, thousands for p = 2 at a floor of 1e-6: it is scaled down
        where float16 would overflow."""
        if self.dtype != torch.float16:
            return 1.0
        return 2.0 ** min(0, math.floor(math.log2(_FP16_CEILING / self.ceiling)))


def _product(A: Tensor | None, B: Tensor | None, D: Tensor, **options: Any) -> Tensor | None:
    return multiply(A, B, D, op="product", precision="highest", **options)
