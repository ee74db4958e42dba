"""The laws of labels and batches: exact expectation, unbiased samples, the identity of batches."""

import pytest
import torch
from dense import mlp, one_by_one, second_moment

from shampoo_kernels.study import measure, sample

F64 = torch.float64
CLOSE = {"rtol": 1e-10, "atol": 1e-11}  # float64 sums of at most 1e4 products of size 1


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_expected_labels_are_the_gauss_newton_matrix(loss):
    """E_x J_xᵀ M J_x with M the Hessian of the loss by the output, J the Jacobian of the output."""
    model, x = mlp(4, 3, 3), torch.randn(8, 4, dtype=F64)
    weight = model[0].weight
    H = torch.zeros(12, 12, dtype=F64)
    for example in x:
        outputs = model(example[None])[0]
        J = one_by_one(model, "0", outputs).mT.reshape(3, 12)  # vec column by column
        p = outputs.detach().softmax(0)
        M = torch.diag(p) - torch.outer(p, p) if loss == "cross_entropy" else torch.eye(3).double()
        H += J.mT @ M @ J / len(x)
    grads = sample(model, x, labels="expected", loss=loss, layers="0")["0"]
    assert grads.count == 24
    torch.testing.assert_close(second_moment(grads.values()), H, **CLOSE)
    assert weight.grad is None


@pytest.mark.parametrize("batch", [1, 4, 32])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_sampled_labels_are_unbiased_at_every_batch_size(batch, loss):
    """B E[G_B G_Bᵀ] = L of Gauss-Newton. The mean of many draws against the truth, entry by entry,
    in standard errors measured from the draws: 5 of them, wrong once in 1e5 for 9 entries."""
    torch.manual_seed(1)
    model, x = mlp(4, 3, 3), torch.randn(40, 4, dtype=F64)
    truth = sample(model, x, labels="expected", loss=loss, layers="0")["0"]
    expected = truth.left(torch.eye(4, dtype=F64)) * truth.scale**2
    batches = 1500
    order = torch.randint(0, 40, (batches * batch,))  # independent examples, as the law asks
    got = sample(
        model, x[order], labels="sampled", loss=loss, layers="0", batch_size=batch,
        generator=torch.Generator().manual_seed(2), chunk=4096,
    )["0"].values()  # fmt: skip
    assert len(got) == batches
    draws = batch * got @ got.mT
    error = draws.std(0) / batches**0.5
    assert bool(((draws.mean(0) - expected).abs() <= 5 * error).all())
    assert float(error.max()) < 0.2 * float(expected.diagonal().max()), "too few draws to tell"


def test_real_labels_are_biased_at_large_batches():
    """The same test sees what it should: with labels that the model does not expect it fails."""
    torch.manual_seed(1)
    model, x = mlp(4, 3, 3), torch.randn(40, 4, dtype=F64)
    y = torch.zeros(40, dtype=torch.int64)
    truth = sample(model, x, labels="expected", layers="0")["0"]
    expected = truth.left(torch.eye(4, dtype=F64)) * truth.scale**2
    order = torch.randint(0, 40, (1500 * 32,))
    got = sample(model, x[order], y[order], layers="0", batch_size=32)["0"].values()
    draws = 32 * got @ got.mT
    assert bool(((draws.mean(0) - expected).abs() > 5 * draws.std(0) / 1500**0.5).any())


@pytest.mark.parametrize("batch", [2, 3])
def test_identity_of_batch_gradients(batch):
    """B E[G_B G_Bᵀ] = E[GGᵀ] + (B-1) E[G] E[G]ᵀ, exactly: every batch of B out of N examples, with
    repetition, is taken once."""
    model, x = mlp(4, 3, 3), torch.randn(5, 4, dtype=F64)
    y = torch.tensor([0, 1, 2, 0, 1])
    G = sample(model, x, y, layers="0")["0"].values()
    order = torch.cartesian_prod(*[torch.arange(5)] * batch).flatten()
    batches = sample(model, x[order], y[order], layers="0", batch_size=batch)["0"].values()
    assert len(batches) == 5**batch
    for g, gb in ((G, batches), (G.mT, batches.mT)):
        expected = (g @ g.mT).mean(0) + (batch - 1) * g.mean(0) @ g.mean(0).mT
        torch.testing.assert_close(batch * (gb @ gb.mT).mean(0), expected, **CLOSE)
    expected = second_moment(G) + (batch - 1) * second_moment(G.mean(0, keepdim=True))
    torch.testing.assert_close(batch * second_moment(batches), expected, **CLOSE)


def test_batches_leave_a_short_rest_out():
    model, x, y = mlp(4, 3), torch.randn(7, 4, dtype=F64), torch.zeros(7, dtype=torch.int64)
    grads = sample(model, x, y, batch_size=3)["0"]
    singles = sample(model, x, y)["0"].values()
    expected = singles[:6].reshape(2, 3, 3, 4).mean(1)
    torch.testing.assert_close(grads.values(), expected, **CLOSE)


@pytest.mark.parametrize("sizes", [(5, 2), (6, 1)])
def test_one_linear_layer_of_a_binary_classifier_is_exactly_kronecker(sizes):
    """(p - e_s) is ±sqrt(..) (1, -1) for both labels: H = E[w aaᵀ] ⊗ (1, -1)(1, -1)ᵀ; and with one
    output, the left factor is a number."""
    model, x = mlp(*sizes), torch.randn(30, sizes[0], dtype=F64)
    loss = "cross_entropy" if sizes[1] > 1 else "squared"
    got = measure(sample(model, x, labels="expected", loss=loss)["0"]).cosines
    assert got["optimal"] == pytest.approx(1, abs=1e-10)
    assert got["shampoo_squared"] == pytest.approx(1, abs=1e-10)
    assert got["shampoo"] < 1 - 1e-3
