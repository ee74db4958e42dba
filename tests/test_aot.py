"""Every row of the table is compiled ahead of time for its target, and the binary looks right."""

from importlib import metadata

import ahead
import pytest

pytest.importorskip("triton")

from shampoo_kernels.kernels import table

MATRIX = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}
CASES = [(index, mode) for index, row in enumerate(table.ROWS) for mode in row.modes]


def by_default(case):
    """(turned, n) in the normal suite: by turns G Gᵀ and Gᵀ G, and of pointer rows sizes whose
    strides are multiples of 16 bytes and odd ones, which are another binary."""
    index, mode = case
    row = table.ROWS[index]
    return index % 2 == 1, SIZES[row.form][row.modes.index(mode) % len(SIZES[row.form])]


def job(case, turned, n):
    index, mode = case
    return (table.ROWS[index].target, "row", index, mode, turned, n)


SIZES = {"descriptor": (160,), "pointer": (161, 160)}
FLOWS = [
    ("gram_ema_", True, 1), ("gram_ema_", False, 4), ("precondition", "highest"),
    ("inverse_root", "newton", 2, "highest"), ("inverse_root", "product", 4, "high"),
    ("inverse_root", "product", 2, "high"), ("inverse_root", "product", 2, "highest"),
    ("eigenvalue_bound", 16, 512, 600), ("power_iteration", 16, 32),
]  # fmt: skip


def flow_job(target, case, n):
    op, *rest = case
    return (target, "flow", op, n, *rest)


@pytest.fixture(scope="session")
def binaries(request):
    """{job: facts} of every job that the selected tests ask for, compiled on two processes."""
    wanted = [
        job(*(item.callspec.params[name] for name in ("case", "turned", "n")))
        for item in request.session.items
        if item.originalname == "test_every_row_compiles"
    ]
    wanted += [
        flow_job(*(item.callspec.params[name] for name in ("target", "case", "n")))
        for item in request.session.items
        if item.originalname == "test_every_kernel_of_an_op_compiles"
    ]
    return ahead.everything(wanted)


def spilled(facts):
    """Bytes that registers spill to. The ptxas of triton 3.6 stores one to four registers on the
    stack where it uses 40 or 80 of 255, before the loop: that is not for want of registers."""
    old = tuple(map(int, metadata.version("triton").split(".")[:2])) < (3, 7)
    parked = old and facts["stack"] <= 16 and (facts["registers"] or 255) <= 128
    return 0 if parked else facts["stack"]


def name(case):
    index, mode = case
    row = table.ROWS[index]
    return f"{row.target}-{row.op}-{row.form}-{row.block}-{mode}"


PARAMETERS = [
    pytest.param(
        case,
        turned,
        n,
        id=f"{name(case)}-{n}{'-turned' * turned}",
        marks=[] if (turned, n) == by_default(case) else [pytest.mark.slow],
    )
    for case in CASES
    for turned in (False, True)
    for n in SIZES[table.ROWS[case[0]].form]
]


@pytest.mark.parametrize(("case", "turned", "n"), PARAMETERS)
def test_every_row_compiles(case, turned, n, binaries):
    index, mode = case
    row, facts = table.ROWS[index], binaries[job(case, turned, n)]
    assert isinstance(facts, dict), facts
    assert spilled(facts) == 0
    assert 0 < facts["shared"] <= table.shared_bytes(row, mode) <= table.SHARED[row.target]
    assert facts["tensor_memory"] <= 512
    assert not facts["trap"]
    tensor_cores = mode != "ieee" or row.target == "gfx942"
    assert (facts[MATRIX[row.target]] > 0) == tensor_cores
    others = set(MATRIX.values()) - {MATRIX[row.target]}
    assert not any(facts[other] for other in others)
    assert (facts["cp.async.bulk.tensor"] > 0) == (row.form == "descriptor")
    assert facts["wide_offsets"] or row.form == "descriptor"


@pytest.mark.parametrize("case", FLOWS, ids=str)
@pytest.mark.parametrize(("target", "n"), [
    ("sm_90", 64), *(pytest.param(*x, marks=pytest.mark.slow) for x in
    (("sm_90", 60), ("sm_90", 61), ("sm_80", 64), ("sm_80", 61), ("sm_100", 64), ("gfx942", 64))),
])  # fmt: skip
def test_every_kernel_of_an_op_compiles(target, case, n, binaries):
    """From the op's own launches, output and operand dtypes, overlapping stacks of stacks and all;
    sizes that descriptors can describe (64) get them, others (60 in 16 bits, 61) may not."""
    kernels = binaries[flow_job(target, case, n)]
    assert isinstance(kernels, list), kernels
    assert kernels
    for facts in kernels:
        assert spilled(facts) == 0
        assert facts["shared"] <= table.SHARED[target]
        assert not facts["trap"]
        if target != "sm_90" or n == 64:
            assert bool(facts["descriptors"]) == (target == "sm_90" and facts["multiplies"])


@pytest.mark.parametrize("n", [2048, pytest.param(4096, marks=pytest.mark.slow)])
def test_both_sides_in_one_launch_compiles(n):
    """The experiment that bench/gpu.sh measures, on the tiles of both rows."""
    (facts,) = ahead.everything([("sm_90", "both_sides", n)]).values()
    assert isinstance(facts, dict), facts
    assert spilled(facts) == 0
    assert facts["shared"] <= table.SHARED["sm_90"]
    assert facts["wgmma.mma_async"] > 0
    assert not facts["trap"]


def test_every_word_has_a_row_on_every_target():
    """What the ops can ask for is served: any dtype, word and size, aligned or not."""
    import torch

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for target in table.SHARED:
        for op in ("gram_ema_", "precondition"):
            for precision in ("highest", "high", "medium"):
                for A in dtypes:
                    for B in dtypes:
                        mode = table.mode(A, B, precision, target)
                        for n in (1, 2048, 2049, 100_000):
                            for aligned in (False, True):
                                assert mode in table.select(target, op, mode, n, 64, aligned).modes
        for mode in ("highest", "high"):
            mode = table.mode(torch.float32, torch.float32, mode, target)
            assert mode in table.select(target, "newton", mode, 128, 128, True).modes
        for A in (torch.float16, torch.bfloat16, torch.float32):
            mode = table.mode(A, A, "highest", target)
            assert mode in table.select(target, "product", mode, 128, 128, True).modes


def test_a_call_that_no_row_serves_says_so():
    with pytest.raises(LookupError, match="no row for newton with mode 'fp16' on sm_90"):
        table.select("sm_90", "newton", "fp16", 64, 64, True)


def test_nothing_claims_to_be_measured_without_saying_where():
    assert all(row.chosen == table.NOT_MEASURED or "bench/results/" in row.chosen
               for row in table.ROWS)  # fmt: skip
