"""The configuration: flags, YAML and Python are one model, and nonsense is refused with the flag's name."""

import math
import re
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import typer
import yaml
from hypothesis import given
from hypothesis import strategies as st
from runs_helpers import ALONE

from onestill import cli
from onestill.core.settings import about, read_yaml, write_yaml
from onestill.diffusion.trajectory import STEPS
from onestill.objectives.boot import num_boundary_rows
from onestill.objectives.registry import objectives_of, rows_of
from onestill.runs.resume import changed_settings
from onestill.teachers.settings import CALL_ARGUMENTS
from onestill.training.config import DistillConfig, make_config

GIVEN: dict[str, Any] = {"teacher": "some/teacher", "output_dir": "run"}


def flags_of(command: str) -> set[str]:
    found: click.Command = typer.main.get_command(cli.app).commands[command]  # type: ignore[attr-defined]
    return {flag for parameter in found.params for flag in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("command", ["distill", "inspect"])
def test_every_field_has_its_flag_and_every_flag_its_field(command: str) -> None:
    fields = set(DistillConfig.model_fields)
    own = {"config", "dry_run", "help", "json", "h", "pretrained_model_name_or_path", "word"}
    found = {flag.lstrip("-") for flag in flags_of(command)}
    assert fields <= found
    assert {name.removeprefix("no_") for name in found - fields - own} <= fields


# Used by other people's scripts: a name that goes from here breaks them.
STABLE = {
    "distill": "teacher output_dir max_train_steps train_batch_size learning_rate seed device guidance_scale "
    "resume_from_checkpoint checkpointing_steps config dry_run",
    "inspect": "teacher json device",
    "sample": "student teacher num_images output seed device guidance_scale",
    "evaluate": "student teacher num_samples output seed device guidance_scale json",
    "export": "student output guidance_scale device",
    "demo": "output_dir max_train_steps seed device",
}


@pytest.mark.parametrize("command", STABLE)
def test_stable_names_exist(command: str) -> None:
    assert {f"--{name}" for name in STABLE[command].split()} <= flags_of(command)


def test_every_stable_name_of_the_issue_is_somewhere() -> None:
    names = (
        "--teacher --output_dir --max_train_steps --train_batch_size --learning_rate --seed --device --guidance_scale "
        "--resume_from_checkpoint --checkpointing_steps --num_images --output --num_samples --student --json"
    )
    assert set(names.split()) <= {f"--{name}" for line in STABLE.values() for name in line.split()}


def test_every_field_is_described_and_stands_in_a_panel() -> None:
    for name, field in DistillConfig.model_fields.items():
        assert field.description and isinstance(field.json_schema_extra, dict), name
        assert field.json_schema_extra["panel"]


MAY_CHANGE = {name for name, field in DistillConfig.model_fields.items() if about(field, "may_change")}


def test_solvers_are_the_steps_there_are() -> None:
    assert set(get_args(DistillConfig.model_fields["solver"].annotation)) == set(STEPS)


def test_resumable_changes_are_fields_and_leave_out_what_decides_the_weights() -> None:
    decisive = {
        "seed",
        "max_train_steps",
        "train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler",
        "delta",
        "t_min",
        "t_max",
        "solver",
        "time_sampling",
        "bootstrap_weight",
        "ema_width",
        "num_ema_snapshots",
        "ema_target_decay",
        "guidance_scale",
        "guidance_scale_min",
        "class_labels",
        "mixed_precision",
        "null_class",
        "num_prompts",
        "negative_prompt",
        "empty_prompt_fraction",
        *CALL_ARGUMENTS,
        "noise_level",
    }
    assert decisive <= set(DistillConfig.model_fields) and not decisive & MAY_CHANGE


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "teacher: a\noutput_dir: from_yaml\nmax-train-steps: 700\nlearning_rate: 1e-3\nclass_labels: [1, 2]\n"
    )
    config = make_config({"output_dir": "from_flag", "seed": 3}, path)
    assert (config.teacher, str(config.output_dir), config.seed) == ("a", "from_flag", 3)
    assert (config.max_train_steps, config.class_labels) == (700, (1, 2))
    assert config.learning_rate == 1e-3  # YAML 1.1 reads 1e-3 as a word
    assert config.train_batch_size == DistillConfig.model_fields["train_batch_size"].default


