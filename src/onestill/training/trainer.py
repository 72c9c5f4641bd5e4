"""The training loop over accelerate: rows, losses, updates, averages, checkpoints."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn

from onestill.core.errors import FoundWarning, RunError, SettingError, named
from onestill.core.tensors import to_device
from onestill.data.conditions import Conditions
from onestill.objectives.base import Context, Objective
from onestill.objectives.registry import objectives_of, rows_of
from onestill.sampling.generate import Generate, student_generator, teacher_generator
from onestill.students.student import Student
from onestill.training.averages import forget_after, snapshot_steps, write_snapshot
from onestill.training.checkpoint import FORMAT, Checkpoint, Tensors, rotate, write_checkpoint
from onestill.training.config import DistillConfig, pool_settings
from onestill.training.distance import Distance, nearest
from onestill.training.loss import joined_inputs, regression, robust_factors, squared_residuals, targets
from onestill.training.trained import Trained
from onestill.training.watch import StepLog, Watch


@dataclass
class Progress:
    """Where the training is; part of every checkpoint."""

    step: int = 0
    nonfinite_in_row: int = 0
    nonfinite_total: int = 0


@dataclass(frozen=True)
class Fingerprints:
    """Hashes of what a run is made of; "" of prompts where there are none."""

    teacher: str  # of its weights
    prompts: str = ""  # and of what draws pictures from them
    drawn: str = ""  # those of them that the run draws from, which its length may decide


class NonFiniteLossError(RunError):
    """The loss was not finite too many times in a row."""


class Trainer:
    """Distils a teacher into a student.

    Every random draw of the training comes from one CPU generator, which is part of the checkpoint, so a run that
    was interrupted and resumed is the run that was not.

    Args:
        config: The run.
        student: The student of a teacher that is guided and thresholded as wanted.
        conditions: Where conditions are drawn from.
        fingerprints: Kept with every checkpoint.
    """

    def __init__(
        self, config: DistillConfig, student: Student, conditions: Conditions, fingerprints: Fingerprints
    ) -> None:
        self.config, self.teacher, self.student = config, student.teacher, student
        self.conditions, self.fingerprints = conditions, fingerprints
        self.accelerator = make_accelerator(config)
        self.device = self.accelerator.device
        if config.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        if config.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        if self.accelerator.distributed_type is not DistributedType.NO and unused_parameters(student.to(self.device)):
            # Every process waits for every gradient, unless it is told to look which there are.
            self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        decay = config.ema_target_decay
        follower = student.twin() if decay else None
        self.generator = torch.Generator().manual_seed(config.seed + 7919 * self.accelerator.process_index)
        self.progress = Progress()
        self.watch = Watch(config, self.accelerator, student.spec, conditions)
        # Before the student is prepared: what is made of it there is no module that could be copied.
        self.objectives = self._make_objectives(student if follower is None else follower)
        widths = config.ema_tracks
        own = Trained(
            "student", student, self.accelerator, config, widths=widths, follower=follower, follower_decay=decay
        )
        self.trained, self.model = [own], own.model
        self._train_networks()
        self.stop_requested = False
        self.last_checkpoint: Path | None = None
        self.ema_width = config.ema_width[0]
        self.ema_distances: dict[float, float] = {}
        self._rebuilt: Tensors | None = None

    def _make_objectives(self, target_student: nn.Module) -> list[Objective[Any]]:
        """Return the objectives that will have rows of a batch."""
        config, accelerator = self.config, self.accelerator
        context = Context(
            config=config,
            teacher=self.teacher,
            student=self.student,
            target_student=target_student,
            conditions=self.conditions,
            generator=self.generator,
            device=self.device,
            autocast=accelerator.autocast,
            progress=self._share_done,
            batch_size=config.train_batch_size,
            seed=config.seed,
            folder=config.output_dir,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            identity={
                "format": FORMAT,
                "settings": pool_settings(config),
                "teacher": self.fingerprints.teacher,
                "prompts": (self.fingerprints.prompts, self.fingerprints.drawn),
                "num_processes": accelerator.num_processes,
            },
        )
        return [kind(context) for kind in objectives_of(config, config.train_batch_size)]

    def _train_networks(self) -> None:
        """Let the objectives' networks be trained from now on."""
        config, accelerator = self.config, self.accelerator
        for objective in self.objectives:
            for name, network in objective.networks.items():
                if accelerator.scaler is not None:
                    why = f"its one scaler serves one network, and {objective.name} trains another"
                    raise SettingError("mixed_precision", "fp16", why, "use bf16 or no")
                rate, full_name = objective.learning_rate(config, name), f"{objective.name}.{name}"
                beta = objective.adam_beta1(config, name)
                trained = Trained(full_name, network, accelerator, config, learning_rate=rate, adam_beta1=beta)
                self.trained.append(trained)
                objective.networks[name] = self.trained[-1].model

    def _share_done(self) -> float:
        return self.progress.step / self.config.max_train_steps

    def prepare(self) -> Iterator[tuple[Objective[Any], int]]:
        """Make the pools of the objectives; yield (objective, how many items came) until a stop is asked for."""
        for objective in self.objectives:
            for num in (items := objective.prepare()):
                yield objective, num
                if self.stop_requested:
                    items.close()  # which keeps what is made
                    return

    def steps(self) -> Iterator[StepLog]:
        """Yield after each optimiser step until `max_train_steps`, or until `stop_requested` is set.

        Raises:
            NonFiniteLossError: After `max_nonfinite_steps` non-finite losses in a row; names the last checkpoint.
        """
        config, progress, snapshots = self.config, self.progress, snapshot_steps(self.config)
        started = time.perf_counter()
        while progress.step < config.max_train_steps and not self._stops():
            loss, grad_norm, rate, own = self.update()
            progress.step += 1
            self._count_nonfinite((loss, *own.values()), self._norms)
            now = time.perf_counter()
            seconds, started = now - started, now
            images = config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
            log = StepLog(progress.step, loss, grad_norm, rate, seconds, images / seconds, progress.nonfinite_total)
            log.own_losses = own or None
            log.states = {
                objective.name: state for objective in self.objectives if (state := objective.state())
            } or None
            ends = progress.step == config.max_train_steps
            if progress.step in snapshots and self.accelerator.is_main_process:
                write_snapshot(config.output_dir, progress.step, self.trained[0].tracks)
            if ends and len(config.ema_width) > 1:
                self._choose_width()
            if ends or progress.step % config.validation_steps == 0:
                log.picture, log.validation_rms = self.validate()
            if ends or progress.step % config.logging_steps == 0 or log.validation_rms is not None:
                self.watch.write(log)
            if ends or progress.step % config.checkpointing_steps == 0:
                log.checkpoint = self.save()
            yield log
            if log.validation_rms is not None or log.checkpoint:  # and whoever looks may have made a page of it
                started = time.perf_counter()

    def update(self) -> tuple[float, float, float, dict[str, float]]:
        """Do one optimiser step; skipped for what has a gradient that is not finite.

        Returns:
            (the student's loss, its gradient norm, its learning rate, losses of the objectives' networks).
        """
        rate, losses, own, norms = self.trained[0].learning_rate, [], {}, []
        for _ in range(self.config.gradient_accumulation_steps):
            with self.accelerator.accumulate(*(trained.model for trained in self.trained)):
                loss, own_losses = self._losses()
                self.accelerator.backward(sum(own_losses.values(), loss))
                losses.append(loss.detach())
                if self.accelerator.sync_gradients:
                    # One synchronisation a step: losses and norms are read together. After all-reduce a norm is the
                    # same on every process, so all skip or none does.
                    clipped = [trained.clip() for trained in self.trained]
                    read = [torch.stack(losses).mean(), *clipped, *own_losses.values()]
                    mean, *numbers = torch.stack([value.detach().to(losses[0]).float() for value in read]).tolist()
                    norms, own = numbers[: len(clipped)], dict(zip(own_losses, numbers[len(clipped) :], strict=True))
                    for trained, norm in zip(self.trained, norms, strict=True):
                        if math.isfinite(norm) or self.accelerator.scaler is not None:
                            trained.optimizer.step()
                for trained in self.trained:
                    trained.optimizer.zero_grad()
        for trained, norm in zip(self.trained, norms, strict=True):
            # The schedule follows the step count whether or not the step was skipped, so it ends where it says.
            trained.schedule.step()
            if math.isfinite(norm):
                trained.average()
        self._norms = norms
        return mean, norms[0], rate, own

    def _losses(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw one batch; return the student's loss, and those of the objectives' networks by the objective's name."""
        rows = rows_of(self.config, self.config.train_batch_size, self._share_done())
        batches = {each: each.batch(rows[type(each)]) for each in self.objectives if type(each) in rows}
        found = list(batches.values())
        y = self.model(*joined_inputs(found, self.teacher.spec.t_max))
        with self.accelerator.autocast():
            target = targets(found, y)
        residuals = squared_residuals(y.float(), target.float())
        self.watch.count(found, residuals)
        weights, mean = (torch.cat([getattr(batch, name) for batch in found]) for name in ("weights", "mean"))
        if (exponent := self.config.robust_exponent) > 0:
            factors = robust_factors(found, residuals, exponent, self.config.robust_constant)
            weights = weights.to(residuals) * factors
        loss = regression(residuals, weights, mean)
        parts = torch.split(y.detach(), [len(batch.s) for batch in found])
        with self.accelerator.autocast():
            own = {o.name: o.own_loss(batch, part) for (o, batch), part in zip(batches.items(), parts, strict=True)}
        return loss, {name: own_loss for name, own_loss in own.items() if own_loss is not None}

    def _stops(self) -> bool:
        """Return whether a stop was asked of any process: all stop after the same step, or they wait for each other."""
        if self.accelerator.num_processes > 1:
            wanted = torch.tensor([float(self.stop_requested)], device=self.device)
            self.stop_requested = bool(self.accelerator.reduce(wanted, "sum").item())
        return self.stop_requested

    def _count_nonfinite(self, losses: Sequence[float], norms: Sequence[float]) -> None:
        progress, limit, last = self.progress, self.config.max_nonfinite_steps, self.last_checkpoint
        if all(map(math.isfinite, losses)) and (all(map(math.isfinite, norms)) or self.accelerator.scaler is not None):
            progress.nonfinite_in_row = 0
            return
        progress.nonfinite_in_row += 1
        progress.nonfinite_total += 1
        if progress.nonfinite_in_row >= limit:
            good = f"the last good checkpoint is {last}" if last else "no checkpoint had been written"
            raise NonFiniteLossError(
                f"the loss was not finite {limit} times in a row, up to step {progress.step}; {good}. "
                f"Lower {named('learning_rate')}, or use {named('mixed_precision')} bf16 or no"
            )

    def averaged(self) -> AbstractContextManager[None]:
        """Put the weights that are exported in the place of the student's for a while."""
        return self.trained[0].averaged(self._rebuilt)

    def _choose_width(self) -> None:
        """Export from now on the average, of those of several widths, that is nearest to the teacher on held-out noise.

        On other noise than pictures are made of: what is said of those is no result of the choice. Always as many
        images, so that a run that was interrupted chooses what the one that was not does.
        """
        config, own, errors, distances = self.config, self.trained[0], dict[float, Tensor](), dict[float, float]()
        if self.accelerator.is_main_process:
            teacher = teacher_generator(self.teacher, num_steps=config.num_teacher_steps, device=self.device)
            student = student_generator(self.student, t=config.t_min, device=self.device)
            with self.accelerator.autocast():
                images = self.watch.held_out(teacher)
                for width in config.ema_width:
                    try:
                        weights = own.tracks.at(width, config.output_dir, self.progress.step)
                    except SettingError as error:  # snapshots were lost, or are those of a shorter run
                        warnings.warn(f"{error}: it is not compared", FoundWarning, stacklevel=3)
                        continue
                    with own.averaged(weights):
                        errors[width] = (self.watch.held_out(student) - images).square().flatten(1).mean(1)
            distances = {width: float(each.mean().sqrt()) for width, each in errors.items()}
        width, distances = broadcast_object_list([nearest(errors) if errors else None, distances])
        self._export(width, distances)

    def _export(self, width: float, distances: dict[float, float]) -> None:
        """Export the average of the width that was chosen at the end."""
        self.ema_width, self.ema_distances = width, distances
        self._rebuilt = self.trained[0].tracks.at(width, self.config.output_dir, self.progress.step)

    def validate(self) -> tuple[Path | None, float]:
        """Draw student beside teacher from the same noise; return (picture, RMS difference of the two)."""
        config = self.config
        teacher = teacher_generator(self.teacher, num_steps=config.num_teacher_steps, device=self.device)
        student = student_generator(self.student, t=config.t_min, device=self.device)
        with self.accelerator.autocast(), self.averaged():
            return self.watch.validate(self.progress.step, teacher, student, self.teacher.decode)

    def distance(self, seconds: float) -> Distance | None:
        """Return how far the student is from its teacher by the last validation, after so many seconds at most.

        None if this part of the run has validated nothing. One process may ask alone; no random state is touched.
        """

        def teacher_of(num_steps: int) -> Generate:
            return teacher_generator(self.teacher, num_steps=num_steps, device=self.device)

        with self.accelerator.autocast():
            return self.watch.distance(teacher_of, seconds)

    def save(self) -> Path:
        """Write a checkpoint of everything the run needs to go on exactly; return its folder."""
        generators = self.accelerator.gather(self.generator.get_state()[None].to(self.device)).cpu()
        folder = self.config.output_dir / f"checkpoint-{self.progress.step}"
        pools = {objective.name: gather_object([objective.pool_hash]) for objective in self.objectives}
        states = {objective.name: gather_object([objective.state()]) for objective in self.objectives}
        tensors = {group: value for trained in self.trained for group, value in trained.tensors().items()}
        if self.accelerator.is_main_process:
            tensors["random"] = {str(i): state for i, state in enumerate(generators)}
            values = {
                "progress": asdict(self.progress),
                "trained": {trained.name: trained.values() for trained in self.trained},
                "ema_width": self.ema_width,
                "ema_distances": list(self.ema_distances.items()),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
                "pools": pools,
                "states": states,
                "fingerprints": asdict(self.fingerprints),
                "num_processes": self.accelerator.num_processes,
                "config": self.config.model_dump(mode="json"),
            }
            write_checkpoint(self.config.output_dir, self.progress.step, Checkpoint(tensors, values))
            rotate(self.config.output_dir, self.config.checkpoints_total_limit, self.progress.step)
        self.accelerator.wait_for_everyone()
        self.last_checkpoint = folder
        return folder

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint whose settings have been compared."""
        tensors, values, rank = checkpoint.tensors, checkpoint.values, self.accelerator.process_index
        self.progress = Progress(**values["progress"])
        for trained in self.trained:
            trained.restore(tensors, values["trained"][trained.name], self.progress.step)
        for objective in self.objectives:
            objective.pool_hash = values["pools"].get(objective.name, {rank: ""})[rank]
            if objective.name in values.get("states", {}):
                objective.restore(values["states"][objective.name][rank])
        self.generator.set_state(tensors["random"][str(rank)])
        if self.accelerator.scaler is not None and values["scaler"]:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        self.forget_after(self.progress.step)
        if (chosen := dict(values["ema_distances"])) and self.progress.step == self.config.max_train_steps:
            self._export(values["ema_width"], chosen)

    def forget_after(self, step: int) -> None:
        """Remove what an interrupted run wrote after a step: it comes again."""
        self.watch.forget_after(step)
        if self.accelerator.is_main_process:
            forget_after(self.config.output_dir, step)


def unused_parameters(student: Student) -> list[str]:
    """Return the names of trained parameters that have no part in the student's output, by one backward of one row."""
    spec, device = student.spec, next(student.parameters()).device
    cond = to_device(student.with_scale(student.teacher.example_rows(1), None, 1), device)
    x_a = spec.trajectory.start(torch.zeros(1, *spec.sample_shape, device=device))
    named_parameters = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    with torch.enable_grad():
        total = student(x_a, None, spec.t_max, cond).sum()
        found = torch.autograd.grad(total, [p for _, p in named_parameters], allow_unused=True)
    return [name for (name, _), gradient in zip(named_parameters, found, strict=True) if gradient is None]


def make_accelerator(config: DistillConfig) -> Accelerator:
    """Return the accelerator for a run; `config.device` has been checked."""
    # accelerate keeps one global state and refuses a second run of other precision in the same process.
    if AcceleratorState._shared_state and not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)
    if config.device.startswith("cuda:"):
        torch.cuda.set_device(config.device)
    return Accelerator(
        cpu=config.device == "cpu",
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to,
        project_dir=config.output_dir / "logs",
    )
