"""Whether two trees of the source train, save and export the same bits: what a refactor must leave as it was.

python benchmarks/identical.py compare --commit 951789a       # that commit, then this tree, and the table; exit code 1
python benchmarks/identical.py run --source src --output reference.json              # one tree alone, to keep
python benchmarks/identical.py compare --reference reference.json                    # this tree against what was kept

Each setting is a run of 50 steps in processes of its own: one thread, a fixed seed, PYTHONPATH at the tree's `src`.
Only the command line and the package's public names are used, so that the trees may be laid out differently. Equal
means a == b, not |a - b| small:

losses, gradient norms   after every step k, L_k and |grad L_k| of logs/metrics.jsonl, all digits
residual profile         the mean of |y_s - target|^2 / rho^2 in every bin of target time, after every step
learning rates, RMS      the other numbers of that file; times are left out
training state           sha256 of each tensor of the last checkpoint (weights, optimiser, generators, the target's
                         average) and of the anchors, whatever it is called and whichever file it is in
averages                 the same of the averages of the weights that are exported and shown in pictures
exported files           names below the exported folder; sha256 of each but weights, without lines of times and places
                         and without the mark of a student, which that commit did not write
exported tensors         sha256 of each tensor in every safetensors file there, LoRA included: the final weights
pictures                 sha256 of samples/*.png

Sums on another processor or of another torch come out differently, so a kept file holds for its own environment alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Columns = dict[str, dict[str, Any]]
Report = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
STEPS = 50
COMMON: dict[str, Any] = {
    # What was the default of every commit up to 7a32d07.
    "anchor_fraction": 0.0, "boundary_weight": 1.0, "bootstrap_weight": "velocity",
    "lr_scheduler": "constant_with_warmup", "max_train_steps": STEPS, "train_batch_size": 16, "learning_rate": 1e-3, "lr_warmup_steps": 5, "seed": 3,
    "device": "cpu", "logging_steps": 1, "checkpointing_steps": 20, "checkpoints_total_limit": 1,
    "validation_steps": 30, "num_validation_images": 4, "num_teacher_steps": 3,
}  # fmt: skip
ANCHORS: dict[str, Any] = {"anchor_fraction": 0.25, "num_anchors": 64, "num_anchor_steps": 4}
# Passed to a tree that has such a setting: in one that has not it is off.
NEW: dict[str, Any] = {"corrector_fraction": 0.0, "anchor_path_fraction": 0.0, "anchor_solver": "midpoint"}
GLYPHS: dict[str, Any] = {"teacher": "glyphs", "guidance_scale": 3.0, "train_batch_size": 8}
# "own" is trained in Python, "digits stopped" is stopped by a signal and resumed; the rest is the command line's.
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {},
    "digits paper": {
        "boundary_weight": 0.0, "time_sampling": "uniform", "solver": "ddim", "bootstrap_weight": "inverse_rho",
    },
    "digits progressive": {
        "time_sampling": "progressive", "ema_target_decay": 0.99, "gradient_accumulation_steps": 2,
        "bootstrap_weight": "none", "lr_scheduler": "cosine",
    },
    "digits anchors": ANCHORS,
    "digits guided": {"guidance_scale_min": 1.0, "guidance_scale_max": 4.0, "thresholding": "dynamic"},
    "digits bf16": {"mixed_precision": "bf16", "gradient_checkpointing": True, "ema_width": 0.0},
    "digits stopped": {},
    "glyphs": GLYPHS,
    "glyphs LoRA": {**GLYPHS, "lora_rank": 4, "lora_alpha": 8.0},
    "glyphs Heun anchors": {**GLYPHS, **ANCHORS, "solver": "heun"},
    "own": {"teacher": "own", "null_class": 3, "guidance_scale": 2.0},
}  # fmt: skip
# Flags of `export` for a second folder, from the checkpoint: another guidance scale and target time baked in.
EXPORTS: dict[str, dict[str, Any]] = {"digits guided": {"guidance_scale": 3.0, "target_time": 0.4}}
METRICS = {
    "losses": ("loss",),
    "gradient norms": ("grad_norm",),
    "residual profile": ("residual_by_time",),
    "learning rates, RMS": ("learning_rate", "nonfinite_steps", "validation_rms"),
}
LEFT_OUT = (b"- Training:", b'"_name_or_path":')
"""Starts of lines of exported files: how long the run took, and where diffusers has read the teacher from."""

MARK = "onestill.json"
"""Says that a folder is a student's. The commit compared with guessed that from weights, and wrote the head of a module's
student here, so this one file is left out."""


class Own(nn.Module):
    """A network that is nobody's: no time embedding, a layer without bias, classes."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(4, 8)
        self.first = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.mix = nn.Linear(8, 8)
        self.last = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, net_time: Tensor, class_labels: Tensor) -> Tensor:
        time_plane = (net_time / 1000).to(x.dtype)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        h = nn.functional.silu(self.first(torch.cat([x, time_plane], 1)) + self.classes(class_labels)[:, :, None, None])
        return self.last(nn.functional.silu(h + self.mix(h.mean((2, 3)))[:, :, None, None]))


