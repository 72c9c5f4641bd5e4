"""The training loop over accelerate: draws, losses, updates, averages, checkpoints, and what it shows."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from onestill.core.tensors import Cond, to_device
from onestill.data.conditions import VALIDATION_SEED, Conditions
from onestill.diffusion.trajectory import STEPS
from onestill.objectives import boot as objective
from onestill.objectives.anchors import Anchors, joined, read_anchors, roll_out, write_anchors
from onestill.runs.resume import pool_settings
from onestill.sampling import pictures
from onestill.sampling.generate import generate_images, student_generator, teacher_generator
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.training.checkpoint import Checkpoint, flatten_optimizer, restore_optimizer, rotate, write_checkpoint
from onestill.training.config import DistillConfig

ANCHOR_SEED = 2**31
ANCHOR_SECONDS = 300.0


@dataclass
class Progress:
    """Where the training is; part of every checkpoint."""

    step: int = 0
    nonfinite_in_row: int = 0
    nonfinite_total: int = 0


@dataclass
class StepLog:
    """What is known after an optimiser step; written to logs/metrics.jsonl every `logging_steps`.

    `residual_by_time` is the mean squared residual in units of f over equal bins of target time, cleanest first,
    since the last line; None for a bin without a draw.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds_per_step: float
    images_per_second: float
    nonfinite_steps: int
    residual_by_time: list[float | None] = field(default_factory=list)
    validation_rms: float | None = None
    picture: Path | None = None
    checkpoint: Path | None = None


class NonFiniteLossError(RuntimeError):
    """The loss was not finite too many times in a row."""