@pytest.mark.parametrize(
    ("file", "given", "made"),
    [
        ({"guidance_scale": 3}, {"guidance_scale_min": 1.0, "guidance_scale_max": 5.0}, {"guidance_scale": 1.0}),
        (
            {"guidance_scale_min": 1, "guidance_scale_max": 5},
            {"guidance_scale": 3.0},
            {"guidance_scale_min": None, "guidance_scale_max": None},
        ),
        ({"guidance_scale": 3}, {"guidance_scale_min": None, "guidance_scale_max": None}, {"guidance_scale": 3.0}),
        ({"lr_warmup_steps": 500}, {"max_train_steps": 60}, {"lr_warmup_steps": 6}),
        ({"lr_warmup_steps": 500}, {"max_train_steps": 501}, {"lr_warmup_steps": 500}),
    ],
)
def test_flags_win_over_what_a_file_says_against_them(
    file: dict[str, Any], given: dict[str, Any], made: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(file))
    config = make_config({**GIVEN, **given}, path)
    for name, value in {**given, **made}.items():
        assert getattr(config, name) == value, name


def test_a_mistake_in_a_file_is_said_to_be_there(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text('max_train_steps: "many"\ndelta: -1\n')
    with pytest.raises(ValueError, match=r"^delta=-2: .*\n.*run.yaml: max_train_steps='many': .*$"):
        make_config({**GIVEN, "delta": -2}, path)
    path.write_text("delta: 0.1\nseed: [1\nteacher: digits\n")
    with pytest.raises(ValueError, match="run.yaml': is no YAML in line 3: "):
        make_config(GIVEN, path)


def test_resolved_configuration_round_trips(tmp_path: Path) -> None:
    config = make_config(
        {
            **GIVEN,
            "guidance_scale_min": 1.5,
            "guidance_scale_max": 4,
            "null_class": 10,
            "class_labels": [3, 1],
            "delta": 1 / 3,
            "learning_rate": 1e-5,
            "cache_dir": "cache",
            "t_max": 0.999,
            "report_to": "tensorboard",
            "local_files_only": True,
        }
    )
    write_yaml(config, tmp_path / "config.yaml")
    assert make_config({}, tmp_path / "config.yaml") == config
    assert set(read_yaml(tmp_path / "config.yaml")) == set(DistillConfig.model_fields)
    assert changed_settings(config.model_dump(mode="json"), config) == []


@given(
    st.floats(1e-12, 10),
    st.floats(0, 0.4),
    st.floats(0.001, 0.5),
    st.integers(0, 2**31 - 1),
    st.text(min_size=1).filter(lambda text: text.strip() and not set(text) & {"\0", "~"}),
)
def test_any_numbers_and_names_round_trip(rate: float, t_min: float, delta: float, seed: int, teacher: str) -> None:
    config = make_config(
        {"output_dir": "run", "teacher": teacher, "learning_rate": rate, "t_min": t_min, "delta": delta, "seed": seed}
    )
    dumped = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert make_config(dumped) == config


def test_the_configuration_is_frozen() -> None:
    config = make_config(GIVEN)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "near"),
    [("learning_rat", "learning_rate"), ("max_train_step", "max_train_steps"), ("guidance", "guidance_scale")],
)
def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path, key: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"unknown setting '{key}'; did you mean '{near}'"):
        make_config({**GIVEN, key: 1})
    path = tmp_path / "run.yaml"
    path.write_text(f"{key}: 1\n")
    with pytest.raises(ValueError, match=rf"run\.yaml: unknown setting '{key}'; did you mean '{near}'"):
        make_config(GIVEN, path)


def test_every_unknown_name_is_listed() -> None:
    with pytest.raises(ValueError, match="qqqq") as caught:
        make_config({**GIVEN, "qqqq": 1, "sed": 2})
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and "did you mean" not in lines[0] and "'seed'" in lines[1]