def distil_own(output_dir: Path, settings: dict[str, Any]) -> None:
    """Distil `Own` of random weights, in Python."""
    import onestill

    torch.manual_seed(0)
    null = settings.pop("null_class")
    teacher = onestill.module_teacher(
        Own(), onestill.CosineVP(), "v_prediction", (1, 8, 8), num_classes=null, null_class=null
    )
    onestill.distill(teacher, output_dir, show_progress=False, **settings)


# A run


def environment(source: Path) -> dict[str, str]:
    """Return the environment of the child processes: this tree, one thread, no network."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    own = {"PYTHONPATH": str(source), "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **threads, **own}


def flags(settings: dict[str, Any]) -> list[str]:
    return [
        part
        for name, value in settings.items()
        for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def call(command: list[str], source: Path, folder: Path, *, stop_after: int | None = None) -> None:
    """Run a command on a tree in `folder`, stopped by SIGTERM once it has logged so many steps if asked."""
    log, metrics = folder / "output.txt", folder / "run" / "logs" / "metrics.jsonl"
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(command, env=environment(source), cwd=folder, stdout=file, stderr=file)
        try:
            while stop_after is not None and process.poll() is None:
                if metrics.is_file() and len(metrics.read_bytes().splitlines()) >= stop_after:
                    process.send_signal(signal.SIGTERM)
                    break
                time.sleep(0.01)
            code = process.wait()
        finally:
            process.kill()
    expected = 0 if stop_after is None else 128 + signal.SIGTERM
    if code != expected:
        raise SystemExit(f"{' '.join(command)}\nended with {code}, not {expected}:\n{log.read_text(encoding='utf-8')}")


def run_setting(name: str, source: Path, folder: Path) -> Columns:
    """Distil one setting with the source of a tree and return what came of it."""
    run, onestill = folder / "run", [sys.executable, "-m", "onestill"]
    settings = {"teacher": "digits", **COMMON, **SETTINGS[name]}
    if "ema_width" in settings and not any("ema_width" in path.read_text() for path in source.rglob("config.py")):
        settings["ema_decay"] = settings.pop("ema_width")  # 0 is none under both names
    text = "".join(path.read_text(encoding="utf-8") for path in (source / "onestill" / "objectives").glob("*.py"))
    settings = {**{setting: value for setting, value in NEW.items() if f" {setting}: " in text}, **settings}
    if "solver" in SETTINGS[name] and "anchor_solver" in settings:
        settings["anchor_solver"] = SETTINGS[name]["solver"]
    if settings["teacher"] == "own":
        own = json.dumps({key: value for key, value in settings.items() if key != "teacher"})
        call([sys.executable, str(Path(__file__).resolve()), "own", str(run), own], source, folder)
    else:
        cache = {"prompt_cache_dir": folder / "prompts"} if settings["teacher"] == "glyphs" else {}
        command = [*onestill, "distill", *flags({**settings, **cache, "output_dir": run})]
        if name == "digits stopped":
            call(command, source, folder, stop_after=STEPS // 2)
            command += ["--resume_from_checkpoint", "latest"]
        call(command, source, folder)
    exported = {"pipeline": run / "pipeline"}
    if name in EXPORTS:
        exported["export"] = folder / "export"
        given = {"student": run / f"checkpoint-{STEPS}", "output": exported["export"], **EXPORTS[name]}
        call([*onestill, "export", *flags(given)], source, folder)
    return collect(run, exported)


def run_tree(source: Path, names: list[str]) -> Report:
    """Run settings with the source of a tree and return everything that is compared."""
    source = source.resolve()
    said = [sys.executable, "-c", "import onestill; print(onestill.__file__)"]
    found = subprocess.run(said, env=environment(source), check=True, capture_output=True, text=True).stdout.strip()
    if not Path(found).resolve().is_relative_to(source):
        raise SystemExit(f"--source {source} is not what is imported, but {found}")
    report: Report = {"environment": machine(), "settings": {}}
    for name in names:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            report["settings"][name] = run_setting(name, source, Path(folder).resolve())
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return report


def machine() -> dict[str, str]:
    """Return what the bits depend on besides the source."""
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "peft")}
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"python": platform.python_version(), "cpu": cpu, **packages}


# What came of it


def collect(run: Path, exported: dict[str, Path]) -> Columns:
    lines = (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = {f"step {record['step']}": record for record in map(json.loads, lines)}
    if len(lines) != STEPS or len(steps) != STEPS:
        raise SystemExit(f"{run} logged {len(lines)} lines of {len(steps)} steps, not {STEPS}")
    columns: Columns = {
        # The first name is in every line; the RMS is in those after a validation.
        column: {step: [record[names[0]], *map(record.get, names[1:])] for step, record in steps.items()}
        for column, names in METRICS.items()
    }
    inside = [path for path in run.rglob("*.safetensors") if not path.is_relative_to(run / "pipeline")]
    averages = [path for path in inside if path.parent.name == "averages" or path.stem.startswith("student-ema")]
    for column, paths in (("training state", set(inside) - set(averages)), ("averages", averages)):
        columns[column] = dict(sorted(Counter(digest(t) for path in paths for t in load_file(path).values()).items()))
    files: dict[str, str] = {}
    tensors: dict[str, str] = {}
    for label, folder in exported.items():
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARK):
            name = f"{label}/{path.relative_to(folder)}"
            files[name] = "weights" if path.suffix == ".safetensors" else file_digest(path)
            if path.suffix == ".safetensors":
                tensors |= {f"{name}: {key}": digest(value) for key, value in sorted(load_file(path).items())}
    columns |= {"exported files": files, "exported tensors": tensors}
    columns["pictures"] = {path.name: file_digest(path) for path in sorted((run / "samples").iterdir())}
    if not (tensors and columns["training state"] and columns["pictures"]):
        raise SystemExit(f"{run} has no exported tensors, no checkpoint or no pictures")
    return columns


def digest(tensor: Tensor) -> str:
    """Return a hash of a tensor's type, shape and bits."""
    bits = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + bits).hexdigest()[:16]


