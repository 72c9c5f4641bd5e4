"""A cascade of two DeepFloyd IF stages at toy size: both teachers trained, both distilled, the second without data.

    python benchmarks/cascade.py --output_dir runs/cascade --picture docs/images/cascade.png

Pictures of a coloured shape on a coloured ground, with captions ("a red disc on grass"; each ground has a word of its
own, since a T5 of random weights hardly knows the order of words). Stage I, an
`IFPipeline`, draws 8x8 pixels and stage II, an `IFSuperResolutionPipeline`, enlarges them to 32x32; both read captions
through a frozen T5 of random weights. The distillation of stage II sees captions and what the distilled stage I draws.
What is in the output folder already is used again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

import onestill
from onestill.core.tensors import noise
from onestill.data.cascade import FirstStage, open_first_stage, second_noise
from onestill.diffusion.process import DiscreteVP
from onestill.evaluation import speed
from onestill.sampling import pictures
from onestill.sampling.generate import teacher_generator
from onestill.teachers.guidance import Thresholded
from onestill.teachers.load import load_teacher
from onestill.teachers.pipelines.teacher import PipelineTeacher

SMALL, LARGE, LEVEL = 8, 32, 250
PALETTE = {
    "red": (220, 40, 40),
    "green": (40, 160, 70),
    "blue": (45, 75, 220),
    "yellow": (250, 220, 50),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
GROUNDS = {"brick": "red", "grass": "green", "sea": "blue", "sand": "yellow", "snow": "white", "coal": "black"}
SHAPES = ("disc", "square", "triangle")
CAPTIONS = [f"a {c} {s} on {g}" for c in PALETTE for s in SHAPES for g, b in GROUNDS.items() if b != c]
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})
WIDTH = 32
VARIANTS = 40


def colours(names: list[str]) -> Tensor:
    return torch.tensor([PALETTE[name] for name in names])[:, :, None, None] / 127.5 - 1


def draw(captions: list[str], generator: torch.Generator, size: int = LARGE) -> Tensor:
    """Return pictures [N, 3, size, size] in [-1, 1] of captions, the shape somewhere near the middle."""
    words = [caption.split() for caption in captions]
    num, grid = len(captions), (torch.arange(size) + 0.5) / size * 2 - 1
    centre = 0.3 * (2 * torch.rand(num, 2, 1, 1, generator=generator) - 1)
    radius = 0.4 + 0.15 * torch.rand(num, 1, 1, generator=generator)
    x, y = grid[None, None, :] - centre[:, 0], grid[None, :, None] - centre[:, 1]
    disc = (x.square() + y.square()).sqrt() - radius
    square = torch.maximum(x.abs(), y.abs()) - 0.85 * radius
    triangle = torch.maximum(0.87 * x.abs() - 0.5 * y, y) - 0.6 * radius
    distance = torch.stack(
        [{"disc": disc, "square": square, "triangle": triangle}[w[2]][i] for i, w in enumerate(words)]
    )
    inside = (0.5 - distance * size / 2).clamp(0, 1)[:, None]
    return torch.lerp(colours([GROUNDS[w[4]] for w in words]), colours([w[1] for w in words]), inside)


def shrink(images: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(images, (SMALL, SMALL), mode="area")


def text_parts() -> dict[str, Any]:
    """Return a tokenizer of the captions' words and a T5 of random weights."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )
    torch.manual_seed(0)
    text = T5Config(
        vocab_size=len(vocabulary), d_model=WIDTH, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    optional = dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))
    encoder = T5EncoderModel(text).eval()
    return {"tokenizer": tokenizer, "text_encoder": encoder, "requires_safety_checker": False, **optional}


def network(size: int, channels: int, widths: tuple[int, ...], **config: Any) -> UNet2DConditionModel:
    """Return IF's kind of U-Net, with attention at its last level only."""
    plain = len(widths) - 1
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=channels,
        out_channels=6,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D",) * plain + ("SimpleCrossAttnDownBlock2D",),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) + ("ResnetUpsampleBlock2D",) * plain,
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        attention_head_dim=16,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        encoder_hid_dim=WIDTH,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        **config,
    )


def scheduler(largest: float) -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        prediction_type="v_prediction",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=largest,
    )


