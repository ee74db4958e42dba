"""Every config of Distributed Shampoo's: what the kernels do for it, and that it ends where it does
without them."""

import collections
import contextlib
import math
from unittest import mock

import pytest
import torch
from meta_shampoo import (
    AFTER,
    CORRECTED,
    EIGEN,
    EIGENDECOMPOSED,
    EIGENDECOMPOSED_KL,
    EIGH,
    FULL_RANK,
    HIGHER,
    KL,
    LARGER,
    NEWTON,
    PLAIN,
    QR,
    RELATIVE,
    check,
    kernel_config,
    lists,
    maker,
    matrix_functions,
    ours,
    peer,
    types,
)
from peers import distance, run

from shampoo_kernels.integrations import _distributed_shampoo_config as configs
from shampoo_kernels.integrations import _distributed_shampoo_factors as factors
from shampoo_kernels.integrations import _distributed_shampoo_updates as updates

OFFLOADED = types.EigenConfig(eigendecomposition_offload_device="cpu")
RELATIVE_RANK, DEFAULT_RANK, ABSOLUTE_RANK = (
    types.EigenConfig(rank_deficient_stability_config=types.PseudoInverseConfig(**options))
    for options in ({"rank_rtol": 1e-6}, {"rank_rtol": None}, {"rank_atol": 1e-9})
)
OFTEN_ENOUGH = types.EighEigendecompositionConfig(tolerance=0.01)
TO_THE_END = types.QREigendecompositionConfig(max_iterations=5, tolerance=0.01)
CORRECTED_EIGH = {"kind": CORRECTED, "config": EIGH} | FULL_RANK
ALL = {"inverse_root", "gram_ema_", "precondition"}
PEERS_ROOT, PEERS_BASIS = {"matrix_inverse_root"}, {"matrix_eigendecomposition"}
FROM_BASIS = {"matrix_inverse_root_from_eigendecomposition"}

# options of `maker`, what of ours serves them, what of the peer's
ROWS = [
    ({"config": EIGEN}, ALL, set()),
    ({"config": AFTER}, ALL, set()),
    ({"config": OFFLOADED}, ALL - {"inverse_root"}, PEERS_ROOT),
    ({"config": RELATIVE_RANK, "epsilon": 0.0}, ALL, set()),
    ({"config": DEFAULT_RANK, "epsilon": 0.0}, ALL, set()),
    ({"config": ABSOLUTE_RANK, "epsilon": 0.0}, ALL - {"inverse_root"}, PEERS_ROOT),
    ({"config": NEWTON}, ALL, set()),
    ({"config": HIGHER}, ALL, set()),
    ({"config": RELATIVE}, ALL, set()),
    ({"config": LARGER}, ALL, set()),
    ({"config": HIGHER, "inverse_exponent_override": {2: 0.4}}, ALL, PEERS_ROOT),
    ({"config": EIGEN, "inverse_exponent_override": {2: 0.3}}, ALL, set()),
    ({"kind": KL}, ALL, set()),
    ({"kind": KL, "config": NEWTON}, ALL, set()),
    ({"kind": EIGENDECOMPOSED, "config": EIGH}, {"gram_ema_"}, PEERS_BASIS | FROM_BASIS),
    ({"kind": EIGENDECOMPOSED, "config": OFTEN_ENOUGH}, {"gram_ema_"}, PEERS_BASIS | FROM_BASIS),
    ({"kind": EIGENDECOMPOSED, "config": QR}, {"gram_ema_"}, PEERS_BASIS | FROM_BASIS),
    ({"kind": EIGENDECOMPOSED_KL, "config": EIGH}, {"gram_ema_", "precondition"},
     PEERS_BASIS | FROM_BASIS),
    ({"kind": CORRECTED, "config": EIGH} | FULL_RANK, {"gram_ema_", "precondition"}, PEERS_BASIS),
    ({"kind": CORRECTED, "config": OFTEN_ENOUGH} | FULL_RANK, {"gram_ema_", "precondition"},
     PEERS_BASIS),
    ({"kind": CORRECTED, "config": QR} | FULL_RANK, {"gram_ema_", "precondition"}, PEERS_BASIS),
    ({"kind": CORRECTED, "config": TO_THE_END} | FULL_RANK, {"gram_ema_", "precondition"},
     PEERS_BASIS),
]  # fmt: skip


