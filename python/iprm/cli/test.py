"""The command `iprm test`."""

from __future__ import annotations

from collections.abc import Sequence

from .fusion_cli import FusionCLI, run


def test_command(arguments: Sequence[str]) -> int:
    """Runs `iprm test` and returns the exit code."""
    return run(TestCLI, arguments)


class TestCLI(FusionCLI):
    """`iprm test`: prints the metrics of a checkpoint on the test split."""

    command, needs_checkpoint = "test", True

    def execute(self) -> None:
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=self.config.ckpt_path)
