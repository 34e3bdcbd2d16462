"""Settings that Lightning, jsonargparse or torch refuse: one line that names them, exit code 2, nothing written. An error in the
user's own code keeps its traceback."""

from __future__ import annotations

import pytest
from command import refused

FIT = (
    *("fit", "--data", "features", "--data.path", "features.npz", "--data.batch_size", "13"),  # three batches
    *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
)

SETTINGS = {
    "seed_everything=-1": "seed_everything: expected a number from 0 to 4294967295, got -1",
    "seed_everything=4294967296": "seed_everything: expected a number from 0 to 4294967295, got 4294967296",
    "trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches: expected a whole number from 1 up, got 0",
    "trainer.check_val_every_n_epoch=0": "trainer.check_val_every_n_epoch: expected a whole number from 1 up, got 0",
    "trainer.log_every_n_steps=-1": "trainer.log_every_n_steps: expected a whole number from 0 up, got -1",
    "trainer.max_epochs=-2": "trainer.max_epochs: expected a whole number from -1 up, got -2",
    "trainer.num_sanity_val_steps=-2": "trainer.num_sanity_val_steps: expected a whole number from -1 up, got -2",
    "trainer.gradient_clip_val=-1": "trainer.gradient_clip_val: expected a number from 0 up, got -1",
    "trainer.gradient_clip_val=nan": "trainer.gradient_clip_val: expected a number from 0 up, got nan",
    "trainer.val_check_interval=0": "trainer.val_check_interval: expected a number above 0, got 0",
    "trainer.val_check_interval=100": "`val_check_interval` (100) must be less than or equal to the number of the training batches",
    "trainer.limit_train_batches=-1": "trainer: You have passed invalid value -1 for limit_train_batches",
    "trainer.devices=99": "processes on this CPU, got 99",
    "trainer.strategy=dpp": "trainer: You selected an invalid strategy name: `strategy='dpp'`",
    "trainer.precision=17": "trainer.precision",
    "trainer.max_time=soon": "trainer: ",
    "trainer.gradient_clip_algorithm=norms": "trainer: `gradient_clip_algorithm` norms is invalid",
    "trainer.callbacks=NoSuchCallback": "NoSuchCallback",
    "trainer.callbacks=EarlyStopping": "monitor",
    "trainer.callbacks=LearningRateFinder": "learning rate finder",
    "trainer.logger=NoSuchLogger": "NoSuchLogger",
    "trainer.logger=MLFlowLogger": "mlflow",
    "trainer.profiler=fast": "trainer: ",
    "trainer.default_root_dir=features.npz": "features.npz",
    "config=.": "unknown configuration '.'",
    "config=features.npz": "features.npz: expected settings in YAML, as UTF-8 text",
    "trainer=features.npz": "features.npz",
    "optimizer=features.npz": "features.npz",
    "data.path=.": ".: there is no such file",
    "ckpt_path=.": ".: there is no such checkpoint",
}


@pytest.mark.parametrize(("setting", "message"), SETTINGS.items(), ids=SETTINGS.keys())
def test_a_setting_that_cannot_be_is_refused(tmp_path, features, setting, message):
    assert message in refused(tmp_path, *FIT, f"--{setting}")
