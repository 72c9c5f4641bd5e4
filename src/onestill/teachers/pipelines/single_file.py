"""A whole pipeline in one safetensors file, as A1111, Kohya and CivitAI hand them round, made into a folder once.

Such a file holds weights under the names of the original training code, and no configuration: which tokenizer, which
schedule, how many heads. That comes from a folder of the same architecture, whose weights are not needed: one that is
named, or the one that diffusers knows for the file's kind, where the hub's cache has it. What the file lacks, such as a
third text encoder, is taken from there too. The folder that is made is kept, so that a run is resumed from the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
from diffusers.loaders import single_file_utils as stock
from safetensors import safe_open
from torch import nn

from onestill.core.errors import SettingError, in_short, named
from onestill.core.files import PICKLE_SUFFIXES
from onestill.core.models import check_configs, held, within
from onestill.core.reading import loading, parse_yaml, read_mapping, read_text
from onestill.core.writing import write_text, written
from onestill.teachers.pipelines.folder import CHECKER, INDEX, component_class, pipeline_class

CONFIGURATION = ("*.json", "*.txt", "*.model")
"""What of a folder is its configuration: its weights are not needed."""
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
NETWORK_PREFIX = "model.diffusion_model."
# How the names of tensors in a file begin, for components that it may lack.
HELD = {
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.", "text_encoders.clip"),
    "text_encoder_3": ("text_encoders.t5",),
    "vae": ("first_stage_model.", "vae."),
}


def folder_of(file: Path, source: str, original_config: str | None, cache_dir: Path | None, *, offline: bool) -> Path:
    """Return the folder that a pipeline in one file is made into, under `cache_dir`; made if it is not there yet.

    Args:
        file: The file.
        source: The file as it was given.
        original_config: A folder of the same architecture or its hub id, or the YAML of the original training code;
            what the hub's cache has if None.
        cache_dir: Where it is made; ~/.cache/onestill/single_files if None.
        offline: Never ask the hub for the configuration of an id.

    Raises:
        SettingError: If it is no such file, its configuration is not to be had, or it does not fit.
    """
    shapes = _shapes(file, source)
    original = _read_original(original_config)
    given = None if original is not None else original_config
    config = _configuration_folder(_kind(shapes, source), source, given, offline=offline)
    place = (cache_dir or _default_cache_dir()) / f"{file.stem[:80]}-{_identity(file, config, original)}"
    if not (place / INDEX).is_file():
        lacking = _lacking(source, config, shapes)
        pipeline = _pipeline(file, source, config, original, shapes, tuple(lacking))
        with written(place) as partial:
            pipeline.save_pretrained(partial)
            for part in lacking:
                shutil.copytree(config / part, partial / part)
            index = {**read_mapping(partial / INDEX), **lacking}
            write_text(partial / INDEX, json.dumps(index, indent=2) + "\n")
    return place


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "onestill" / "single_files"


def _cannot(source: str, why: str, todo: str = "", name: str = "StableDiffusionPipeline") -> SettingError:
    """Return the complaint about a file, with the command that makes a folder of it where its owner can."""
    way = f"convert it once: {_conversion(source, name)}"
    return SettingError("teacher", source, why, f"{todo}{', or ' if todo else ''}{way}")


def _conversion(source: str, name: str = "StableDiffusionPipeline") -> str:
    return f"diffusers.{name}.from_single_file({source!r}).save_pretrained('FOLDER')"


def _shapes(file: Path, source: str) -> dict[str, SimpleNamespace]:
    """Return the shapes of a file's tensors by name, each as an attribute `shape`; nothing else of it is read."""
    if file.suffix in PICKLE_SUFFIXES:
        raise _cannot(source, "is a pickle, which can run code when it is opened", "give a .safetensors of it")
    if file.suffix != ".safetensors":
        raise SettingError(
            "teacher", source, "is a file", f"give the folder of a pipeline (with {INDEX}), or a .safetensors"
        )
    with loading(source), safe_open(file, framework="pt") as opened:
        return {name: SimpleNamespace(shape=tuple(opened.get_slice(name).get_shape())) for name in opened.keys()}  # noqa: SIM118 - not a dictionary


