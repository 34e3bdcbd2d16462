"""`ProbeRebalance` in a plain loop, a user's Lightning module, and a transformers `Trainer`: it learns, and λ, ω and the step
count are saved and restored with the model."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from iprm import ProbeRebalance
from iprm.errors import InputError
from iprm.training.callbacks.run_state import RunState
from iprm.training.checkpoint import AtomicCheckpointIO
from iprm.training.lightning import quiet_lightning
from torch import nn
from torch.utils.data import DataLoader, Dataset

STEPS = 40


class Pairs(Dataset):
    """Two noisy views of one of three classes; a row is a dict, as `Trainer` requires."""

    def __init__(self, rows: int = 96) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(rows) % 3
        noise = torch.randn(2, rows, 6, generator=generator)
        self.sound, self.image = F.one_hot(self.labels, 6).float() + 0.3 * noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"sound": self.sound[row], "image": self.image[row], "labels": self.labels[row]}


class Model(nn.Module):
    """User-defined encoders with IPRM on top."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoders = nn.ModuleDict({name: nn.Linear(6, 16) for name in ("sound", "image")})
        self.fusion = ProbeRebalance(16, 3, ("sound", "image"))

    def forward(self, sound, image, labels=None):
        out = self.fusion({"sound": self.encoders["sound"](sound), "image": self.encoders["image"](image)}, labels)
        return {"loss": out.loss, "logits": out.logits}


def accuracy(model: Model) -> float:
    data = Pairs()
    with torch.no_grad():
        return (model.eval()(data.sound, data.image)["logits"].argmax(1) == data.labels).float().mean().item()


def check(model: Model, restored: Model) -> None:
    """Checks that the module has learned, and that the other one has the same state."""
    assert model.fusion.steps == STEPS
    assert model.fusion.weight != 0.5
    assert accuracy(model) > 0.95
    torch.testing.assert_close(restored.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_in_a_plain_loop(tmp_path):
    model, loader = Model(), DataLoader(Pairs(), 24, shuffle=True)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS // len(loader)):
        for batch in loader:
            optimiser.zero_grad()
            model(**batch)["loss"].backward()
            optimiser.step()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    restored = Model()
    restored.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    check(model, restored)


class Theirs(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def training_step(self, batch, batch_idx):
        return self.model(**batch)["loss"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_in_a_lightning_module(tmp_path):
    module = Theirs()
    with quiet_lightning():
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(max_steps=STEPS, accelerator="cpu", default_root_dir=tmp_path, **quiet)
        trainer.fit(module, DataLoader(Pairs(), 24, shuffle=True))
    (path,) = tmp_path.rglob("*.ckpt")
    check(module.model, Theirs.load_from_checkpoint(path, weights_only=True).model)


def test_a_lightning_module_without_hyperparameters_is_saved_whole_and_resumes_from_its_state(tmp_path):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

    def trained(steps: int, ckpt_path: str | None = None) -> Theirs:
        module = Theirs()
        callbacks, plugins = [RunState(every_n_batches=3)], [AtomicCheckpointIO()]
        at = {"max_steps": steps, "accelerator": "cpu", "default_root_dir": tmp_path}
        with quiet_lightning():
            trainer = L.Trainer(**at, callbacks=callbacks, plugins=plugins, **quiet)
            trainer.fit(module, DataLoader(Pairs(), 24), ckpt_path=ckpt_path)
        return module

    alone = trained(STEPS)
    assert alone.model.fusion.steps == STEPS
    trained(20)
    resumed = trained(STEPS, ckpt_path=str(tmp_path / "states/batch=00000016.ckpt"))
    torch.testing.assert_close(resumed.state_dict(), alone.state_dict(), rtol=0, atol=0)

    last = max((tmp_path / "states").iterdir())
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a Lightning checkpoint of tensors and plain values alone, or a part of one"):
        trained(STEPS, ckpt_path=str(last))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_in_a_transformers_trainer(tmp_path):
    from safetensors.torch import load_file
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(
        tmp_path,
        max_steps=STEPS,
        per_device_train_batch_size=24,
        per_device_eval_batch_size=24,
        learning_rate=0.05,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_steps=STEPS,
    )
    trainer = Trainer(Model(), settings, train_dataset=Pairs(), eval_dataset=Pairs())
    trainer.train()
    before = trainer.model.fusion.weight.clone()
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.model.fusion.weight == before, "evaluation measures, and learns nothing"
    restored = Model()
    restored.load_state_dict(load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors"))
    check(trainer.model, restored)
