"""What a report is made of: the rows of its table, and how their numbers were made."""

from __future__ import annotations

from pydantic import Field

from onestill.core.reading import OwnFile


class EvaluationProtocol(OwnFile):
    """How the numbers were made: what has to be equal before two numbers may be compared.

    Attributes:
        teacher: The teacher's name or path.
        student: The student's name or path.
        extractor: The extractor's name (`FeatureExtractor.name`).
        feature_dim: D, the length of a feature.
        num_images: Generated images per row.
        reference: What the generated images are compared with.
        num_reference_images: How many of those; None where a file of a mean and a covariance does not say.
        seeds: The seeds of the generated images, for example `0..4999`.
        guidance_scale: w in u + w (c - u); 1 is no guidance, None is an unconditional teacher.
        device: What the speeds were measured on.
        dtype: Precision of the networks; `onestill evaluate` runs them as they were loaded, in float32.
        clip_model: The model of `Row.clip_score`.
        large_batch_size: The batch size of `Row.images_per_second_large`; None where no speed was measured.
        kernel_subset_size: Rows per subset of the kernel distance.
        kernel_num_subsets: Subsets of the kernel distance.
        neighbours: k of precision and recall.
        resamples: Of the bootstrap that `Row.intervals` are made by.
        speedup_over: The row that `Row.speedup` is relative to.
        versions: Versions of the packages that were involved.
        notes: Anything else that a reader has to know.
    """

    teacher: str
    student: str | None = None
    extractor: str
    feature_dim: int
    num_images: int
    reference: str
    num_reference_images: int | None = None
    seeds: str
    guidance_scale: float | None = None
    device: str = "cpu"
    dtype: str = "float32"
    clip_model: str | None = None
    large_batch_size: int | None = None
    kernel_subset_size: int | None = None
    kernel_num_subsets: int | None = None
    neighbours: int | None = None
    resamples: int | None = None
    speedup_over: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the protocol as short lines of text, as printed beneath every table."""
        scale = self.guidance_scale
        guidance = "" if scale is None else f", guidance scale {scale:g} (1 = none)"
        of = "" if self.num_reference_images is None else f"{self.num_reference_images:,} images: "
        lines = [
            f"teacher {self.teacher}" + (f", student {self.student}" if self.student else ""),
            f"{self.num_images:,} images per row, seeds {self.seeds}{guidance}",
            f"compared with {of}{self.reference}",
            f"features {self.extractor}, D = {self.feature_dim}",
        ]
        if self.kernel_subset_size and self.kernel_num_subsets:
            lines[-1] += f", KD over {self.kernel_num_subsets} subsets of {self.kernel_subset_size:,}"
        if self.neighbours:
            lines[-1] += f", k = {self.neighbours}"
        if self.resamples:
            lines.append(f"± half of the 95% interval over {self.resamples:,} resamples of a row's images")
        if self.clip_model:
            lines.append(f"CLIP score with {self.clip_model}: mean of max(100 cos, 0)")
        if self.large_batch_size:
            lines.append(f"speed on {self.device}, {self.dtype}, batches of 1 and {self.large_batch_size:,}")
        if self.versions:
            lines.append(", ".join(f"{name} {number}" for name, number in self.versions.items()))
        return lines + list(self.notes)


class Row(OwnFile):
    """One sampler's numbers; None where something was not measured.

    Attributes:
        name: For example `teacher DDIM` or `student`.
        is_student: Whether this is the distilled student; such rows are set in bold.
        num_steps: Steps of the sampler.
        network_evaluations: Evaluations of the network per image; guidance makes two of one step.
        frechet_distance: Lower is better.
        kernel_distance: Lower is better; may be negative.
        kernel_distance_std: Its standard deviation over the subsets.
        precision: Share of generated images within the real manifold.
        recall: Share of real images within the generated manifold.
        label_accuracy: Share of images that show their label.
        prompt_accuracy: Share of judged images on which each head of the classifier sees what the prompt says, by
            the head's name, and first, as `all`, on which every head does.
        inception_score: Higher is better; only of the Inception network's logits.
        clip_score: Mean of max(100 cos, 0) between images and prompts, in 0..100.
        images_per_second: At batch 1.
        images_per_second_large: At `EvaluationProtocol.large_batch_size`.
        speedup: How many times faster than `EvaluationProtocol.speedup_over`, measured in turns with it.
        intervals: The 95% intervals of numbers above by their names, those of `prompt_accuracy` as `prompt_accuracy.all`:
            how they would change if other images of the same classes had been drawn, the reference kept. Recall has
            none: which real images the generated ones reach is no mean over these. Nor have speeds.
    """

    name: str
    is_student: bool = False
    num_steps: int
    network_evaluations: int
    frechet_distance: float | None = None
    kernel_distance: float | None = None
    kernel_distance_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    label_accuracy: float | None = None
    prompt_accuracy: dict[str, float] | None = None
    inception_score: float | None = None
    clip_score: float | None = None
    images_per_second: float | None = None
    images_per_second_large: float | None = None
    speedup: float | None = None
    intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