def train_teacher(pipeline: Any, folder: Path, num_steps: int, batch_size: int, *, enlarges: bool) -> None:
    """Train a pipeline's U-Net on drawn pictures and save the pipeline."""
    unet, generator = pipeline.unet.train(), torch.Generator().manual_seed(0)
    process = DiscreteVP(pipeline.scheduler.alphas_cumprod)
    with torch.no_grad():
        embedded = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, device="cpu")[0]
        empty = pipeline.encode_prompt("", do_classifier_free_guidance=False, device="cpu")[0]
    shown = [caption for caption in CAPTIONS for _ in range(VARIANTS)]
    drawn = draw(shown, generator)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps, pct_start=0.05)
    for step in range(num_steps):
        rows = torch.randint(len(CAPTIONS), (batch_size,), generator=generator)
        x_0 = drawn[rows * VARIANTS + torch.randint(VARIANTS, (batch_size,), generator=generator)]
        steps = torch.randint(1000, (batch_size,), generator=generator)
        text = embedded[rows]
        text[torch.rand(batch_size, generator=generator) < 0.1] = empty
        given: dict[str, Any] = {}
        if enlarges:
            large = torch.nn.functional.interpolate(shrink(x_0), (LARGE, LARGE), mode="bilinear", align_corners=True)
            given["class_labels"] = torch.full((batch_size,), LEVEL)
            blur = torch.randn(large.shape, generator=generator)
            low_res = pipeline.image_noising_scheduler.add_noise(large, blur, given["class_labels"])
        else:
            x_0 = shrink(x_0)
        eps = torch.randn(x_0.shape, generator=generator)
        alpha, sigma = (v.float()[:, None, None, None] for v in process.alpha_sigma((steps.double() + 1) / 1000))
        x_t = alpha * x_0 + sigma * eps
        sees = torch.cat([x_t, low_res], 1) if enlarges else x_t
        v = unet(sees, steps, encoder_hidden_states=text, **given).sample[:, :3]
        loss = (v - (alpha * eps - sigma * x_0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"{folder.name} {step + 1}: {loss.item():.4f}", flush=True)
    unet.eval()
    pipeline.save_pretrained(folder)


def make_teachers(folder: Path, num_steps: tuple[int, int]) -> None:
    """Train both stages, unless they are there."""
    if not (folder / "stage-1" / "model_index.json").is_file():
        torch.manual_seed(1)
        one = IFPipeline(unet=network(SMALL, 3, (32, 64)), scheduler=scheduler(1.5), **text_parts())
        train_teacher(one, folder / "stage-1", num_steps[0], 32, enlarges=False)
    if not (folder / "stage-2" / "model_index.json").is_file():
        torch.manual_seed(2)
        two = IFSuperResolutionPipeline(
            unet=network(LARGE, 6, (16, 32, 48), class_embed_type="timestep"),
            scheduler=scheduler(1.0),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            **text_parts(),
        )
        train_teacher(two, folder / "stage-2", num_steps[1], 12, enlarges=True)


def distil(folder: Path, stage: int, num_steps: int, batch_size: int, seed: int, **settings: Any) -> Path:
    """Distil a stage, unless that has been done; return the run."""
    run = folder / f"student-{stage}"
    if not (run / "pipeline").is_dir():
        onestill.distill(
            folder / f"stage-{stage}",
            run,
            prompt_file=folder / "prompts.txt",
            prompt_cache_dir=folder / "prompts",
            max_train_steps=num_steps,
            train_batch_size=batch_size,
            learning_rate=1e-3,
            lr_scheduler="cosine",
            bootstrap_weight="none",
            boundary_weight=0.0,
            delta=0.08,
            anchor_fraction=0.5,
            anchor_path_fraction=0.0,
            anchor_solver="midpoint",
            num_anchor_steps=8,
            corrector_fraction=0.0,
            validation_steps=10**6,
            num_validation_images=8,
            num_teacher_steps=20,
            seed=seed,
            device="cpu",
            **settings,
        )
    return run


def thresholded(folder: Path) -> tuple[PipelineTeacher, Any]:
    teacher = load_teacher(folder)
    assert isinstance(teacher, PipelineTeacher)
    return teacher, Thresholded(teacher, teacher.spec.threshold)


class Cascades:
    """Both cascades on the same noises: the teachers' in many steps, the students' in one each."""

    def __init__(self, folder: Path, num_steps: int) -> None:
        self.base: FirstStage = open_first_stage(folder / "student-1")
        second = load_teacher(folder / "student-2" / "pipeline")
        self.one, one = thresholded(folder / "stage-1")
        self.two, two = thresholded(folder / "stage-2")
        assert isinstance(second, PipelineTeacher)
        self.second = second
        self.many_1 = teacher_generator(one, num_steps=num_steps)
        self.many_2 = teacher_generator(two, num_steps=num_steps)
        self.calls = {"stage I": 0, "stage II": 0, "student I": 0, "student II": 0}
        networks = (self.one.network, self.two.network, self.base.teacher.network, self.second.network)
        for name, module in zip(self.calls, networks, strict=True):
            # After a pass: those that only show what a prompt becomes end before it.
            module.register_forward_hook(lambda *_, name=name: self._count(name))  # type: ignore[attr-defined]

    def _count(self, name: str) -> None:
        self.calls[name] += 1

    def small_by_teacher(self, seeds: range, captions: list[str]) -> Tensor:
        return self.many_1(self.base.noise(seeds), self.one.encode(captions)).clamp(-1, 1)

    def small_by_student(self, seeds: range, captions: list[str]) -> Tensor:
        return self.base.seeded(seeds, captions)

    def _rows(self, small: Tensor, seeds: range, captions: list[str]) -> dict[str, Tensor]:
        blur = second_noise(seeds, (3, LARGE, LARGE))
        return {**self.two.encode(captions), **self.two.picture_rows(small, blur)}

    def large_by_teacher(self, small: Tensor, seeds: range, captions: list[str]) -> Tensor:
        return self.many_2(noise(seeds, (3, LARGE, LARGE)), self._rows(small, seeds, captions)).clamp(-1, 1)

    def large_by_student(self, small: Tensor, seeds: range, captions: list[str]) -> Tensor:
        rows = self._rows(small, seeds, captions)
        return self.second.one_step(noise(seeds, (3, LARGE, LARGE)), rows).clamp(-1, 1)


def colour_accuracy(images: Tensor, captions: list[str]) -> float:
    """Return the share of pictures whose middle and whose corners have the caption's colours."""
    palette = torch.tensor(list(PALETTE.values())) / 127.5 - 1
    names, half = list(PALETTE), images.shape[-1] // 2
    middle = images[:, :, half - 1 : half + 1, half - 1 : half + 1].mean((2, 3))
    corners = torch.stack([images[:, :, y, x] for y in (0, -1) for x in (0, -1)]).mean(0)
    wanted = torch.tensor([[names.index(c.split()[1]), names.index(GROUNDS[c.split()[4]])] for c in captions])
    found = torch.stack([torch.cdist(values, palette).argmin(1) for values in (middle, corners)], 1)
    return float((found == wanted).all(1).float().mean())


def rms(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/cascade"))
    parser.add_argument("--picture", type=Path, default=Path("cascade.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher_steps", type=int, nargs=2, default=(3000, 1000))
    parser.add_argument("--student_steps", type=int, nargs=2, default=(1200, 500))
    parser.add_argument("--num_test", type=int, default=60)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    folder: Path = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")

    spent: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> None:
        started = time.process_time()
        work()
        if (seconds := time.process_time() - started) > 1:  # what was there already took none
            spent[name] = seconds / 60

    timed("both teachers", lambda: make_teachers(folder, tuple(args.teacher_steps)))
    timed("student I", lambda: distil(folder, 1, args.student_steps[0], 32, args.seed, num_anchors=2304))
    base = folder / "student-1"
    timed(
        "student II",
        lambda: distil(folder, 2, args.student_steps[1], 12, args.seed, num_anchors=512, base_student=base),
    )

    cascades = Cascades(folder, args.num_inference_steps)
    seeds = range(args.num_test)
    captions = [CAPTIONS[(7 * i) % len(CAPTIONS)] for i in seeds]
    small_many = cascades.small_by_teacher(seeds, captions)
    large_many = cascades.large_by_teacher(small_many, seeds, captions)
    small_one = cascades.small_by_student(seeds, captions)
    before = dict(cascades.calls)
    mixed = cascades.large_by_teacher(small_one, seeds, captions)
    cascades.calls.update(before)
    large_one = cascades.large_by_student(small_one, seeds, captions)
    calls = dict(cascades.calls)

    def both(many: bool) -> Callable[[], object]:
        def call() -> object:
            small = (
                cascades.small_by_teacher(seeds[:16], captions[:16])
                if many
                else cascades.small_by_student(seeds[:16], captions[:16])
            )
            enlarge = cascades.large_by_teacher if many else cascades.large_by_student
            return enlarge(small, seeds[:16], captions[:16])

        return call

    seconds = speed.compare({"many": both(True), "one": both(False)}, repeats=3)
    n = args.num_inference_steps
    data = draw(captions, torch.Generator().manual_seed(1))
    print(f"core-minutes: { {k: round(v, 2) for k, v in spent.items()} }")
    print(f"network calls for {args.num_test} pictures in one batch: {calls}")
    print("| what | measured |\n|---|---|")
    print(f"| student I against teacher I ({n} steps), RMS | {rms(small_one, small_many):.3f} |")
    print(f"| student II against teacher II ({n} steps) on the same 8x8 pictures, RMS | {rms(large_one, mixed):.3f} |")
    print(f"| cascade of students against cascade of teachers, RMS | {rms(large_one, large_many):.3f} |")
    print(f"| cascade of teachers against other data of the same captions, RMS | {rms(large_many, data):.3f} |")
    for name, images in {f"teachers, {n} + {n} steps": large_many, "students, 1 + 1": large_one, "data": data}.items():
        print(f"| both colours as the caption says: {name} | {colour_accuracy(images, captions):.3f} |")
    print(
        f"| time of the cascades, {n} + {n} steps against 1 + 1, batches of 16 | {seconds['many'] / seconds['one']:.1f} x |"
    )
    shown = slice(0, 8)
    up = lambda small: torch.nn.functional.interpolate(small[shown], (LARGE, LARGE), mode="nearest")  # noqa: E731
    rows = {
        f"teacher I, {n} steps": up(small_many),
        f"teacher I + II, {n} + {n} steps": large_many[shown],
        "student I, 1 step": up(small_one),
        "student I + II, 1 + 1 steps": large_one[shown],
    }
    pictures.save_rows(rows, args.picture, title="same noise in every column", columns=tuple(captions[shown]))
    print(args.picture)


if __name__ == "__main__":
    main()