OUT_OF_RANGE = {
    "teacher": [""],
    "revision": [""],
    "hub_model_id": [""],
    "variant": ["", "a/b", "x" * 65],
    "null_class": [-1],
    "t_max": [0, -0.5, 1.01],
    "height": [0, -8, 2.5],
    "width": [0, -8],
    "num_frames": [0, -1],
    "audio_end_in_s": [0, -1],
    "max_sequence_length": [0, -1],
    "guidance_scale": [-1],
    "guidance_scale_min": [-1],
    "guidance_scale_max": [-1],
    "threshold_limit": [0, -1],
    "threshold_ratio": [0, 1.1],
    "delta": [0, -0.1, 1, 2],
    "t_min": [-0.1, 1],
    "boundary_weight": [-1],
    "boundary_fraction": [0, 1, -0.5],
    "ema_target_decay": [-0.1, 1],
    "lora_rank": [0, -4, 1.5],
    "lora_alpha": [0, -1],
    "max_train_steps": [0, -5, 2.5],
    "num_prompts": [0, -1, 1.5],
    "noise_level": [-1, 1.5],
    "empty_prompt_fraction": [-0.1, 1.0, 2],
    "prompt_field": [""],
    "train_batch_size": [0, 1, -4, "many"],
    "gradient_accumulation_steps": [0],
    "learning_rate": [0, -1e-4, "fast"],
    "lr_warmup_steps": [-1],
    "adam_beta1": [1, -0.1],
    "adam_beta2": [1, -0.1],
    "adam_weight_decay": [-1],
    "adam_epsilon": [0],
    "max_grad_norm": [0],
    "ema_width": [1, -0.1, 0.005, "0,0.1", "0.1,0.1"],
    "num_ema_snapshots": [-1, 101],
    "max_nonfinite_steps": [0],
    "seed": [-1, 2**31],
    "checkpointing_steps": [0],
    "checkpoints_total_limit": [0],
    "logging_steps": [0],
    "validation_steps": [0],
    "num_validation_images": [0, 65],
    "num_teacher_steps": [0, 1001],
    "num_time_bins": [0, 101],
    "guidance_interval_min": [-0.1, 1.0],
    "guidance_interval_max": [0.0, 1.1],
    "anchor_fraction": [-0.1, 1.1],
    "anchor_path_fraction": [-0.1, 1.1],
    "num_anchors": [0],
    "num_anchor_steps": [0, 1001],
    "robust_exponent": [-0.1, 3],
    "robust_constant": [0, -1],
    "flow_map_fraction": [-0.1, 1.1],
    "flow_map_diagonal": [-0.1, 1.1],
    "flow_map_to_end": [-0.1, 1.1],
    "flow_map_delta": [0, 1],
    "flow_map_states": ["pool"],
    "flow_map_identity": ["semigroup"],
    "flow_map_weight": [0, -1],
    "corrector_fraction": [-0.1, 1.0],
    "corrector_path_fraction": [-0.1, 1.1],
    "corrector_weight": [0, -1],
    "corrector_begin": [-0.1, 1.0],
    "corrector_warmup": [-0.1, 1.0],
    "corrector_normalizer": ["mean"],
    "corrector_level_min": [0, 1],
    "corrector_level_max": [0, 1.5],
    "corrector_min_spread": [-0.1, 1.0],
    "corrector_learning_rate": [0, -1e-4],
    "corrector_adam_beta1": [-0.1, 1.0],
    "corrector_guidance_scale": [-1],
    "corrector_guidance_interval_min": [-0.1, 1.0],
    "corrector_guidance_interval_max": [0, 1.5],
    "corrector_rows": [0, 1.5],
    "corrector_merge": [-0.1, 1.0],
    "report_to": [""],
    "tracker_project_name": [""],
    "thresholding": ["clip"],
    "time_sampling": ["random"],
    "solver": ["euler", "dpmsolver++"],
    "anchor_solver": ["euler"],
    "bootstrap_weight": ["one"],
    "lr_scheduler": ["step"],
    "mixed_precision": ["fp8"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_out_of_range_is_refused_with_the_flag_and_the_value(name: str, value: object) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"{name}={value:g}: " if isinstance(value, float) else f"{name}={value!r}: ")
    ) as caught:
        make_config({**GIVEN, name: value})
    assert "\n" not in str(caught.value)


def test_every_limited_number_is_tried_above() -> None:
    limited = {
        name
        for name, field in DistillConfig.model_fields.items()
        if field.metadata and name not in ("class_labels", "output_dir")
    }
    assert len(limited) > 30 and limited <= set(OUT_OF_RANGE)


FLOATS = [name for name, field in DistillConfig.model_fields.items() if "float" in str(field.annotation)]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, "nan", "-inf"])
def test_what_is_no_number_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}="):
        make_config({**GIVEN, name: value})


def test_there_are_numbers_to_try() -> None:
    assert len(FLOATS) >= 18


