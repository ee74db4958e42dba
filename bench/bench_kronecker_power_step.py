"""kronecker_power_step against the two einsums that its formula is."""

import torch

from shampoo_kernels import kronecker_power_step


def bench_kronecker_power_step(versus):
    samples, m, n = 128, 128, 256
    grads = torch.randn(samples, m, n)
    left, right = torch.eye(m), torch.eye(n)

    def einsums(grads=grads, left=left, right=right):
        new_left = torch.einsum("bij,jk,blk->il", grads, right, grads) / samples
        new_right = torch.einsum("bji,jk,bkl->il", grads, left, grads) / samples
        return new_left / right.square().sum(), new_right / left.square().sum()

    exact = einsums(grads.double(), left.double(), right.double())[0]
    versus(
        lambda: kronecker_power_step(grads, left, right),
        {"einsum": einsums},
        case=f"{samples} samples of {m} x {n}",
        errors={
            "ours": (kronecker_power_step(grads, left, right)[0] - exact).norm() / exact.norm(),
            "einsum": (einsums()[0] - exact).norm() / exact.norm(),
        },
    )
