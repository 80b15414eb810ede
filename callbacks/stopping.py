"""Signals that end a training: noted at once, obeyed after the running step."""

import logging
import os
import signal
import subprocess
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer

from diffusion.errors import Stopped

log = logging.getLogger(__name__)


class StopSignals:
    """SIGTERM, Ctrl-C and, in a job of SLURM, the signal that announces its end.

    The last is SIGUSR1 unless the trainer has a `SLURMEnvironment` of another; asked for by
    `sbatch --signal=SIGUSR1@90`, it comes 90 s before the job's time is over. Lightning's own answers are not used: to
    SIGUSR1 it saves wherever the step is, into a file that later runs would take before their `last.ckpt`, and to
    SIGTERM it begins a collective operation in the middle of another one.
    """

    def __init__(self) -> None:
        self.asked = 0  # the number of the signal
        self._requeues = 0  # the signal after which the job is queued again
        self._before: dict[int, Any] = {}

    def watch(self, trainer: Trainer) -> None:
        """Listens from now on."""
        self.asked = self._requeues = 0
        if current_thread() is not main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            assert environment.requeue_signal is not None
            number = environment.requeue_signal
            handler: Any = signal.getsignal(number)
            # Whoever else listens to it, such as submitit, queues the job again by itself.
            if handler == signal.SIG_DFL or type(handler).__module__.startswith("lightning."):
                self._requeues = number
                self._before[self._requeues] = signal.signal(self._requeues, self._note)

    def release(self) -> None:
        """Listens no more."""
        for number, handler in self._before.items():
            # When Ctrl-C ends the run at once, Lightning ignores further ones until it is over; that is left as it is.
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        self._before = {}

    def check(self, trainer: Trainer) -> None:
        """Ends the training if a process of the run was asked to; all processes must call this at the same step.

        Raises:
            Stopped: in all of them.
        """
        asked = self.asked
        if trainer.world_size > 1:
            number = torch.tensor(asked, device=trainer.strategy.root_device)
            asked = int(trainer.strategy.reduce(number, reduce_op="max"))
        if asked:
            raise Stopped(asked, together=True)

    def requeue(self, number: int) -> None:
        """Queues the job again, if that is what the signal asks for."""
        if number != self._requeues:
            return
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
            fault = done.stderr.strip() or f"status {done.returncode}" if done.returncode else None
        except (OSError, subprocess.TimeoutExpired) as error:
            fault = str(error)
        if fault is None:
            log.warning("SLURM has job %s in its queue again", job)
        else:
            log.warning("scontrol requeue %s failed (%s): submit the same command again", job, fault)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked = number
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        log.warning("stopping after this step%s", again)
