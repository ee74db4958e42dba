"""Which kind of plan a param group gets."""

from collections.abc import Mapping

from torch import Tensor

from shampoo_kernels.optim.distributed.replicas import ReplicaPlan
from shampoo_kernels.optim.distributed.shards import ShardPlan
from shampoo_kernels.optim.distributed.team import Share
from shampoo_kernels.optim.plan import Plan


def make(group: dict, states: Mapping[Tensor, dict], share: Share | None) -> Plan:
    """For one process alone, for one of those that hold all the same, or some rows each."""
    if share is None:
        return Plan(group, states)
    return (ShardPlan if share.team.sharded else ReplicaPlan)(group, states, share)
