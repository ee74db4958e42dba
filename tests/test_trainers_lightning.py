"""Shampoo in Lightning's Trainer: it clips, schedules, saves and resumes it."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # theirs are not ours
]
lightning = pytest.importorskip("lightning", reason="needs lightning: make test-all")

from shampoo_kernels import Shampoo, split_params  # noqa: E402


class Digits(lightning.LightningModule):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 24),
            torch.nn.Tanh(), torch.nn.Linear(24, 10),
        )  # fmt: skip
        self.options = options
        self.losses, self.norms, self.rates = [], [], []

    def training_step(self, batch, _):
        images, labels = batch
        loss = torch.nn.functional.cross_entropy(self.net(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = Shampoo(
            split_params(self.net), lr=0.02, block_size=32, refresh_every=2, **self.options
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def optimizer_step(self, epoch, batch, optimizer, closure):
        """As a user overrides it: the closure computes, and clips, in the optimizer's step."""
        super().optimizer_step(epoch, batch, optimizer, closure)
        self.norms.append(torch.nn.utils.get_total_norm(p.grad for p in self.parameters()).item())
        self.rates.append(optimizer.param_groups[0]["lr"])


def batches():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(24, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (24,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=8)  # three steps an epoch


def trained(folder, epochs, resume=None, precision="32-true", **options):
    """Three steps an epoch, each saved at its end; with max_steps Lightning repeats a batch."""
    model = Digits(**options)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, filename="{step}", save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, gradient_clip_val=0.5, precision=precision,
        callbacks=[saving], logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, batches(), ckpt_path=resume, weights_only=True)
    assert trainer.global_step == 3 * epochs
    return trainer, model


@pytest.mark.parametrize("options", [{}, {"application": "soap", "graft": None}], ids=str)
def test_three_steps_are_saved_and_resumed_to_the_same_bits(tmp_path, options):
    whole, model = trained(tmp_path, 2, **options)
    assert torch.tensor(model.losses).isfinite().all()
    assert max(model.norms) <= 0.5 * (1 + 1e-5)
    assert len(set(model.rates)) == 6

    checkpoint = tmp_path / "step=3.ckpt"
    again, resumed = trained(tmp_path / "again", 2, resume=checkpoint, **options)
    assert resumed.losses == model.losses[3:]
    assert resumed.rates == model.rates[3:]
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    states = [trainer.optimizers[0].state_dict() for trainer in (whole, again)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for key, state in states[0]["state"].items():
        assert state.keys() == states[1]["state"][key].keys()
        assert all(torch.equal(x, states[1]["state"][key][name]) for name, x in state.items())


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_of_the_trainer(tmp_path, precision):
    _, model = trained(tmp_path, 1, precision=precision)
    assert torch.tensor(model.losses).isfinite().all()
    assert len(model.losses) == 3