def _kind(shapes: Mapping[str, SimpleNamespace], source: str) -> str:
    """Return the hub id that diffusers knows for the architecture; SettingError if it is none that it knows."""
    if any(".lora_" in name or name.startswith("lora_") for name in shapes):
        todo = "fuse it into its pipeline (load_lora_weights, fuse_lora), and give what save_pretrained of that writes"
        raise SettingError("teacher", source, "is a LoRA, which is no whole network", todo)
    try:
        kind = stock.infer_diffusers_model_type(shapes)
    except (LookupError, AttributeError) as error:
        raise _cannot(source, f"is of no architecture that diffusers knows ({in_short(error)})") from error
    # What it does not know it takes for Stable Diffusion 1.
    if kind == "v1" and not any(name.startswith(NETWORK_PREFIX) for name in shapes):
        first = repr(min(shapes, default=""))
        why = f"is no whole pipeline in one file: its tensors are named as {first}"
        todo = f"give the folder of its whole pipeline (with {INDEX}), after putting it there if it is a part alone"
        whole = f"the file of a whole pipeline is made into a folder by {_conversion('FILE')}"
        raise SettingError("teacher", source, why, f"{todo}; {whole}")
    return str(stock.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])


def _read_original(original_config: str | None) -> dict[str, Any] | None:
    """Return the YAML of the original training code; None if another thing is named."""
    path = Path(original_config or "").expanduser()
    if original_config is None or not path.is_file():
        return None
    try:
        found = parse_yaml(read_text(path), "it")
        found["model"]["params"]["unet_config"]["params"], found["model"]["params"]["first_stage_config"]["params"]
    except (ValueError, LookupError, TypeError) as error:
        why = f"is no YAML of the original training code (model, params, unet_config): {in_short(error)}"
        raise SettingError("original_config", original_config, why) from error
    return dict(found)