@contextlib.contextmanager
def counted():
    """The names of what is called of ours and of the peer's."""
    called = collections.Counter()

    def count(owner, name):
        function = getattr(owner, name)

        def wrapped(*args, **options):
            called[name] += 1
            return function(*args, **options)

        return mock.patch.object(owner, name, wrapped)

    owners = [(configs, "inverse_root"), (factors, "gram_ema_"), (factors, "precondition"),
              (updates, "orthogonalize"), (torch, "tensordot"),
              *((lists, name) for name in PEERS_ROOT | PEERS_BASIS | FROM_BASIS)]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for owner, name in owners:
            stack.enter_context(count(owner, name))
        yield called


def identity(options):
    kind, config = options.get("kind", PLAIN), options.get("config", EIGEN)
    rest = [f"{k}={v}" for k, v in options.items() if k not in ("kind", "config")]
    return "-".join([kind.__name__.removesuffix("PreconditionerConfig"), repr(config), *rest])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("options", "of_ours", "of_the_peers"), ROWS, ids=[
    identity(options) for options, *_ in ROWS])  # fmt: skip
def test_every_config_agrees_and_is_served_as_the_table_says(options, of_ours, of_the_peers):
    make = maker(**options)
    # Five QR steps that meet the peer's tolerance by a hair, or not, part on the other models.
    model = "gpt" if options.get("config") is TO_THE_END else "mlp"
    check(make, model)
    with ours.enable(), counted() as called:
        run(make, model, torch.float64)
    found = {name for name in called if name in ALL}
    assert found == of_ours
    assert set(called) - found - {"tensordot"} == of_the_peers
    # The one product by the peer's own hands: with roots that it makes of eigenvectors.
    assert ("tensordot" in called) == (options.get("kind") in (EIGENDECOMPOSED, EIGENDECOMPOSED_KL))


@pytest.mark.parametrize(
    "options",
    [
        {"use_symmetric_packing": False},
        {"use_trace_scaling": True},
        {"use_trace_scaling": True, "trace_scaling_exponent": 0.25},
        {"use_trace_scaling": True, "epsilon": 10.0},  # the trace counts as epsilon at least
        {"inverse_exponent_override": {2: {0: 0.5, 1: 0.5}, 1: 1.0, 4: {0: 0.0}}},
        {"inverse_exponent_override": {1: 0.0}},  # vectors have no factor
        {"drop_weighting_factor_on_gsquare": True},
        {"betas": (0.9, 1.0)},
        {"epsilon": 1e-10},
        {"start_preconditioning_step": 7},
        {"weight_decay": 0.1, "weight_decay_type": peer.WeightDecayType.L2},
        {"use_bias_correction": False},
        {"iterate_averaging_config": peer.GeneralizedPrimalAveragingConfig(), "betas": (0.0, 0.99)},
        {"grafting_config": None},
        {"grafting_config": peer.SGDPreconditionerConfig()},
        {"kind": KL, "use_trace_scaling": True},
        CORRECTED_EIGH | {"ignored_basis_change_dims": {1: [0], 2: [0]}},
        CORRECTED_EIGH | {"inverse_exponent_override": {2: 0.25}},
        CORRECTED_EIGH | {"drop_weighting_factor_on_gsquare": True},
        CORRECTED_EIGH | {"betas": (0.9, 1.0)},
        CORRECTED_EIGH | {"epsilon": 1e-3},
    ],
    ids=str,
)
def test_every_option_agrees(options):
    check(maker(**options), "conv" if "inverse_exponent_override" in options else "mlp")


def test_the_peers_default_epsilon_agrees_as_far_as_the_peer_with_itself():
    """The null space of vectors' factors is all but undamped then: rounding is multiplied."""
    make = maker(epsilon=1e-12)
    alone, _ = run(make, "mlp", torch.float64)
    nudged, _ = run(make, "mlp", torch.float64, nudge=1)
    on_kernels, _ = run(make, "mlp", torch.float64, within=ours.enable)
    assert distance(on_kernels, alone, "mlp") <= 5 * distance(nudged, alone, "mlp") <= 1e-7


