"""The accuracy law of inverse roots in float32, against float64."""

import math

import torch

from shampoo_kernels import eigenvalue_bound

UNIT = 2.0**-24


def truth(A, p, ridge):
    """(root, condition number after the ridge), float64 eigh of A as it is rounded."""
    values, vectors = torch.linalg.eigh(A.double())
    shifted = values.clamp(min=0) + ridge * eigenvalue_bound(A).double()[..., None]
    root = (vectors * shifted.pow(-1 / p)[..., None, :]) @ vectors.mT
    return root, shifted.amax(-1) / shifted.amin(-1)


def float32_eigh_error(A, p, ridge):
    """What float32 eigh makes of it, with the ridge on the matrix or on the eigenvalues: the worst
    of a few rescaled copies, since the error of one small matrix is a matter of luck."""
    worst = torch.zeros(len(A), dtype=torch.float64)
    copies = 40 if A.shape[-1] <= 3 else 4 if A.shape[-1] <= 128 else 1
    for factor in torch.linspace(1.0, 1.95, copies).tolist():
        scaled = A / (A.abs().amax((-2, -1), keepdim=True)) * factor
        expected = truth(scaled, p, ridge)[0]
        shift = ridge * eigenvalue_bound(scaled)[..., None]
        eye = torch.eye(A.shape[-1])
        for matrix, after in ((scaled, shift), (scaled + shift[..., None] * eye, 0)):
            values, vectors = torch.linalg.eigh(matrix)
            powers = (values + after).clamp(min=UNIT).pow(-1 / p)
            root = (vectors * powers[..., None, :]) @ vectors.mT
            worst = torch.maximum(worst, relative(root, expected))
    return worst


# facts of float32 iterations on log-uniform spectra, by schedules made for that condition number:
# relative errors of A^(-1/p), n = 256 and 512. product with p = 4 is known at 1e6 alone, else it
# is at most as p = 2, and so is p = 3; p = 1 is twice p = 2, as an eigenvalue's error over p is.
FIGURES = {
    ("newton", 2): {1e2: 1.7e-6, 1e4: 5.5e-5, 1e6: 3.7e-3},
    ("newton", 4): {1e2: 1.7e-6, 1e4: 3.4e-5, 1e6: 2.1e-3},
    ("product", 2): {1e2: 1.7e-6, 1e3: 1.6e-5, 1e4: 5.5e-5, 1e5: 4.6e-4, 1e6: 3.7e-3},
    ("product", 4): {1e2: 1.7e-6, 1e3: 1.6e-5, 1e4: 5.5e-5, 1e5: 4.6e-4, 1e6: 2.0e-3},
}


def figure(method, p, kappa):
    """FIGURES between its condition numbers, as powers of them."""
    row = FIGURES[method, 4 if p == 4 else 2]
    known, errors = torch.tensor(list(row.items()), dtype=torch.float64).log().T.contiguous()
    x = kappa.log().clamp(known[0], known[-1])
    k = torch.searchsorted(known, x).clamp(1, len(known) - 1)
    slope = (errors[k] - errors[k - 1]) / (known[k] - known[k - 1])
    return (2 if p == 1 else 1) * (errors[k - 1] + slope * (x - known[k - 1])).exp()


def law(A, p, ridge, method, names):
    """Most that a float32 root may be off: 4u sqrt(kappa n), or twice float32 eigh's error; where
    there are FIGURES, an iteration also within 1.5 times those.

    The product form rounds two coupled iterates (sqrt(2)) and squares its p = 2 root for p = 1 (2).

    "condition": FIGURES hold where the schedule is made for that kappa, to a factor of 100. A
    backward error d moves the root of an eigenvalue at 1/kappa by d kappa/p; over a log-uniform
    spectrum the Frobenius norm averages that to 1/sqrt(1 + p) of it, which is given back where
    eigenvalues pile up at the ridge. Beyond the n of the figures rounding grows by sqrt(n). One
    eigenvalue of two or three is luck, so n > 3 only.

    "singular tridiagonal": one eigenvalue lies at the ridge, its vector is constant, and all
    entries of a kind are equal, so that their rounding adds up where others' averages. To scale
    the diagonal (to 1/2) and to add the ridge to it is off by u/4 each, the two sides (1/4)
    by u/8 each: 3/4 u kappa/p (at n = 128, p = 2, ridge 1e-6 these alone make 6.4e-3 of newton's
    9.3e-3). The rest of u kappa/p is the iteration's own, sqrt(1 + p) times its figure.

    "hilbert": most eigenvalues lie at the ridge, which is easy for eigh, while an iteration's own
    rounding counts whatever n is: 1.5 times the figure for p = 2 and kappa = 1e6, in proportion to
    kappa/p.

    Up to n = 3 nothing averages over eigenvalues: there every one of at most 14 steps may commit a
    backward error of 2u.
    """
    _, kappa = truth(A, p, ridge)
    n = A.shape[-1]
    factor = {"product": math.sqrt(2) * (2 if p == 1 else 1)}.get(method, 1.0)
    most = torch.maximum(
        2 * float32_eigh_error(A, p, ridge), 4 * factor * UNIT * (kappa * n).sqrt()
    )
    if n <= 3:
        return torch.maximum(most, (4 + 28 * kappa) * UNIT)
    if method not in ("newton", "product"):
        return most
    cap = 1.5 * figure(method, p, kappa) * max(1, n / 512) ** 0.5
    for i, name in enumerate(names):
        if name.startswith("condition") and p <= 4:
            relative_to_ridge = float(name.split()[1]) * ridge
            piled = math.sqrt(1 + p) if relative_to_ridge > 1.1 else 1
            if relative_to_ridge > 0.009:
                most[i] = torch.minimum(most[i], cap[i] * piled)
        elif name == "singular tridiagonal":
            most[i] = torch.minimum(most[i], factor * UNIT * kappa[i] / p)
        elif name == "hilbert":
            most[i] = torch.maximum(most[i], 1.5 * 3.7e-3 * (kappa[i] / 1e6) * 2 / p)
    return most


def relative(X, Y):
    return (X.double() - Y).flatten(-2).norm(dim=-1) / Y.flatten(-2).norm(dim=-1)
