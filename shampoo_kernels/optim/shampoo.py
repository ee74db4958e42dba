"""Shampoo as a torch.optim optimizer: it gathers state; the work is in update.py."""

from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from shampoo_kernels.optim import metrics, options, plans, saving, turns
from shampoo_kernels.optim.distributed.team import Share, agree, description, shares
from shampoo_kernels.optim.plan import Plan, check_gradients, check_states, members

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shampoo(torch.optim.Optimizer):
    """Shampoo as the square of the original: W <- W - lr * tr(L)^(1/p) L^(-1/p) M R^(-1/p).

    L and R are running averages of G Gᵀ and Gᵀ G over blocks of every weight matrix, M Nesterov's
    momentum. With graft="adam" every block's update takes the norm of Adam's own with that
    momentum, so that AdamW's learning rate is where to start; the best one was 0.7 times AdamW's on
    a GPT, and 16 to 45 times on a ResNet (others of the kind: 23 to 32; bench/results/training).
    Parameters without a factor (vectors, scalars, and groups with precondition=False) run AdamW
    itself, so one optimizer covers a model; `split_params` makes the groups. Every option can be
    set per param group. Moments, statistics and roots are float32, float64 for float64 parameters.

    Args:
        params: parameters, named parameters or param groups, as in torch.optim.
        lr: learning rate; a number, or a tensor of one element.
        betas: decay of the momentum, and of the squared gradients.
        eps: added to the root of the squared gradients.
        weight_decay: W is multiplied by 1 - lr * weight_decay, as in AdamW; see also
            decoupled_weight_decay.
        shampoo_beta: decay of L and R; 1: they are sums, as in Adagrad.
        p: the root, a number or (left, right); None on a side: no factor there. 2 is the paper's,
            4 the original Shampoo, 1 the Hessian view.
        ridge: L + ridge * eigenvalue_bound(L) * I is what gets inverted, and R likewise. Smaller
            ones amplify directions that have hardly been seen, which costs the first steps most,
            and cost more iterations: p = 2 takes 15 products at 3e-4, 16 at 1e-4, 23 at 1e-6.
        statistic: what L and R are averages of: "shampoo", "frobenius" or "kl", see
            `statistics.update_`. "kl" needs p = 2.
        graft: the method whose norm a block's update takes: "adam", "rmsprop", "adagrad" or "sgd",
            of the same momentum, see `ops.moments.Rule`; parameters without a factor run it. None:
            the update's own scale, and AdamW where there is no factor.
        block_size: longer sides are split into blocks of at most this length.
        max_dimension: a side longer than this has no factor and is not split.
        refresh_every: the roots of a block are computed anew every so many steps; in each step
            those of every so many-th block are. A late parameter moves the turns of later blocks:
            once, up to twice as many steps pass between two roots.
        start_step: the first step that is preconditioned; before it the graft alone is used.
        root_method, precision: as in `inverse_root`; "auto" is the fastest.
        nesterov: the momentum of blocks with a factor looks ahead by one gradient, in the graft's
            norm too. Without it our runs took about a tenth more steps to the same loss.
        maximize: ascend.
        capturable: keep `step` on the device, as in torch.optim; for parameters on an accelerator.
        root_dtype: dtype in which the roots are kept, torch.float64, float32 or bfloat16; None is
            that of the statistics.
        precondition: False runs the graft alone: AdamW.
        process_group: the processes that hold the same parameters and gradients (as under
            DistributedDataParallel) and share the blocks out among themselves; None: every process
            works for itself, whether torch.distributed is initialised or not, since equal shapes do
            not mean equal models. DTensors (fully_shard) are shared out over their own mesh.
        application: "root", or "soap": Adam in the eigenbasis of L and R, see
            `eigenbasis.direction`; with graft=None and p = 2 (None on a side: no basis there).
        scale: of the roots: "trace", "least_squares" or None, see `factors.refresh_roots_`.
        rank_rtol: eigenvalues <= rank_rtol * the largest count as zero: roots of the
            pseudo-inverse, by eigh.
        basis_method: how "soap" refreshes a basis: a step of "orthogonal_iteration" from the last
            one, or "eigh".
        refresh: "staggered": as many blocks in every step. "level": as much work, a block taken as
            m³ + n³. "together": all in one step.
        refresh_tolerance: None, or a number below 1: a block whose turn it is keeps its root or
            basis where that still fits L and R up to this much: ‖X^(p/2) L X^(p/2) - I‖ / sqrt(m)
            for a root X, the share of QᵀLQ outside of its diagonal for a basis Q. It spares work on
            a CPU; elsewhere, where choosing would mean waiting, it only keeps.
        decoupled_weight_decay: False adds weight_decay * W to the gradient instead.
        max_update_rms: the largest root mean square of the update of a block with a factor, before
            the learning rate.
        split: a number of equal pieces, of the rows or (rows, columns), into which a matrix is cut
            before blocks are: 3 for a fused query, key and value, 3 * heads for each head, the
            number of groups for a grouped convolution.
        batch_dims: so many leading dimensions count matrices: 1 for a stack of experts.

    A block with a gradient that is not finite (or whose squares overflow) stands still: weights,
    moments, statistics, roots and its step count keep their values. A parameter without gradient
    (late, or missing in some steps) is not touched. A block without a root yet, because its
    gradients were zero, say, takes the graft alone; it gets its root in the first step that has
    something to compute it from, on a GPU when its turn comes. With graft=None it waits for it.
    Tensors with dimensions beyond two are seen as first x all others.

    With many processes a block belongs to the rank that has least to do (the dearest come first).
    It alone has statistics and roots, steps the block, and sends the new weights to the others:
    copies are equal to the bit. Moments are where the parameter is: whole on every rank, or a
    DTensor like it. The owner's gradient counts: where it has none the block stands still. A block
    of a DTensor moves only when every rank with rows of it has a gradient. All ranks must have the
    same param groups and call step() alike. Every rank's state_dict() holds its own blocks;
    torch.distributed.checkpoint takes the state to any number of ranks.

    Raises:
        ValueError: an option that is not allowed, at construction, in add_param_group and, if it
            was changed, at a step; process_group with DTensors; the state of other ranks' blocks;
        RuntimeError: sparse gradients, parameters that are not real and floating, capturable=True
            without an accelerator, DTensors in other placements than fully_shard's, or param groups
            that differ between the ranks (on all of them), at a step. A step that raises changes
            nothing.

    Sources: Gupta, Koren, Singer 2018 (arXiv 1802.09568); Morwani et al. 2024 (arXiv 2406.17748),
    H ≈ L ⊗ R / tr L; grafting: Anil et al. 2020 (arXiv 2002.09018); AdamW: arXiv 1711.05101; SOAP:
    arXiv 2409.11321; KL-Shampoo: arXiv 2509.03378; update clipping: arXiv 1804.04235.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        shampoo_beta: float = 0.95,
        p: float | tuple[float | None, float | None] = 2,
        ridge: float = 2e-4,
        statistic: str = "shampoo",
        graft: str | None = "adam",
        block_size: int = 1024,
        max_dimension: int = 8192,
        refresh_every: int = 10,
        start_step: int = 1,
        root_method: str = "auto",
        precision: str = "highest",
        nesterov: bool = True,
        maximize: bool = False,
        capturable: bool = False,
        root_dtype: torch.dtype | None = None,
        precondition: bool = True,
        process_group: "ProcessGroup | None" = None,
        application: str = "root",
        scale: str | None = "trace",
        rank_rtol: float | None = None,
        basis_method: str = "orthogonal_iteration",
        refresh: str = "staggered",
        refresh_tolerance: float | None = None,
        decoupled_weight_decay: bool = True,
        max_update_rms: float | None = None,
        split: int | tuple[int, int] = 1,
        batch_dims: int = 0,
    ) -> None:
        defaults = options.checked(dict(locals()))
        self._plans: dict[int, Plan] = {}
        self._checked: dict[int, tuple] = {}
        self._shares: dict[int, Share] = {}
        self._agreed: dict[int, tuple] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, whose options are checked before anything is changed."""
        if isinstance(param_group, dict):
            param_group = {**param_group, **options.checked({**self.defaults, **param_group})}
        super().add_param_group({**param_group, "version": saving.VERSION})

    def __getstate__(self) -> dict:
        """As in torch.optim, with copies of the tensors: a view would take its stack along.

        Process groups stay behind: they can be neither copied nor pickled.
        """
        state, alone = super().__getstate__(), {"process_group": None}
        return {
            "defaults": {**state["defaults"], **alone},
            "state": defaultdict(dict, saving.cloned(state["state"])),
            "param_groups": [{**group, **alone} for group in state["param_groups"]],
        }

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._plans, self._checked, self._shares, self._agreed = {}, {}, {}, {}
        self.defaults = {**options.ADDED, **self.defaults}
        for group in self.param_groups:
            for name in options.NAMES:
                group.setdefault(name, self.defaults[name])
            if group.get("version") in saving.OLD_VERSIONS:
                for parameter in self.state.keys() & set(group["params"]):
                    self.state[parameter] = saving.upgraded(self.state[parameter])
                group["version"] = saving.VERSION

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step; `closure` computes the loss again and returns it.

        Raises:
            ValueError: an option that was changed to one that is not allowed, or that does not
                fit the state;
            RuntimeError: gradients or parameters that are not supported. Nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_options()
        for group in self.param_groups:
            check_gradients(group)
        self._make_plans()
        plans = [self._plans[number] for number in range(len(self.param_groups))]
        turns.place_([plan.stacks for plan in plans], self.param_groups)
        with _without_autocast({stack.device.type for plan in plans for stack in plan.stacks}):
            for plan, group in zip(plans, self.param_groups, strict=True):
                plan.step_(group)
        return loss

    def metrics(self) -> dict[str, Tensor]:
        """What became of the blocks of this process: see `metrics.metrics`; all 0 before a step.

        Tensors () on the device of the blocks: nothing waits until they are read. Roots computed
        before loading, copying or a late parameter are counted again with their next refresh.
        """
        plans = self._plans.values()
        return metrics.metrics((stack, plan.steps) for plan in plans for stack in plan.stacks)

    def state_dict(self) -> dict:
        """As in torch.optim, except that the tensors are copies: a snapshot.

        Where ranks share the blocks it is the part of this one, and rank 0 warns of that.
        """
        saving.warn_of_other_ranks(self._shares.values())
        with saving.copying_tensors(self):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch.optim, except that floating state keeps the dtype in which it was saved.

        Raises:
            ValueError: a state dict that does not fit these parameters; nothing is changed then.
        """
        with saving.keeping_dtypes(self):
            super().load_state_dict(state_dict)

    def _check_options(self) -> None:
        """Check all groups, the options that rarely change only if they did."""
        changed = {
            number: options.checked(group)
            for number, group in enumerate(self.param_groups)
            if options.fingerprint(group) != self._checked.get(number)
        }
        rates = [options.learning_rate(group["lr"]) for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        for number, plain in changed.items():
            self.param_groups[number].update(plain)
            self._checked[number] = options.fingerprint(self.param_groups[number])

    def _make_plans(self) -> None:
        """How to step each group, anew when it or its state are no longer what they were."""
        self._shares = shares(self.param_groups, self._shares)
        stale = {
            number: group
            for number, group in enumerate(self.param_groups)
            if number not in self._plans
            or not self._plans[number].fits(group, self.state, self._shares.get(number))
        }
        for number in stale:
            self._agree(number)
        for number, group in stale.items():
            check_states(group, self.state, self._shares.get(number))
        for number, group in stale.items():
            self._plans[number] = plans.make(group, self.state, self._shares.get(number))
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            for number, group in enumerate(self.param_groups):
                self._plans[number].check_capture(group)

    def _agree(self, number: int) -> None:
        """Let the ranks that share a group see that it is the same, at first and after changes."""
        share = self._shares.get(number)
        if share is None:
            return
        own = members(self.param_groups[number], self.state, share)
        now = (share.signature, *map(id, own))
        if now != self._agreed.get(number):
            agree(share.team, number, description(number, self.param_groups, own))
            self._agreed[number] = now


def _without_autocast(devices: Collection[str]) -> ExitStack:
    """Products of a step are as precise as `precision` says, also where autocast is on."""
    entered = ExitStack()
    for device in devices:
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            entered.enter_context(torch.autocast(device, enabled=False))
    return entered
