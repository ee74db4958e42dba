"""Every row of the table is compiled ahead of time for its target, and the binary looks right."""

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


def turned_by_default(index):
    """One orientation of the operands in the normal suite: G Gᵀ and Gᵀ G by turns."""
    return index % 2 == 1


def job(index, mode, turned):
    return (table.ROWS[index].target, "row", index, mode, turned)


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
        job(*item.callspec.params["case"], item.callspec.params["turned"])
        for item in request.session.items
        if item.originalname == "test_every_row_compiles"
    ]
    wanted += [
        flow_job(*(item.callspec.params[name] for name in ("target", "case", "n")))
        for item in request.session.items
        if item.originalname == "test_every_kernel_of_an_op_compiles"
    ]
    return ahead.everything(wanted)


def name(case):
    index, mode = case
    row = table.ROWS[index]
    return f"{row.target}-{row.op}-{row.form}-{row.block}-{mode}"


PARAMETERS = [
    pytest.param(
        case,
        turned,
        id=f"{name(case)}{'-turned' * turned}",
        marks=[] if turned == turned_by_default(case[0]) else [pytest.mark.slow],
    )
    for case in CASES
    for turned in (False, True)
]


@pytest.mark.parametrize(("case", "turned"), PARAMETERS)
def test_every_row_compiles(case, turned, binaries):
    index, mode = case
    row, facts = table.ROWS[index], binaries[job(index, mode, turned)]
    assert isinstance(facts, dict), facts
    assert facts["stack"] == 0, "registers spill"
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
    (("sm_90", 60), ("sm_80", 64), ("sm_100", 64), ("gfx942", 64))),
])  # fmt: skip
def test_every_kernel_of_an_op_compiles(target, case, n, binaries):
    """From the op's own launches, output and operand dtypes, overlapping stacks of stacks and all;
    sizes that descriptors can describe (64) get them, others (60 in 16 bits) may not."""
    kernels = binaries[flow_job(target, case, n)]
    assert isinstance(kernels, list), kernels
    assert kernels
    for facts in kernels:
        assert facts["stack"] == 0
        assert facts["shared"] <= table.SHARED[target]
        assert not facts["trap"]
        if target != "sm_90" or n == 64:
            assert bool(facts["descriptors"]) == (target == "sm_90" and facts["multiplies"])


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
