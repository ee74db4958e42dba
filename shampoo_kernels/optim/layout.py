"""What the state of a block holds beside its statistics, and which option asks for it."""

from collections.abc import Iterator, Sequence

from shampoo_kernels.optim.blocks import LEFT

MOMENTS = ("exp_avg", "exp_avg_sq")

# The options that decide what the state of a parameter looks like.
STRUCTURE = (
    "p", "block_size", "max_dimension", "split", "batch_dims", "precondition", "root_dtype",
    "capturable", "statistic", "application", "scale", "graft",
)  # fmt: skip


def moment_names(sides: Sequence[str], group: dict) -> tuple[str, ...]:
    """The parameter-shaped tensors.

    The graft "sgd" squares nothing. In an eigenbasis the squares are those of each block.
    """
    soap = group["application"] == "soap" and bool(sides)
    return MOMENTS[:1] if soap or group["graft"] == "sgd" else MOMENTS


def kept(side: str, group: dict) -> str:
    """The state's name of the matrix that is computed from the statistic of a side."""
    return f"{side}_basis" if group["application"] == "soap" else f"{side}_root"


def block_state(
    m: int, n: int, sides: Sequence[str], group: dict
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the state of one m x n block.

    "block_step": finite gradients seen, for bias correction. Per side "left" (its statistic), and
    "left_root", or with application="soap" "left_basis" and "left_values", the eigenvalues as they
    were when the basis was computed, zero before, and for the block "exp_avg_sq", the squares in
    that basis. "energy": see `statistics.update_`.
    """
    yield "block_step", ()
    for side in sides:
        d = m if side == LEFT else n
        yield side, (d, d)
        yield kept(side, group), (d, d)
        if group["application"] == "soap":
            yield f"{side}_values", (d,)
    if sides and group["application"] == "soap":
        yield MOMENTS[1], (m, n)
    if needs_energy(sides, group):
        yield "energy", ()


def needs_energy(sides: Sequence[str], group: dict) -> bool:
    """Whether the scale has to be measured: "shampoo" has it in its trace, one factor in its n."""
    if len(sides) < 2 or group["application"] == "soap":
        return False
    measured = group["scale"] == "trace" and group["statistic"] != "shampoo"
    return measured or group["scale"] == "least_squares"