class Trainer:
    """Distils a teacher into a student.

    Every random draw of the training comes from one CPU generator, which is part of the checkpoint, so a run that
    was interrupted and resumed is the run that was not.

    Args:
        config: The run.
        teacher: The teacher, guided and thresholded as wanted.
        student: The student.
        conditions: Where conditions are drawn from.
        teacher_fingerprint: Hash of the teacher's weights, kept with every checkpoint.
        prompts_fingerprint: Hash of its prompts, and of what draws pictures from them, likewise; "" without.
        drawn_fingerprint: Hash of those of them that the run draws from, which its length may decide.
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: Teacher,
        student: Student,
        conditions: Conditions,
        teacher_fingerprint: str,
        *,
        prompts_fingerprint: str = "",
        drawn_fingerprint: str = "",
    ) -> None:
        self.config, self.teacher, self.conditions = config, teacher, conditions
        self.teacher_fingerprint, self.prompts_fingerprint = teacher_fingerprint, prompts_fingerprint
        self.drawn_fingerprint = drawn_fingerprint
        self.accelerator = make_accelerator(config)
        if config.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        if config.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        parameters = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.student = student.to(self.device)
        self.model, self.optimizer = self.accelerator.prepare(student, optimizer)
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.ema = _average(parameters, config.ema_decay)
        self.target_ema = _average(parameters, config.ema_target_decay, fixed=True)
        self.generator = torch.Generator().manual_seed(config.seed + 7919 * self.accelerator.process_index)
        self.progress = Progress()
        self.anchors: Anchors | None = None
        self.stop_requested = False
        self.last_checkpoint: Path | None = None
        self._bins = torch.zeros(2, config.num_time_bins, dtype=torch.float64)
        self._teacher_images: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.accelerator.device

    def steps(self) -> Iterator[StepLog]:
        """Yield after each optimiser step until `max_train_steps`, or until `stop_requested` is set.

        Raises:
            NonFiniteLossError: After `max_nonfinite_steps` non-finite losses in a row; names the last checkpoint.
        """
        config, progress = self.config, self.progress
        started = time.perf_counter()
        while progress.step < config.max_train_steps and not self._stops():
            loss, grad_norm, rate = self.update()
            progress.step += 1
            self._count_nonfinite(loss, grad_norm)
            now = time.perf_counter()
            seconds, started = now - started, now
            images = config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
            log = StepLog(progress.step, loss, grad_norm, rate, seconds, images / seconds, progress.nonfinite_total)
            ends = progress.step == config.max_train_steps
            if ends or progress.step % config.validation_steps == 0:
                log.picture, log.validation_rms = self.validate()
            if ends or progress.step % config.logging_steps == 0 or log.validation_rms is not None:
                self._write_log(log)
            if ends or progress.step % config.checkpointing_steps == 0:
                log.checkpoint = self.save()
            if log.picture or log.checkpoint:
                started = time.perf_counter()
            yield log

    def make_anchors(self) -> Iterator[int]:
        """Make the pool of anchors, going on with what an earlier part of this run made; yield how many came each time.

        A pool of its own for every process, from a generator of its own, so that a resumed run has the same one. It
        is written when it is whole, when the run is to stop, and every few minutes.
        """
        config, rank = self.config, self.accelerator.process_index
        if config.num_anchor_rows == 0:
            return
        made_with: dict[str, object] = {
            "settings": pool_settings(config),
            "teacher": self.teacher_fingerprint,
            "prompts": (self.prompts_fingerprint, self.drawn_fingerprint),
            "num_processes": self.accelerator.num_processes,
        }
        path = config.output_dir / f"anchors-{rank}.safetensors"
        generator = torch.Generator().manual_seed(config.seed + ANCHOR_SEED + rank)
        num = -(-config.num_anchors // self.accelerator.num_processes)
        pool = read_anchors(path, made_with, generator)
        batches = [] if pool is None else [pool]
        made = 0 if pool is None else len(pool.eps)
        written, at, pause = made, time.monotonic(), ANCHOR_SECONDS
        if made:
            yield made
        with self.accelerator.autocast():
            for batch in roll_out(
                self.teacher,
                self.conditions,
                num,
                first=made,
                num_steps=config.num_anchor_steps,
                solver=config.solver,
                t_min=config.t_min,
                generator=generator,
                device=self.device,
                batch_size=config.train_batch_size,
            ):
                batches.append(batch)
                made += len(batch.eps)
                yield len(batch.eps)
                stops, started = self.stop_requested, time.monotonic()
                if stops or started - at > pause:
                    batches = [joined(batches)]
                    write_anchors(batches[0], generator, path, made_with)
                    written, at = made, time.monotonic()
                    pause = max(pause, 20 * (at - started))  # a large pool is written less often
                if stops and made < num:
                    return
        self.anchors = joined(batches)
        if written < made:
            write_anchors(self.anchors, generator, path, made_with)

    def update(self) -> tuple[float, float, float]:
        """Do one optimiser step and return (loss, gradient norm, learning rate); skipped if not finite."""
        rate, grad_norm = self.optimizer.param_groups[0]["lr"], torch.zeros(())
        losses = []
        for _ in range(self.config.gradient_accumulation_steps):
            with self.accelerator.accumulate(self.model):
                batch_loss = self._loss()
                self.accelerator.backward(batch_loss)
                losses.append(batch_loss.detach())
                if self.accelerator.sync_gradients:
                    grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
                    # One synchronisation a step: the loss and the norm are read together. After all-reduce the
                    # norm is the same on every process, so all skip or none does.
                    loss_value, norm_value = torch.stack(
                        [torch.stack(losses).mean().float(), torch.as_tensor(grad_norm).to(losses[0]).float()]
                    ).tolist()
                    if math.isfinite(norm_value) or self.accelerator.scaler is not None:
                        self.optimizer.step()
                self.optimizer.zero_grad()
        # The schedule follows the step count whether or not the step was skipped, so it ends where it says.
        self.lr_scheduler.step()
        if math.isfinite(norm_value):
            for average in (self.ema, self.target_ema):
                if average is not None:
                    average.step(p for p in self.student.parameters() if p.requires_grad)
        return loss_value, norm_value, rate

    def _loss(self) -> Tensor:
        """Draw one batch and return its loss, eqs. (10) and (11)."""
        config, spec = self.config, self.teacher.spec
        num, num_boundary = config.train_batch_size - config.num_anchor_rows, config.num_boundary_rows
        eps = torch.randn(num, *spec.sample_shape, generator=self.generator)
        u = torch.rand(num, generator=self.generator, dtype=torch.float64)
        chosen = self.conditions.choose(num, self.generator)
        cond = to_device(self.conditions.rows(chosen), self.device)
        share = self.progress.step / config.max_train_steps
        t, s = objective.draw_times(u, config.time_sampling, config.delta, config.t_min, spec.t_max, share)
        t[:num_boundary] = s[:num_boundary] = spec.t_max

        x_a = spec.trajectory.start(eps.to(self.device))
        with torch.no_grad(), self.accelerator.autocast():
            y_t = self._student_at(x_a, t, cond)
            target = objective.bootstrap_target(
                STEPS[config.solver], spec.trajectory, self.teacher.denoiser(cond), x_a, y_t, t, s
            )
        if self.anchors is not None:
            anchors = self.anchors.draw(config.num_anchor_rows, self.generator)
            x_a = torch.cat([x_a, spec.trajectory.start(anchors.eps.to(self.device))])
            target = torch.cat([target, anchors.signal.to(target)])
            others = to_device(self.conditions.rows(anchors.chosen), self.device)
            cond = {name: torch.cat([value, others[name]]) for name, value in cond.items()}
            t = torch.cat([t, t.new_full((len(anchors.eps),), spec.t_max)])
            s = torch.cat([s, s.new_full((len(anchors.eps),), config.t_min)])
        y_s = self.model(x_a, None, s, cond)
        residuals = objective.squared_residuals(y_s.float(), target.float())
        weights = objective.row_weights(config.bootstrap_weight, spec.trajectory, t, s)
        rows = slice(num_boundary, num)
        self._count_residuals(residuals[rows], spec.trajectory.rho(t, s)[rows], s[rows])
        is_boundary = (torch.arange(len(s)) < num_boundary).to(self.device)
        return objective.loss(residuals, weights, is_boundary, config.boundary_weight)

    def _student_at(self, x_a: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return y_t for the target: the student's own, or its average's."""
        if self.target_ema is None:
            return self.student(x_a, None, t, cond)
        names = [name for name, p in self.student.named_parameters() if p.requires_grad]
        averaged = dict(zip(names, self.target_ema.shadow_params, strict=True))
        return torch.func.functional_call(self.student, averaged, (x_a, None, t, cond))

    def _count_residuals(self, residuals: Tensor, rho: Tensor, s: Tensor) -> None:
        sums, counts = objective.residual_by_time(residuals, rho, s, self.config.num_time_bins, self.teacher.spec.t_max)
        self._bins += torch.stack([sums, counts])

    def _stops(self) -> bool:
        """Return whether a stop was asked of any process: all stop after the same step, or they wait for each other."""
        if self.accelerator.num_processes > 1:
            asked = torch.tensor([float(self.stop_requested)], device=self.device)
            self.stop_requested = bool(self.accelerator.reduce(asked, "sum").item())
        return self.stop_requested

    def _count_nonfinite(self, loss: float, grad_norm: float) -> None:
        progress, limit = self.progress, self.config.max_nonfinite_steps
        if math.isfinite(loss) and (math.isfinite(grad_norm) or self.accelerator.scaler is not None):
            progress.nonfinite_in_row = 0
            return
        progress.nonfinite_in_row += 1
        progress.nonfinite_total += 1
        if progress.nonfinite_in_row >= limit:
            last = self.last_checkpoint
            good = f"the last good checkpoint is {last}" if last else "no checkpoint had been written"
            raise NonFiniteLossError(
                f"the loss was not finite {limit} times in a row, up to step {progress.step}; {good}. "
                "Lower --learning_rate, or use --mixed_precision bf16 or no"
            )

    # What is shown

    def validate(self) -> tuple[Path | None, float]:
        """Draw student beside teacher from the same noise; return (picture, RMS difference of the two).

        There is no picture of what cannot be shown in one, such as a video or a sound.
        """
        config, spec = self.config, self.teacher.spec
        seeds = range(VALIDATION_SEED, VALIDATION_SEED + config.num_validation_images)
        cond = self.conditions.grid(len(seeds))
        with self.accelerator.autocast():
            if self._teacher_images is None:
                generate = teacher_generator(self.teacher, num_steps=config.num_teacher_steps, device=self.device)
                self._teacher_images = generate_images(generate, seeds, spec.sample_shape, cond)
            with self.averaged():
                generate = student_generator(self.student, t=config.t_min, device=self.device)
                images = generate_images(generate, seeds, spec.sample_shape, cond)
        rms = float((images - self._teacher_images).square().mean().sqrt())
        if not self.accelerator.is_main_process:
            return None, rms
        rows = {f"teacher, {config.num_teacher_steps} steps": self._teacher_images, "student, 1 step": images}
        rows = {caption: self._decoded(row) for caption, row in rows.items()}
        if not pictures.can_be_shown(next(iter(rows.values())).shape[1:]):
            return None, rms
        path = config.output_dir / "samples" / f"step-{self.progress.step:06d}.png"
        pictures.save_rows(rows, path, title=f"step {self.progress.step}", columns=self.conditions.captions)
        for tracker in self.accelerator.trackers if self.config.report_to else ():
            if hasattr(tracker, "log_images"):
                # Of accelerate's trackers only this one expects the channels first unless told.
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": pictures.read_pixels(path)[None]}, step=self.progress.step, **layout)
        return path, rms

    def _decoded(self, samples: Tensor) -> Tensor:
        """Return samples as images, one by one: a decoder needs far more memory than the network."""
        return torch.cat([self.student.teacher.decode(row[None]).cpu() for row in samples])

    def averaged(self) -> Any:
        """Return a context in which the student has its averaged weights."""
        return _Averaged(self.ema, self.student)

    def _write_log(self, log: StepLog) -> None:
        sums, counts = self._bins
        log.residual_by_time = [float(a / n) if n else None for a, n in zip(sums, counts, strict=True)]
        self._bins.zero_()
        if not self.accelerator.is_main_process:
            return
        record = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(log).items() if v is not None}
        path = self.config.output_dir / "logs" / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record)) + "\n")
        if self.config.report_to:
            scalars = {k: v for k, v in record.items() if isinstance(v, float) and k != "step"}
            bins = {f"residual/{i}": v for i, v in enumerate(log.residual_by_time) if v is not None}
            self.accelerator.log({**scalars, **bins}, step=log.step)

    # Checkpoints

    def save(self) -> Path:
        """Write a checkpoint of everything the run needs to go on exactly; return its folder."""
        generators = self.accelerator.gather(self.generator.get_state()[None].to(self.device)).cpu()
        folder = self.config.output_dir / f"checkpoint-{self.progress.step}"
        if self.accelerator.is_main_process:
            names = [name for name, p in self.student.named_parameters() if p.requires_grad]
            tensors: dict[str, dict[str, Tensor]] = {
                "student": {name: p for name, p in self.student.named_parameters() if p.requires_grad},
                "optimizer": flatten_optimizer(self.optimizer),
                "random": {str(i): state for i, state in enumerate(generators)},
            }
            averages = {"ema": self.ema, "target_ema": self.target_ema}
            for group, average in averages.items():
                if average is not None:
                    tensors[group] = dict(zip(names, average.shadow_params, strict=True))
            values = {
                "progress": asdict(self.progress),
                "averages": {group: a.optimization_step for group, a in averages.items() if a is not None},
                "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
                "teacher_fingerprint": self.teacher_fingerprint,
                "prompts_fingerprint": self.prompts_fingerprint,
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
        tensors, values = checkpoint.tensors, checkpoint.values
        load_student(self.student, tensors["student"])
        restore_optimizer(self.optimizer, tensors["optimizer"], values["learning_rates"])
        self.progress = Progress(**values["progress"])
        self.generator.set_state(tensors["random"][str(self.accelerator.process_index)])
        # By name: a safetensors file lists its tensors in an order of its own.
        names = [name for name, p in self.student.named_parameters() if p.requires_grad]
        for group, average in {"ema": self.ema, "target_ema": self.target_ema}.items():
            if average is not None:
                average.shadow_params = [tensors[group][name].to(self.device) for name in names]
                average.optimization_step = values["averages"][group]
        if self.accelerator.scaler is not None and values["scaler"]:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        self.lr_scheduler.last_epoch = self.progress.step
        self.lr_scheduler._step_count = self.progress.step + 1
        self.cut_log()

    def cut_log(self) -> None:
        """Drop the lines that an interrupted run wrote after the checkpoint: those steps come again."""
        path = self.config.output_dir / "logs" / "metrics.jsonl"
        if not self.accelerator.is_main_process or not path.is_file():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.progress.step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(path)


def load_student(student: Student, tensors: dict[str, Tensor]) -> None:
    """Put trained parameters into a student.

    Raises:
        ValueError: If they are not this student's.
    """
    trained = dict(student.named_parameters())
    if set(tensors) != {name for name, p in trained.items() if p.requires_grad}:
        raise ValueError("the checkpoint's tensors are not this student's: another teacher, or other settings")
    with torch.no_grad():
        for name, value in tensors.items():
            trained[name].copy_(value)


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


class _Averaged:
    """Swaps the averaged weights in and the trained ones back."""

    def __init__(self, ema: EMAModel | None, student: Student) -> None:
        self.ema, self.parameters = ema, [p for p in student.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)

    def __exit__(self, *_: object) -> None:
        if self.ema is not None:
            self.ema.restore(self.parameters)


def _average(parameters: list[torch.nn.Parameter], decay: float, *, fixed: bool = False) -> EMAModel | None:
    if decay == 0:
        return None
    return EMAModel(parameters, decay=decay, min_decay=decay if fixed else 0.0, foreach=True)


def _finite(value: Any) -> Any:
    """Return `value` with non-finite floats as strings, since JSON has none."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
