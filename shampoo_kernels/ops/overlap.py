"""What is written must share no memory with itself or with what is read.

For implementations only: a fake has no memory.
"""

from torch import Tensor

_NODES = 10_000  # of the search; strides of slices take a few dozen
_ADDRESSED = ("cpu", "cuda")  # devices whose data_ptr() is an address


def check_apart(op: str, name: str, written: Tensor, **read: Tensor | None) -> None:
    """`written` overlaps neither itself nor any of `read`; interleaved views are apart."""
    start, stop, nested = _span(written)
    if not nested:
        raise ValueError(
            f"{op}: {name} is written in place and must not overlap itself, as an expanded tensor "
            f"does, got shape {tuple(written.shape)} with strides {written.stride()}"
        )
    for other_name, other in read.items():
        if other is not None:
            low, high, _ = _span(other)
            if low < stop and start < high and _share_memory(written, other):
                raise ValueError(
                    f"{op}: {name} is written in place and must not overlap {other_name}"
                )


def check_same_or_apart(op: str, name: str, written: Tensor, **read: Tensor | None) -> None:
    """As `check_apart`, but a tensor that is element for element `written` is fine too."""
    check_apart(op, name, written, **{k: x for k, x in read.items() if not _same(written, x)})


def _same(A: Tensor, B: Tensor | None) -> bool:
    return (
        B is not None
        and A.data_ptr() == B.data_ptr()
        and (A.shape, A.dtype) == (B.shape, B.dtype)
        and all(s == t for s, t, n in zip(A.stride(), B.stride(), A.shape, strict=True) if n > 1)
    )


def _span(A: Tensor) -> tuple[int, int, bool]:
    """The addresses of A's first byte and of the byte after its last, and whether its strides nest.

    They nest where every stride is longer than all shorter ones reach together, which they do in
    every slice, step, diagonal and transpose of a dense tensor: then no two indices name one
    element. Of what `as_strided` can make, some does not nest although no two do, such as shape
    (2, 3) with strides (3, 2).
    """
    start = A.data_ptr()
    if A.is_contiguous():
        return start, start + A.nbytes, True
    if A.numel() == 0:
        return start, start, True
    reach, nested = 0, True
    for stride, n in sorted(zip(A.stride(), A.shape, strict=True)):
        if n > 1:
            nested = nested and stride > reach
            reach += (n - 1) * stride
    return start, start + (reach + 1) * A.itemsize, nested


def _share_memory(A: Tensor, B: Tensor) -> bool:
    """Whether any byte belongs to both, exactly (to _NODES steps of search, then True).

    A byte i of A is a byte j of B where sum_k s_k i_k = offset + sum_k t_k j_k, an element's bytes
    being one more dimension. With j_k counted from the end all terms stand on one side.
    """
    if A.numel() == 0 or B.numel() == 0:
        return False
    storages = A.untyped_storage().data_ptr(), B.untyped_storage().data_ptr()
    if A.device.type not in _ADDRESSED and storages[0] != storages[1]:
        return False
    counts: dict[int, int] = {}
    total = B.data_ptr() - A.data_ptr()
    for X, weight in ((A, 0), (B, 1)):
        dimensions = [(s * X.itemsize, n) for s, n in zip(X.stride(), X.shape, strict=True)]
        for stride, n in (*dimensions, (1, X.itemsize)):
            counts[stride] = counts.get(stride, 0) + n - 1
            total += weight * stride * (n - 1)
    return _reachable(total, sorted((c, n) for c, n in counts.items() if c > 0 and n > 0))


def _reachable(total: int, terms: list[tuple[int, int]]) -> bool:
    """Whether sum_k c_k x_k = total for integers 0 <= x_k <= n_k; terms: (c_k, n_k), ascending."""
    reach = [0]
    for c, n in terms:
        reach.append(reach[-1] + c * n)
    open_ = [(total, len(terms))]
    for _ in range(_NODES):
        if not open_:
            return False
        rest, k = open_.pop()
        if k == 0:
            if rest == 0:
                return True
            continue
        c, n = terms[k - 1]
        least, most = max(0, -((reach[k - 1] - rest) // c)), min(n, rest // c)
        if most - least > _NODES:
            return True
        open_.extend((rest - c * x, k - 1) for x in range(least, most + 1))
    return True
