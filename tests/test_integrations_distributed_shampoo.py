"""Distributed Shampoo: on these kernels it does what it does alone."""

import contextlib
import dataclasses
import functools
import pickle
import warnings
from fractions import Fraction

import pytest
import torch
from checkouts import checkout
from peers import MODELS, check_agreement, check_state, distance, run, task, tolerance

checkout("distributed_shampoo")
peer = pytest.importorskip("distributed_shampoo")

from distributed_shampoo.preconditioner import matrix_functions  # noqa: E402
from distributed_shampoo.preconditioner import matrix_functions_types as types  # noqa: E402
from distributed_shampoo.preconditioner import shampoo_preconditioner_list as lists  # noqa: E402

from shampoo_kernels.integrations import distributed_shampoo as ours  # noqa: E402
from shampoo_kernels.integrations._patching import UnsupportedPeer  # noqa: E402

EIGEN = types.EigenConfig()
AFTER = types.EigenConfig(
    rank_deficient_stability_config=types.PerturbationConfig(perturb_before_computation=False)
)
# Run to the end, so that the peer's own result is good to float64.
NEWTON = types.CoupledNewtonConfig(tolerance=1e-13)
HIGHER = types.CoupledHigherOrderConfig(rel_epsilon=0.0, abs_epsilon=1e-6, tolerance=1e-20)
RELATIVE = types.CoupledHigherOrderConfig(rel_epsilon=1e-5, abs_epsilon=0.0, tolerance=1e-20)


