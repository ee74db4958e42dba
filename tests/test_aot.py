"""Every row of the table is compiled ahead of time for its target, and the binary looks right."""

import ahead
import pytest

pytest.importorskip("triton")

from shampoo_kernels.kernels import table

# Bytes of shared memory a thread block may have; sm_80 stands for the smaller sm_86 and sm_120 too.
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
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


@pytest.fixture(scope="session")
def binaries(request):
    """{job: facts} of every job that the selected tests ask for, compiled on two processes."""
    wanted = [
        job(*item.callspec.params["case"], item.callspec.params["turned"])
        for item in request.session.items
        if item.originalname == "test_every_row_compiles"
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
    assert 0 < facts["shared"] <= SHARED[row.target]
    assert facts["tensor_memory"] <= 512
    assert not facts["trap"]
    tensor_cores = mode != "ieee" or row.target == "gfx942"
    assert (facts[MATRIX[row.target]] > 0) == tensor_cores
    others = set(MATRIX.values()) - {MATRIX[row.target]}
    assert not any(facts[other] for other in others)
    assert (facts["cp.async.bulk.tensor"] > 0) == (row.form == "descriptor")
    assert facts["wide_offsets"] or row.form == "descriptor"


def test_every_word_has_a_row_on_every_target():
    """What the ops can ask for is served: any dtype, word and size, aligned or not."""
    import torch

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for target in SHARED:
        for op in ("gram_ema_", "precondition"):
            for precision in ("highest", "high", "medium"):
                for A in dtypes:
                    for B in dtypes:
                        mode = table.mode(A, B, precision, target)
                        for n in (1, 2048, 2049, 100_000):
                            for aligned in (False, True):
                                assert mode in table.select(target, op, mode, n, aligned).modes
        for mode in ("highest", "high"):
            mode = table.mode(torch.float32, torch.float32, mode, target)
            assert mode in table.select(target, "newton", mode, 128, True).modes
        for A in (torch.float16, torch.bfloat16, torch.float32):
            mode = table.mode(A, A, "highest", target)
            assert mode in table.select(target, "product", mode, 128, True).modes


def test_a_call_that_no_row_serves_says_so():
    with pytest.raises(LookupError, match="no row for newton with mode 'fp16' on sm_90"):
        table.select("sm_90", "newton", "fp16", 64, True)


def test_nothing_claims_to_be_measured_without_saying_where():
    assert all(row.chosen == table.NOT_MEASURED or "bench/results/" in row.chosen
               for row in table.ROWS)  # fmt: skip
