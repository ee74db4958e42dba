"""Shampoo in the Trainer of Hugging Face: it clips, schedules, saves and resumes it."""

import os

import pytest
import torch
from torch.utils.data import Dataset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # theirs are not ours
]
os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="needs transformers: make test-all")
pytest.importorskip("accelerate", reason="needs accelerate: make test-all")

from shampoo_kernels import Shampoo, split_params  # noqa: E402

WORDS, LENGTH = 23, 12


class Sentences(Dataset):
    """Each token is the one before plus a step of the sentence's own."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = (index + torch.arange(LENGTH) * (1 + index % 3)) % WORDS
        return {"input_ids": tokens, "labels": tokens}


def small_gpt():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


OPTIONS = {"lr": 3e-3, "block_size": 16, "refresh_every": 2}


def ready_made(model):
    """As the user makes it, with groups of his own."""
    return {"optimizers": (Shampoo(split_params(model), **OPTIONS), None)}


def by_the_trainer(model):
    """The Trainer makes it, of its own two groups: what decays, and what does not."""
    return {"optimizer_cls_and_kwargs": (Shampoo, OPTIONS)}


class Watch(transformers.TrainerCallback):
    """What the optimizer meets in every step, and the weights behind it."""

    def __init__(self):
        self.norms, self.rates = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(grads).item())
        self.rates.append({group["lr"] for group in optimizer.param_groups})


def trained(folder, given, steps, resume=None, **arguments):
    model, watch = small_gpt(), Watch()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=6,  # the schedule's, also where the run ends earlier
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        max_grad_norm=0.5,
        save_steps=3,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **arguments,
    )
    stop = StopAt(steps)
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Sentences(), callbacks=[watch, stop],
        **given(model),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == steps
    return trainer, watch


class StopAt(transformers.TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.steps


@pytest.mark.parametrize("given", [ready_made, by_the_trainer])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_three_steps_are_saved_and_resumed_to_the_same_bits(tmp_path, given, accumulate):
    more = {"gradient_accumulation_steps": accumulate}
    whole, watch = trained(tmp_path / "whole", given, 6, **more)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert torch.tensor(losses).isfinite().all()
    assert losses[-1] < losses[0]
    assert max(watch.norms) <= 0.5 * (1 + 1e-5)
    assert len({min(rates) for rates in watch.rates}) > 3  # warmed up, and down the cosine

    trained(tmp_path / "parts", given, 3, **more)
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    resumed, later = trained(tmp_path / "parts", given, 6, resume=str(checkpoint), **more)
    assert later.rates == watch.rates[3:]
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    same_optimizer(tmp_path / "whole" / "checkpoint-6", tmp_path / "parts" / "checkpoint-6")


def same_optimizer(folder, other):
    """What the Trainer saved of it, which has roots."""
    a, b = (torch.load(each / "optimizer.pt", weights_only=True) for each in (folder, other))
    assert a["param_groups"] == b["param_groups"]
    names = {name for state in a["state"].values() for name in state}
    assert "left_root.0" in names
    for key, state in a["state"].items():
        assert state.keys() == b["state"][key].keys()
        assert all(torch.equal(value, b["state"][key][name]) for name, value in state.items())


def test_in_bfloat16(tmp_path):
    """The Trainer's autocast, whose gradients are float32."""
    trainer, _ = trained(tmp_path, ready_made, 3, bf16=True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert torch.tensor(losses).isfinite().all()
