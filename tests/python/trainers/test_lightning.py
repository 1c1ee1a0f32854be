"""Lightning on a small Llama: a LightningModule around a wrapped model trains, saves and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pissa
from daily import each
from language_models import Make, logits
from pissa import PissaModel
from trainers import FORMS, assert_equal, forms, quiet, state, unchanged

pytestmark = quiet


def module_of(model: nn.Module) -> Any:
    import lightning

    class Adapted(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.train()
            self.losses: list[float] = []

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss = self.model(input_ids=batch, labels=batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)

    return Adapted()


def fit(module: Any, folder: Path, resume: Path | None = None, **others: Any) -> None:
    """Two epochs of four steps, with a checkpoint after each."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    ids = torch.randint(0, 97, (16, 9), generator=torch.Generator().manual_seed(2))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    every = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    run = lightning.Trainer(accelerator="cpu", max_epochs=2, callbacks=[every], **quiet, **others)
    run.fit(module, torch.utils.data.DataLoader(ids, batch_size=4), ckpt_path=resume)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"precision": "bf16-mixed"},
    "gradients accumulated": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
}


@forms
@pytest.mark.parametrize("option", each(OPTIONS, ["gradients accumulated"]))
def test_an_interrupted_fit_goes_on(form: str, option: str, tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    whole, resumed = (module_of(pissa.wrap(tiny_llama(), r=4, **FORMS[form])) for _ in range(2))
    with unchanged(whole.model):
        fit(whole, tmp_path / "whole", **OPTIONS[option])
    assert whole.losses[-1] < whole.losses[0]

    fit(resumed, tmp_path / "resumed", tmp_path / "whole" / "epoch=0.ckpt", **OPTIONS[option])
    assert resumed.losses == whole.losses[4:]
    assert_equal(state(resumed), state(whole))

    whole.model.save_pretrained(tmp_path / "adapter")
    again = PissaModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert torch.equal(logits(again, tokens), logits(whole.model.eval(), tokens))