def descent(config):
    """The peer's optimizer with a config that has no factors."""
    distributed = peer.SingleDeviceDistributedConfig(target_parameter_dimensionality=2)

    def make(parameters):
        own = [p for p in parameters if p.ndim > 1]
        return peer.DistributedShampoo(
            own, lr=1e-2, betas=(0.9, 0.99), preconditioner_config=config, epsilon=1e-6,
            max_preconditioner_dim=math.inf, distributed_config=distributed,
        )  # fmt: skip

    return make


def stretched(d_in, d_out):
    return (d_out / d_in) ** 0.5


NEWTON_SCHULZ = types.NewtonSchulzOrthogonalizationConfig
SPECTRAL = peer.SpectralDescentPreconditionerConfig


@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize(("config", "served"), [
    (SPECTRAL(orthogonalization_config=NEWTON_SCHULZ()), True),
    (SPECTRAL(orthogonalization_config=NEWTON_SCHULZ(
        scale_by_dims_fn=stretched, num_iterations=3, coefficients=(3.0, -3.2, 1.2))), True),
    (SPECTRAL(orthogonalization_config=NEWTON_SCHULZ(num_iterations=0)), False),
    (SPECTRAL(orthogonalization_config=types.SVDOrthogonalizationConfig()), False),
    (peer.SignDescentPreconditionerConfig(), False),
    (peer.SGDPreconditionerConfig(), False),
    (peer.shampoo_types.AdaGradPreconditionerConfig(), False),
    (peer.RMSpropPreconditionerConfig(), False),
    (peer.AdamPreconditionerConfig(), False),
], ids=str)  # fmt: skip
def test_configs_without_factors(config, served, model):
    check(descent(config), model)
    with ours.enable(), counted() as called:
        run(descent(config), model, torch.float64)
    assert set(called) == ({"orthogonalize"} if served else set())


@pytest.mark.parametrize("scale", [1e-30, 3e-9, 3e-8, 1.0, 1e12])
def test_spectral_descent_of_small_gradients(scale):
    """The peer divides by the norm or by 1e-8, whichever is larger."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(s, generator=generator, dtype=torch.float64) for s in [(6, 9), (9, 6)]]
    grads = [scale * g / g.norm() for g in (*grads, grads[0] + 1)]
    config = peer.SpectralDescentPreconditionerConfig()
    module = peer.distributed_shampoo
    preconditioner = module.SpectralDescentPreconditionerList(tuple(grads), config)
    expected = preconditioner.precondition(tuple(grads))
    with ours.enable():
        found = preconditioner.precondition(tuple(grads))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12 * float(y.norm()))


def concrete(kind):
    """All classes below that can be made."""
    below = {c for sub in kind.__subclasses__() for c in concrete(sub)}
    abstract = "__init__" not in vars(kind)  # @dataclass(init=False), as the peer marks them
    return below if abstract or kind.__module__.startswith("shampoo_kernels") else below | {kind}


@pytest.mark.parametrize("base", [
    peer.PreconditionerConfig, peer.MatrixFunctionConfig, peer.RankDeficientStabilityConfig,
    peer.DistributedConfig])  # fmt: skip
def test_the_documentation_names_every_config_of_the_peers(base):
    names = {kind.__name__ for kind in concrete(base)}
    assert len(names) > 1
    short = {name.removesuffix("PreconditionerConfig").removesuffix("Config") for name in names}
    missing = {name for name in short if name not in ours.__doc__}
    assert not missing


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled_steps_agree():
    """The peer compiles its step; what is replaced stays out of the graph."""
    compiled = peer.ShampooPT2CompileConfig(backend="eager")
    torch.compiler.reset()
    check(maker(shampoo_pt2_compile_config=compiled))


def test_the_kernel_config_is_the_kernels_alone():
    with ours.enable(), counted() as called:
        run(maker(kernel_config()), "mlp", torch.float64)
    assert set(called) == ALL
    with pytest.raises(NotImplementedError):
        matrix_functions.matrix_inverse_root(torch.eye(2), 2, kernel_config())