def file_digest(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix in (".md", ".json"):
        content = b"\n".join(line for line in content.split(b"\n") if not line.lstrip().startswith(LEFT_OUT))
    return hashlib.sha256(content).hexdigest()[:16]


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return "identical", or how many entries differ and the first of them."""
    differ = [key for key in {**old, **new} if old.get(key) != new.get(key) or (key in old) != (key in new)]
    if not differ:
        return "identical"
    first = differ[0]
    return f"{len(differ)} of {len({**old, **new})} differ: {first}: {old.get(first, 'absent')} / {new.get(first, 'absent')}"


def compare(old: Report, new: Report) -> bool:
    """Print the table; return whether everything is identical."""
    rows = {name: (old["settings"][name], new["settings"][name]) for name in new["settings"]}
    if {"digits", "digits stopped"} <= set(rows):
        rows["digits / digits stopped"] = (new["settings"]["digits"], new["settings"]["digits stopped"])
    names = list(dict.fromkeys(column for pair in rows.values() for columns in pair for column in columns))
    print(f"| setting | {' | '.join(names)} |\n{'|---' * (len(names) + 1)}|")
    same = True
    for name, (before, after) in rows.items():
        cells = [difference(before.get(column, {}), after.get(column, {})) for column in names]
        same &= set(cells) == {"identical"}
        print(f"| {name} | {' | '.join(cells)} |")
    return same


def run_commit(commit: str, names: list[str]) -> Report:
    """Run settings with the source of a commit, in a worktree that is removed again."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            return run_tree(tree / "src", names)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one, two = commands.add_parser("run"), commands.add_parser("compare")
    for command in (one, two):
        command.add_argument("--source", type=Path, default=ROOT / "src", help="folder that has the package `onestill`")
        command.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    one.add_argument("--output", type=Path, required=True, help="JSON file to write")
    two.add_argument("--commit", default="951789a", help="what the source is compared with")
    two.add_argument("--reference", type=Path, help="what `run` wrote of that commit, in the place of running it again")
    own = commands.add_parser("own")  # which this script calls itself
    own.add_argument("output_dir", type=Path)
    own.add_argument("settings", type=json.loads)
    args = parser.parse_args()
    if args.command == "own":
        distil_own(args.output_dir, args.settings)
    elif args.command == "run":
        args.output.write_text(json.dumps(run_tree(args.source, args.only), indent=1) + "\n", encoding="utf-8")
    else:
        old = json.loads(args.reference.read_text()) if args.reference else run_commit(args.commit, args.only)
        if old["environment"] != machine():
            parser.error(f"--reference {args.reference} is of {old['environment']}, this is {machine()}")
        if missing := set(args.only) - set(old["settings"]):
            parser.error(f"--reference {args.reference} has no {', '.join(sorted(missing))}")
        sys.exit(0 if compare(old, run_tree(args.source, args.only)) else 1)


if __name__ == "__main__":
    main()
