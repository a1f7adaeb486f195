"""docs/trainers.md: MicroAdam in other people's trainers, stopped midway and resumed.

Each trainer saves and loads the optimizer in its own way, and torch's default way would destroy
MicroAdam's state (by casting indices to the parameters' dtype): only resuming shows it survives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from microadam import MicroAdam, enable_gradient_release

NUM_STEPS, NUM_STEPS_BEFORE = 8, 4
BATCH_SIZE = 4
ARGUMENTS = {"lr": 1e-2, "block_size": 128, "density": 0.05, "window_size": 3}


class Regression(nn.Module):
    """Two layers in bfloat16, where a cast of the state would show at once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)).bfloat16()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        predicted = self.layers(x.bfloat16()).float()
        return {"loss": nn.functional.mse_loss(predicted, labels)}


class Data(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(NUM_STEPS_BEFORE * BATCH_SIZE, 16, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.x[index, :1].sin()}


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


# Hugging Face Trainer


def _hugging_face(folder: Path, is_released: bool = False, **arguments: Any) -> Any:
    transformers = pytest.importorskip("transformers")

    class ReleasingTrainer(transformers.Trainer):
        def create_optimizer(self, *args: Any) -> MicroAdam:
            optimizer = super().create_optimizer(*args)
            enable_gradient_release(self.model, optimizer)
            return optimizer

        def _get_grad_norm(self, *args: Any, grad_norm: float | None = None) -> float | None:
            return grad_norm

    trainer_class = ReleasingTrainer if is_released else transformers.Trainer
    return trainer_class(
        Regression(),
        transformers.TrainingArguments(
            folder,
            max_steps=NUM_STEPS,
            save_steps=NUM_STEPS_BEFORE,
            per_device_train_batch_size=BATCH_SIZE,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=Data(),
        optimizer_cls_and_kwargs=(MicroAdam, ARGUMENTS),
    )


def _checkpoint(folder: Path) -> Path:
    return folder / f"checkpoint-{NUM_STEPS_BEFORE}"


def test_hugging_face_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    undisturbed = _hugging_face(tmp_path)
    undisturbed.train()
    resumed = _hugging_face(tmp_path)
    resumed.train(resume_from_checkpoint=_checkpoint(tmp_path))
    assert_same(resumed.model, undisturbed.model)
    assert type(resumed.optimizer.optimizer) is MicroAdam
    with pytest.raises(AssertionError):
        assert_same(resumed.model, Regression())


def test_hugging_face_trainer_releases_gradients(tmp_path: Path) -> None:
    plain = _hugging_face(tmp_path / "plain", max_grad_norm=0)
    plain.train()
    released = _hugging_face(tmp_path, is_released=True, max_grad_norm=0)
    released.train()
    assert_same(released.model, plain.model)
    resumed = _hugging_face(tmp_path, is_released=True, max_grad_norm=0)
    resumed.train(resume_from_checkpoint=_checkpoint(tmp_path))
    assert_same(resumed.model, plain.model)


def test_hugging_face_trainer_cannot_clip_released_gradients_in_silence(tmp_path: Path) -> None:
    """Its default max_grad_norm=1.0 would find no gradients and clip nothing."""
    with pytest.raises(RuntimeError, match="clipping by the global norm"):
        _hugging_face(tmp_path, is_released=True).train()


# Accelerate


def test_accelerate_resumes_bit_for_bit(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def train(first: int, last: int, saved: Path | None = None) -> nn.Module:
        accelerator = accelerate.Accelerator(cpu=True)
        model = Regression()
        optimizer = MicroAdam(model.parameters(), **ARGUMENTS)
        model, optimizer, loader = accelerator.prepare(
            model, optimizer, DataLoader(Data(), BATCH_SIZE)
        )
        if saved is not None:
            accelerator.load_state(saved)
        for step, batch in enumerate([*loader, *loader]):
            if first <= step < last:
                accelerator.backward(model(**batch)["loss"])
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(tmp_path / f"step-{last}")
        return accelerator.unwrap_model(model)

    undisturbed = train(0, NUM_STEPS)
    train(0, NUM_STEPS_BEFORE)
    resumed = train(NUM_STEPS_BEFORE, NUM_STEPS, tmp_path / f"step-{NUM_STEPS_BEFORE}")
    assert_same(resumed, undisturbed)


# Lightning


def _lightning_module(lightning: Any) -> Any:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Regression()

        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> MicroAdam:
            return MicroAdam(self.parameters(), **ARGUMENTS)

    return Module()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_resumes_bit_for_bit(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    def train(saved: Path | None = None) -> Any:
        module = _lightning_module(lightning)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=2,
            gradient_clip_val=1.0,
            logger=False,
            callbacks=lightning.pytorch.callbacks.ModelCheckpoint(
                tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True
            ),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(Data(), BATCH_SIZE), ckpt_path=saved)
        assert trainer.global_step == NUM_STEPS
        return module

    undisturbed = train()
    resumed = train(tmp_path / "epoch=0.ckpt")
    assert_same(resumed, undisturbed)
    with pytest.raises(AssertionError):
        assert_same(resumed, _lightning_module(lightning))


# A custom recipe


@pytest.mark.parametrize("is_released", [False, True])
def test_a_plain_recipe_resumes_bit_for_bit(tmp_path: Path, is_released: bool) -> None:
    """In the style of torchtune's recipes: one file for everything, loaded with weights_only."""

    def train(first: int, last: int, saved: Path | None = None) -> nn.Module:
        model = Regression()
        optimizer = MicroAdam(model.parameters(), **ARGUMENTS)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, NUM_STEPS)
        if is_released:
            enable_gradient_release(model, optimizer)
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        if saved is not None:
            loaded = torch.load(saved, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(loaded[name])
        batches = [*DataLoader(Data(), BATCH_SIZE)] * 2
        for batch in batches[first:last]:
            model(**batch)["loss"].backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        torch.save(
            {name: part.state_dict() for name, part in parts.items()}, tmp_path / f"step-{last}.pt"
        )
        return model

    undisturbed = train(0, NUM_STEPS)
    train(0, NUM_STEPS_BEFORE)
    resumed = train(NUM_STEPS_BEFORE, NUM_STEPS, tmp_path / f"step-{NUM_STEPS_BEFORE}.pt")
    assert_same(resumed, undisturbed)