def maker(config=EIGEN, kind=peer.RootInvShampooPreconditionerConfig, dtype=torch.float64, **rest):
    """A function of parameters that makes the peer's optimizer, small blocks and all."""
    options = {
        "lr": 1e-2, "betas": (0.9, 0.99), "epsilon": 1e-6, "max_preconditioner_dim": 20,
        "precondition_frequency": 3, "start_preconditioning_step": 3,
        "grafting_config": peer.AdamPreconditionerConfig(beta2=0.99, epsilon=1e-8),
    }  # fmt: skip
    options |= {name: rest.pop(name) for name in list(rest) if name in options}
    distributed = rest.pop("distributed_config", None)
    if distributed is not None:
        options["distributed_config"] = distributed
    if issubclass(kind, peer.RootInvShampooPreconditionerConfig):
        rest = {"inv_factor_matrix_dtype": dtype} | rest
    rest = {"factor_matrix_dtype": dtype} | rest
    preconditioner = kind(amortized_computation_config=config, **rest)
    return lambda parameters: peer.DistributedShampoo(
        parameters, preconditioner_config=preconditioner, **options
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("config", [EIGEN, AFTER, NEWTON, HIGHER, RELATIVE], ids=[
    "eigen", "eigen-after", "newton", "higher-order", "higher-order-relative"])  # fmt: skip
def test_parameters_agree(model, config):
    check_agreement(ours.INTEGRATION, maker(config), model, torch.float64)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("epsilon", [1e-6, 1e-12])
def test_parameters_agree_in_float32(model, epsilon):
    make = maker(dtype=torch.float32, epsilon=epsilon)
    check_agreement(ours.INTEGRATION, make, model, torch.float32)


def check(make, model="mlp"):
    """As check_agreement in float64; where a null space is all that is left of the factors, the
    peer amplifies its own rounding, and that is the measure."""
    alone, _ = run(make, model, torch.float64)
    on_kernels, _ = run(make, model, torch.float64, within=ours.enable)
    nudged, _ = run(make, model, torch.float64, nudge=1)
    allowed = max(1e-9, 5 * distance(nudged, alone, model))
    assert distance(on_kernels, alone, model) <= allowed


KL = peer.RootInvKLShampooPreconditionerConfig
PLAIN = peer.RootInvShampooPreconditionerConfig
EIGENDECOMPOSED = peer.EigendecomposedShampooPreconditionerConfig
CORRECTED = peer.EigenvalueCorrectedShampooPreconditionerConfig


@pytest.mark.parametrize(
    "options",
    [
        {"kind": KL},
        {"use_symmetric_packing": False},
        {"use_trace_scaling": True},
        {"use_trace_scaling": True, "trace_scaling_exponent": 0.25},
        {"inverse_exponent_override": {2: {0: 0.5, 1: 0.5}, 1: 1.0, 4: {0: 0.0}}},
        {"inverse_exponent_override": {2: 0.3}},  # a root that no iteration has
        {"drop_weighting_factor_on_gsquare": True},
        {"betas": (0.9, 1.0)},
        {"epsilon": 1e-12},
        {"kind": EIGENDECOMPOSED, "config": types.EighEigendecompositionConfig()},
        {"kind": CORRECTED, "config": types.EighEigendecompositionConfig()},
        {"kind": CORRECTED, "config": types.QREigendecompositionConfig()},
    ],
    ids=str,
)
def test_every_option_agrees(options):
    check(maker(**options), "conv" if "inverse_exponent_override" in options else "mlp")


@pytest.mark.parametrize("kind", [PLAIN, EIGENDECOMPOSED, CORRECTED])
@pytest.mark.parametrize("packed", [True, False])
def test_factors_agree(kind, packed):
    """After the same gradients, of every order and with a dimension left out."""
    config = EIGEN if kind is PLAIN else types.EighEigendecompositionConfig()
    rest = {"ignored_basis_change_dims": {3: [1]}} if kind is CORRECTED else {
        "inverse_exponent_override": {3: {1: 0.0}}}  # fmt: skip
    make = maker(config, kind, use_symmetric_packing=packed, max_preconditioner_dim=64, **rest)

    def factors(enabled):
        generator = torch.Generator().manual_seed(3)
        shapes = [(7,), (5, 9), (9, 5), (5, 9), (4, 3, 6), (2, 3, 4, 5), ()]
        parameters = [torch.zeros(s, dtype=torch.float64, requires_grad=True) for s in shapes]
        with ours.enable() if enabled else contextlib.nullcontext():
            optimizer = make(parameters)
            for _ in range(3):
                for p in parameters:
                    p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                parameters[1].grad = None  # a block without a gradient is left out
                optimizer.step()
        blocks = [b["shampoo"] for p in parameters for b in optimizer.state[p].values()
                  if isinstance(b, dict)]  # fmt: skip
        return [factor for block in blocks for factor in block.factor_matrices]

    for found, expected in zip(factors(True), factors(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14 * 3 * 60)


def test_the_pseudo_inverse_agrees():
    stability = types.PseudoInverseConfig(rank_rtol=1e-6)
    config = types.EigenConfig(rank_deficient_stability_config=stability)
    check(maker(config, epsilon=0.0))


def test_forty_roots_are_four_calls(monkeypatch):
    def counted(owner, name):
        function, calls = getattr(owner, name), []

        @functools.wraps(function)
        def count(*args, **options):
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(owner, name, count)
        return calls

    calls, single = counted(ours, "inverse_root"), counted(lists, "matrix_inverse_root")
    make = maker(precondition_frequency=1, start_preconditioning_step=1)

    def step():
        generator = torch.Generator().manual_seed(0)
        sizes = (24, 40, 40, 40, 24)
        model = torch.nn.Sequential(*map(torch.nn.Linear, sizes, sizes[1:])).double()
        optimizer = make(list(model.parameters()))
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()

    step()
    alone = len(single)
    with ours.enable():
        step()
    assert (alone, len(single) - alone, len(calls)) == (40, 0, 4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the peer's collective
def test_one_process_of_a_distributed_run(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        check(maker(distributed_config=peer.DDPDistributedConfig()))
    finally:
        torch.distributed.destroy_process_group()


def rank(index, folder, enabled):
    """One of two processes, between which the peer shares out the blocks."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store-{enabled}", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=index, world_size=2)
    make = maker(distributed_config=peer.DDPDistributedConfig())
    within = ours.enable if enabled else contextlib.nullcontext
    parameters, _ = run(make, "mlp", torch.float64, within=within)
    torch.save(parameters, f"{folder}/{enabled}-{index}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    for enabled in (False, True):
        torch.multiprocessing.spawn(rank, (str(tmp_path), enabled), nprocs=2)
    alone, *found = (torch.load(tmp_path / f"{run}.pt") for run in ("False-0", "True-0", "True-1"))
    for parameters in found:
        assert distance(parameters, alone, "mlp") <= 1e-9


def test_the_state_is_the_peers_and_goes_on_from_either():
    check_state(ours.INTEGRATION, maker(), "mlp")


# Failures


def outcome(make, spoil, steps=12):
    """(step, exception) at which a run ends; spoil(parameters, k) changes gradients."""
    model, loss = task("mlp", torch.float32)
    optimizer = make(list(model.parameters()))
    for k in range(steps):
        optimizer.zero_grad()
        loss(k).backward()
        spoil(list(model.parameters()), k)
        try:
            optimizer.step()
        except Exception as error:
            return k, type(error).__name__
    return steps, None


def nan_at_five(parameters, k):
    if k == 5:
        parameters[2].grad[3, 3] = torch.nan


def no_gradient_of_one(parameters, k):
    parameters[2].grad.zero_()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "spoil", "expected"),
    [
        (EIGEN, nan_at_five, "PreconditionerValueError"),
        # an all-zero factor has no inverse root: tolerated three times in a row
        (types.CoupledHigherOrderConfig(rel_epsilon=0.0, abs_epsilon=0.0), no_gradient_of_one,
         "ValueError"),
        # a factor of rank one and 1e-12: the peer's iteration overflows
        (types.CoupledNewtonConfig(), lambda *_: None, "PreconditionerValueError"),
    ],
    ids=["nan", "tolerated", "overflow"],
)  # fmt: skip
def test_failures_are_the_peers(config, spoil, expected):
    frequency = {"precondition_frequency": 1, "start_preconditioning_step": 1, "epsilon": 1e-12}
    make = maker(config, dtype=torch.float32, **frequency)
    alone = outcome(make, spoil)
    with ours.enable():
        on_kernels = outcome(make, spoil)
    assert alone == on_kernels
    assert alone[1] == expected
    if expected == "ValueError":
        assert alone[0] == 3


@pytest.mark.filterwarnings("ignore")
def test_failures_of_the_kernel_config_are_counted_as_the_peers():
    """Three refreshes in a row keep the old root of what does not converge, the fourth raises."""
    often = {"precondition_frequency": 1, "start_preconditioning_step": 1}
    narrow = kernel_config(method="newton", ridge=0.0, design_floor=0.1)
    with ours.enable():
        for config, expected in ((narrow, (3, "ValueError")), (kernel_config(), (12, None))):
            assert outcome(maker(config, dtype=torch.float32, **often), lambda *_: None) == expected


def test_a_success_resets_the_count_of_failures(monkeypatch):
    refresh, counts = ours._refresh, []

    def after_three(blocks, bias_correction):
        for block in blocks:
            block._failed_amortized_computation_counter = 3
        refresh(blocks, bias_correction)
        counts.extend(block._failed_amortized_computation_counter for block in blocks)

    monkeypatch.setattr(ours, "_refresh", after_three)
    run(maker(), "mlp", torch.float64, within=ours.enable, steps=range(6))
    assert counts
    assert not any(counts)


# The accumulation


def test_bfloat16_gradients_are_summed_in_float32():
    def factors(enabled):
        # A product of two bfloat16 numbers is exact in float32, and the peer rounds sums to 16 bits
        parameter = torch.zeros(8, 16, dtype=torch.bfloat16, requires_grad=True)
        make = maker(dtype=torch.float32, betas=(0.9, 1.0))
        with ours.enable() if enabled else contextlib.nullcontext():
            optimizer = make([parameter])
            parameter.grad = gradient.clone()
            optimizer.step()
        block = next(iter(optimizer.state[parameter].values()))["shampoo"]
        return block.factor_matrices[0].double()

    gradient = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    full = gradient.double() @ gradient.double().mT
    truth = full[*torch.triu_indices(8, 8)]
    assert (factors(True) - truth).abs().max() <= 16 * 2.0**-24 * truth.abs().max()
    assert (factors(False) - truth).abs().max() > 1e-4 * truth.abs().max()


# Roots of single matrices, and the config of our own


def kernel_config(**options):
    return ours.KernelRootInvConfig(**options)


def spectrum(n, condition, seed=0):
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return Q * torch.logspace(0, -condition, n, dtype=torch.float64) @ Q.mT


def truth(A, root, shift):
    """Of the damped matrix as float32 holds it: its rounding is nobody's method's."""
    values, vectors = torch.linalg.eigh((A + shift * torch.eye(len(A))).double())
    return vectors * values ** (-1 / float(root)) @ vectors.mT


def tridiagonal(n, alpha, beta, ends):
    A = torch.diag(torch.full((n,), alpha))
    A += torch.diag(torch.full((n - 1,), beta), 1) + torch.diag(torch.full((n - 1,), beta), -1)
    A[0, 0] += beta if ends else -beta
    A[-1, -1] += beta if ends else 0
    return A


@pytest.mark.parametrize("config", [EIGEN, types.CoupledNewtonConfig(), HIGHER], ids=str)
@pytest.mark.parametrize("root", [2, 4])
@pytest.mark.parametrize("condition", [2, 4, 5])
def test_roots_are_as_close_to_the_truth_as_the_peers(config, root, condition):
    A = torch.stack([spectrum(32, condition, seed) for seed in range(4)]).float()
    epsilon = 0.0 if config is HIGHER else 1e-6
    shift = 1e-6
    call = ours._call(config, Fraction(root), epsilon, A.dtype, 32)
    found, solved = ours._root(A, Fraction(root), call)
    assert solved.all()
    theirs = torch.stack(
        [matrix_functions.matrix_inverse_root(a, Fraction(root), config, epsilon) for a in A]
    )
    exact = torch.stack([truth(a, root, shift) for a in A])
    errors = [((x - exact).norm() / exact.norm()).item() for x in (found.double(), theirs.double())]
    # Below the error model either may be lucky; above it, a LAPACK of the same name differs a bit.
    assert errors[0] <= max(1.01 * errors[1], 4 * 2.0**-24 * 10 ** (condition / 2) * 32**0.5)


EASY = [
    (torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([1.0, 0.5])), 2),
    (torch.tensor([[1195.0, -944, -224], [-944, 746, 177], [-224, 177, 42]]),
     torch.tensor([[1.0, 1, 1], [1, 2, -3], [1, -3, 18]]), 2),
]  # fmt: skip


@pytest.mark.parametrize(("A", "expected", "root"), EASY, ids=["diagonal", "3x3"])
@pytest.mark.parametrize("power", [1, 2])
def test_known_roots(A, expected, root, power):
    with ours.enable():
        found = lists.matrix_inverse_root(
            A, Fraction(root, power), kernel_config(ridge=0.0, method="eigh")
        )
    torch.testing.assert_close(
        found, torch.linalg.matrix_power(expected, power), rtol=1e-2, atol=0.05
    )


REPLACED = {"eigen": EIGEN, "newton": types.CoupledNewtonConfig(), "higher": HIGHER}


def in_one_call(A, root, config, epsilon=0.0):
    """What blocks of one size get in place of the peer's own function: (roots, solved)."""
    call = ours._call(config, Fraction(root), epsilon, A.dtype, A.shape[-1])
    return ours._root(A, Fraction(root), call)


@pytest.mark.parametrize("config", REPLACED)
def test_known_roots_in_place_of_the_peers(config):
    for A, expected, root in EASY:
        (found,), solved = in_one_call(A[None], root, REPLACED[config])
        assert solved or config != "eigen"  # iterations leave the second, near 1e6, to the peer
        if solved:
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=0.05)
    assert in_one_call(EASY[0][0][None], 2, REPLACED[config])[1]


@pytest.mark.parametrize("config", ["eigen", "newton"])
@pytest.mark.parametrize("n", [10, 100])
@pytest.mark.parametrize("root", [1, 2, 4, 8])
def test_identity_and_tridiagonal_in_place_of_the_peers(n, root, config):
    """All sizes and ratios in one call; only the singular limit may be left to the peer."""
    sizes = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
    pairs = [(a, b) for a in sizes for b in sizes if 2 * b <= a]
    A = torch.stack(
        [torch.eye(n)] + [tridiagonal(n, *pair, ends) for pair in pairs for ends in (True, False)]
    )
    found, solved = in_one_call(A, root, REPLACED[config])
    assert (solved | (torch.linalg.cond(A.double()) > 1e4)).all()
    again = torch.linalg.inv(torch.linalg.matrix_power(found.double(), root))
    scale = torch.linalg.matrix_norm(A, torch.inf).clamp(min=1.0)
    errors = (again - A).abs().amax((1, 2)) / scale
    assert (errors[solved] <= 1e-4).all()
    assert (found[0] - torch.eye(n)).abs().max() < 1e-6


@pytest.mark.parametrize("n", [10, 100])
@pytest.mark.parametrize("root", [1, 2, 4, 8])
@pytest.mark.parametrize("method", ["newton", "eigh"])
def test_the_identity(n, root, method):
    with ours.enable():
        found = matrix_functions.matrix_inverse_root(
            torch.eye(n), Fraction(root), kernel_config(ridge=1e-7, method=method)
        )
    assert (found - torch.eye(n)).abs().max() < 1e-6


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("n", [10, 100])
@pytest.mark.parametrize("root", [1, 2, 4])
def test_tridiagonal_matrices(n, ends, root):
    """X^(-root) is A again, for the sizes and ratios of the peer's tests, its limit included."""
    sizes = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
    with ours.enable():
        for alpha, beta in ((a, b) for a in sizes for b in sizes if 2 * b <= a):
            A = tridiagonal(n, alpha, beta, ends)
            X = matrix_functions.matrix_inverse_root(
                A, Fraction(root), kernel_config(ridge=0.0, method="eigh")
            ).double()
            again = torch.linalg.inv(torch.linalg.matrix_power(X, root))
            scale = max(1.0, torch.linalg.matrix_norm(A, torch.inf).item())
            assert torch.linalg.matrix_norm(again - A, torch.inf) <= 1e-4 * scale


def test_what_the_kernel_config_refuses():
    config = kernel_config()
    with ours.enable():
        for A, root, error in (
            (torch.ones(2), 2, ValueError),
            (torch.ones(2, 3), 2, ValueError),
            (torch.eye(2), -2, ValueError),
            (torch.full((2, 2), torch.inf), 2, ArithmeticError),
            (torch.zeros(2, 2), 2, ArithmeticError),
            (-torch.eye(2), 2, ArithmeticError),
        ):
            with pytest.raises(error):
                matrix_functions.matrix_inverse_root(A, Fraction(root), config)


@pytest.mark.parametrize("kind", [PLAIN, KL])
def test_the_kernel_config_trains_where_float32_is_rank_deficient(kind):
    config = kernel_config(ridge=1e-6)
    make = maker(config, kind, torch.float32, epsilon=1e-12)
    found, optimizer = run(make, "mlp", torch.float32, within=ours.enable)
    again = pickle.loads(pickle.dumps(optimizer.param_groups[0]["preconditioner_config"]))
    assert again.amortized_computation_config == config
    wide = maker(config, kind, torch.float64, epsilon=1e-12)
    exact, _ = run(wide, "mlp", torch.float64, within=ours.enable)
    with ours.enable():
        allowed = tolerance(make, "mlp", torch.float32, found)
    assert distance(found, exact, "mlp") <= allowed


# Switching


def namespace():
    owners = [lists, matrix_functions, lists.BaseShampooPreconditionerList,
              lists.RootInvShampooPreconditionerList]  # fmt: skip
    return [dict(vars(owner)) for owner in owners]


def test_switched_off_nothing_is_left():
    before = namespace()
    with ours.enable(), ours.enable():
        assert namespace() != before
    assert namespace() == before
    with pytest.raises(NotImplementedError):
        matrix_functions.matrix_inverse_root(torch.eye(2), Fraction(2), kernel_config())


@pytest.mark.parametrize("what", ["field", "signature", "name"])
def test_another_version_is_refused(monkeypatch, what):
    before = namespace()
    with monkeypatch.context() as patch:
        if what == "field":
            block = dataclasses.make_dataclass("Block", ["factor_matrices"])
            patch.setattr(lists, "RootInvShampooKroneckerFactorsUnwrapped", block)
        elif what == "signature":
            patch.setattr(lists, "matrix_inverse_root", lambda A, p: A)
        else:
            patch.delattr(lists.BaseShampooPreconditionerList, "_update_factor_matrices")
        with pytest.raises(UnsupportedPeer, match=r"^distributed_shampoo: "):
            ours.enable()
    assert namespace() == before