CONTRADICTIONS = {
    "t_min=0.5: must be below t_max, 0.5": {"t_min": 0.5, "t_max": 0.5},
    "t_min=0.7: must be below t_max, 0.5": {"t_min": 0.7, "t_max": 0.5},
    "delta=0.6: must be below t_max minus t_min": {"anchor_fraction": 0.5, "delta": 0.6, "t_max": 0.5},
    "delta=0.5: must be below": {"anchor_fraction": 0.5, "delta": 0.5, "t_min": 0.5},
    "guidance_scale_min and guidance_scale_max: are given together": {"guidance_scale_min": 2},
    "given together or not": {"guidance_scale_max": 2},
    "guidance_interval_min=0.8: must be below guidance_interval_max, 0.2": {
        "guidance_interval_min": 0.8,
        "guidance_interval_max": 0.2,
    },
    "guidance_scale_min=3: must be below guidance_scale_max, 3": {"guidance_scale_min": 3, "guidance_scale_max": 3},
    "guidance_scale=2: fixes w": {"guidance_scale": 2, "guidance_scale_min": 1, "guidance_scale_max": 3},
    "height and width: are given together": {"height": 64},
    "and width: are given together or not at all": {"width": 64},
    "boundary_fraction=0.9: no rows are left for them all in a batch of 4": {
        **ALONE,
        "boundary_fraction": 0.9,
        "train_batch_size": 4,
    },
    "anchor_fraction=1 and corrector_fraction=0.25: no rows are left for them all in a batch of 2": {
        "train_batch_size": 2,
        "corrector_fraction": 0.25,
    },
    "corrector_fraction=0.75 and flow_map_fraction=0.5: 16 rows too many are asked for in a batch of 64": {
        "anchor_fraction": 0,
        "corrector_fraction": 0.75,
        "flow_map_fraction": 0.5,
    },
    "num_anchor_steps=2: leaves no 2 stops on the way of a trajectory": {"num_anchor_steps": 2},
    "lr_warmup_steps=100: must be below max_train_steps, 100": {"max_train_steps": 100, "lr_warmup_steps": 100},
    "lora_alpha=8: says how to train a LoRA; give lora_rank too": {"lora_alpha": 8},
    r"lora_target_modules=\('to_q', 'to_k'\): says how to train a LoRA; give lora_rank": {
        "lora_target_modules": ["to_q", "to_k"]
    },
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_contradictions_are_refused_with_both_flags(message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_config({**GIVEN, **CONTRADICTIONS[message]})
    assert "\n" not in str(caught.value)


def test_what_only_looks_contradictory_is_accepted() -> None:
    for fine in (
        {"boundary_fraction": 0.9, "train_batch_size": 4, "boundary_weight": 0},
        {"max_train_steps": 1, "lr_scheduler": "constant"},
        {"guidance_scale": 1, "guidance_scale_min": 1, "guidance_scale_max": 3},
        {"guidance_scale": 0},
    ):
        made = make_config({**GIVEN, **fine})
        assert {name: getattr(made, name) for name in fine} == fine


def test_what_is_required_is_named() -> None:
    with pytest.raises(ValueError, match="teacher: is required\noutput_dir: is required"):
        make_config({})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "must hold 'name: value' lines, it holds list"),
        (b"", "it holds NoneType"),
        (b"a: [1\n", "is no YAML"),
        (b"\xff\xfe\x00a", "is no UTF-8 text"),
        (b"!!python/object/apply:os.system ['true']", "is no YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        make_config(GIVEN, path)
    assert "config=" in str(caught.value) and "run.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config=.*none\.yaml': No such file"):
        make_config(GIVEN, tmp_path / "none.yaml")


def test_what_changed_is_said_and_what_may_change_is_not() -> None:
    old = make_config({**GIVEN, "learning_rate": 1e-4}).model_dump(mode="json")
    new = make_config({**GIVEN, "learning_rate": 1e-3, "output_dir": "elsewhere", "device": "cpu", "logging_steps": 7})
    assert changed_settings(old, new) == ["learning_rate: 0.0001 -> 0.001"]


def test_a_run_from_before_there_was_a_setting_had_its_default() -> None:
    config = make_config({**GIVEN, "lora_rank": 4})
    old = {k: v for k, v in make_config(GIVEN).model_dump(mode="json").items() if not k.startswith("lora_")}
    assert changed_settings(old, make_config(GIVEN)) == []
    assert changed_settings(old, config) == ["lora_rank: None -> 4"]


def test_arguments_of_a_call_are_those_that_are_given() -> None:
    assert make_config(GIVEN).call_arguments == {}
    given = {"height": 64, "width": 96, "audio_end_in_s": 2.5}
    assert make_config({**GIVEN, **given}).call_arguments == given


def test_numbers_of_boundary_rows() -> None:
    def rows(size: int, weight: float = 1.0) -> int:
        return num_boundary_rows(make_config({**GIVEN, "boundary_weight": weight}), size)

    assert (rows(64), rows(2), rows(64, 0)) == (8, 1, 0)


def test_a_batch_is_divided_and_what_is_left_is_anchors() -> None:
    def rows(share_done: float = 1.0, **given: Any) -> dict[str, int]:
        config = make_config({**GIVEN, **given})
        found = rows_of(config, config.train_batch_size, share_done)
        assert sum(found.values()) == config.train_batch_size and found.keys() <= {*objectives_of(config, 64)}
        return {kind.name: num for kind, num in found.items()}

    assert rows() == {"anchors": 48, "corrector": 16} and rows(0.0) == {"anchors": 64}
    assert rows(boundary_weight=1.0) == {"boot": 8, "anchors": 40, "corrector": 16}
    assert rows(anchor_fraction=0.75, corrector_fraction=0) == {"boot": 16, "anchors": 48}
    assert rows(flow_map_fraction=0.25) == {"anchors": 32, "corrector": 16, "flow_map": 16}
    assert rows(train_batch_size=3, corrector_fraction=0.25) == {"anchors": 1, "corrector": 2}
    assert rows(train_batch_size=3) == {"anchors": 3} and rows(train_batch_size=4) == {"anchors": 2, "corrector": 2}
    assert rows(recipe="boot") == {"boot": 64}
    # A bootstrap that the corrector takes all rows of is there until it begins.
    late = {"anchor_fraction": 0, "corrector_fraction": 0.5, "flow_map_fraction": 0.5}
    assert rows(**late) == {"corrector": 32, "flow_map": 32} and rows(0.1, **late) == {"boot": 32, "flow_map": 32}


def test_anchors_are_as_many_as_a_run_has_rows_for() -> None:
    def num(**given: Any) -> int:
        return make_config({**GIVEN, **given}).num_anchors

    assert num() == 30_000 and num(max_train_steps=1000) == 3000 and num(train_batch_size=32) == 15_000
    assert num(max_train_steps=100, gradient_accumulation_steps=4) == 1200
    assert num(max_train_steps=4) == 12 and num(num_anchors=5) == 5
    # A small batch has no corrector, and all of its rows are anchors.
    assert num(max_train_steps=400, train_batch_size=2) == 50 == num(max_train_steps=400, train_batch_size="2")
    assert num(max_train_steps=400, train_batch_size=3) == 75


def test_a_files_number_of_anchors_follows_what_it_came_from(tmp_path: Path) -> None:
    def written(**given: Any) -> Path:
        write_yaml(make_config({**GIVEN, **given}), path := tmp_path / "config.yaml")
        return path

    short = written(max_train_steps=100)
    assert make_config({}, short).num_anchors == 300 == make_config({"seed": 1}, short).num_anchors
    assert make_config({"max_train_steps": 2000}, short).num_anchors == 6000
    assert make_config({"max_train_steps": 2000, "num_anchors": 7}, short).num_anchors == 7
    own = written(max_train_steps=100, num_anchors=9)
    assert make_config({"max_train_steps": 2000}, own).num_anchors == 9, "which was named"
    assert make_config({"anchor_fraction": 1.0}, written(anchor_fraction=0, max_train_steps=100)).num_anchors > 100


def test_a_recipe_decides_before_the_number_of_anchors_does() -> None:
    default = DistillConfig.model_fields["num_anchors"].default
    assert make_config({**GIVEN, "recipe": "boot"}).num_anchors == default, "there are none to count"
    assert make_config({**GIVEN, "recipe": "boot", "anchor_fraction": 0.75}).num_anchors == 30_000
    assert make_config({**GIVEN, "max_train_steps": "1000", "train_batch_size": "32"}).num_anchors == 1500


def test_a_recipe_wins_over_all_that_a_file_says_of_the_method(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("teacher: x\noutput_dir: run\nanchor_solver: ddim\ncorrector_weight: 2.0\nlora_rank: 4\n")
    found = make_config({"recipe": "default"}, path)
    assert (found.anchor_solver, found.corrector_weight, found.lora_rank) == ("dpmsolver++", 0.3, 4)


def test_what_nothing_reads_does_not_stand_in_the_way() -> None:
    assert make_config({**GIVEN, "t_min": 0.97}).t_min == 0.97, "a delta of the bootstrap, which has no rows"
    with pytest.raises(ValueError, match=r"delta=0.04: must be below"):
        make_config({**GIVEN, "t_min": 0.97, "anchor_fraction": 0.5})


def test_one_scaler_serves_one_network() -> None:
    with pytest.raises(ValueError, match="mixed_precision='fp16': its one scaler .* or corrector_fraction 0"):
        make_config({**GIVEN, "mixed_precision": "fp16"})
    assert make_config({**GIVEN, "mixed_precision": "fp16", "corrector_fraction": 0}).mixed_precision == "fp16"