def _configuration_folder(kind: str, source: str, given: str | None, *, offline: bool) -> Path:
    from huggingface_hub import snapshot_download

    if given is not None and (folder := Path(given).expanduser()).is_dir():
        if not (folder / INDEX).is_file():
            raise SettingError("original_config", given, f"has no {INDEX}", "give the folder of a diffusers pipeline")
        return folder.resolve()
    todo = "give the folder of a pipeline of the same architecture (its weights are not needed), or its hub id"
    if given is not None and not re.fullmatch(HUB_ID, given):
        raise SettingError("original_config", given, "no such file or folder", todo)
    patterns = [f"{where}{pattern}" for where in ("", "**/") for pattern in CONFIGURATION]
    try:
        # Nothing is downloaded but what an id is given for.
        asked = offline or given is None
        return Path(snapshot_download(given or kind, local_files_only=asked, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many unrelated types; each means "not to be had"
        if given is not None:
            why = f"is no folder, no YAML file, and the hub gave no such pipeline ({in_short(error, 100)})"
            raise SettingError("original_config", given, why, todo) from error
        why = f"holds weights alone, and the configuration of {kind} is not in the hub's cache"
        raise _cannot(source, why, f"name it with {named('original_config')}: {todo.removeprefix('give ')}") from error


def _identity(file: Path, config: Path, original: Mapping[str, Any] | None) -> str:
    """Return a hash of what decides the folder: the file, by its place, size and age, and the configuration, by content."""
    facts = file.stat()
    digest = hashlib.blake2b(f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns} {original}".encode(), digest_size=8)
    for path in sorted({path for pattern in CONFIGURATION for path in config.rglob(pattern)}):
        digest.update(str(path.relative_to(config)).encode() + path.read_bytes())
    return digest.hexdigest()


def _pipeline(
    file: Path,
    source: str,
    config: Path,
    original: Mapping[str, Any] | None,
    shapes: Mapping[str, SimpleNamespace],
    without: Sequence[str],
) -> Any:
    """Return the pipeline in a file, but for the components `without`, as its weights are stored."""
    index = read_mapping(config / INDEX)
    name = str(index.get("_class_name"))
    with loading(str(config)):
        cls = pipeline_class(name)
    _check_parts(config, index)
    if not hasattr(cls, "from_single_file"):
        raise SettingError("teacher", source, f"a {name} is read from no single file", "give its folder")
    parts = {**dict.fromkeys([*without, CHECKER]), **_scheduler(config, index, original, shapes)}
    given = {part: value for part, value in parts.items() if part in index}
    more = {} if original is None else {"original_config": dict(original)}
    try:
        with loading(source), within(*held([file])):
            pipeline = cls.from_single_file(str(file), config=str(config), local_files_only=True, **given, **more)
            _refuse_empty(pipeline)
    except ValueError as error:
        why = f"does not fit the configuration in {config}: {str(error).removeprefix(f'{source} cannot be read: ')}"
        todo = f"name that of its own architecture with {named('original_config')}"
        raise _cannot(source, in_short(ValueError(why), 400), todo, name) from error
    return pipeline


def _check_parts(config: Path, index: Mapping[str, Any]) -> None:
    """Raise ValueError if a component of the configuration needs code of its own, or its configuration is out of bounds."""
    for part, entry in index.items():
        if not part.startswith("_") and isinstance(entry, list) and entry != [None, None]:
            component_class(config, part, *entry)
            with loading(f"{config}: {part}/"):
                check_configs(config / part)


def _refuse_empty(pipeline: Any) -> None:
    """Raise ValueError if a tensor of a pipeline was not in its file."""
    for part, module in pipeline.components.items():
        weights = module.named_parameters() if isinstance(module, nn.Module) else ()
        if empty := [name for name, value in weights if value.is_meta]:
            raise ValueError(f"it lacks {len(empty)} of the tensors of the {part}, such as {empty[0]!r}")


def _lacking(source: str, config: Path, shapes: Mapping[str, SimpleNamespace]) -> dict[str, Any]:
    """Return the entries of the components that a file lacks and that the folder has; SettingError if it has not."""
    found = {part: entry for part, entry in read_mapping(config / INDEX).items() if _is_lacking(part, entry, shapes)}
    for part in found:
        if not any((config / part).glob("*.safetensors")):
            todo = f"name a folder that has them with {named('original_config')}"
            raise SettingError("teacher", source, f"holds no {part}, and {config}/{part} no safetensors of it", todo)
    return found


def _is_lacking(part: str, entry: Any, shapes: Mapping[str, SimpleNamespace]) -> bool:
    """Return whether a component is one that a file may lack, and this one does."""
    if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
        return False
    t5 = str(entry[1]).startswith(("T5", "UMT5"))
    known = "text_encoder_3" if t5 else "text_encoder" if part.startswith("text_encoder") else part
    prefixes = HELD.get(known)
    return prefixes is not None and not any(name.startswith(prefixes) for name in shapes)


def _scheduler(
    config: Path, index: Mapping[str, Any], original: Mapping[str, Any] | None, shapes: Mapping[str, SimpleNamespace]
) -> dict[str, Any]:
    """Return the scheduler as the YAML, or a marker in the file, says that it is; nothing where neither does.

    Files of v-prediction hold an empty tensor "v_pred", of zero terminal SNR one named "ztsnr".
    """
    said: dict[str, Any] = {}
    if original is not None:
        params = original["model"]["params"]
        is_v = params.get("parameterization", "eps") == "v"
        said["prediction_type"] = "v_prediction" if is_v else "epsilon"
        for theirs, ours in (("linear_start", "beta_start"), ("linear_end", "beta_end"), ("timesteps", None)):
            if theirs in params:
                said[ours or "num_train_timesteps"] = params[theirs]
    if "v_pred" in shapes:
        said["prediction_type"] = "v_prediction"
    if "ztsnr" in shapes:
        said |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    entry = index.get("scheduler")
    cls: Any = getattr(diffusers, str(entry[1]), None) if isinstance(entry, list) and len(entry) == 2 else None
    if not said or not hasattr(cls, "from_config"):
        return {}
    return {"scheduler": cls.from_config(read_mapping(config / "scheduler" / "scheduler_config.json"), **said)}
