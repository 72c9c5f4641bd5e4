"""What people type who know other programs, and what it is called here."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

STEPS = "max_train_steps num_inference_steps steps"
BATCH = "train_batch_size batch_size"
WHERE = "output output_dir"
COUNT = "num_images num_samples num_validation_images"
PROMPT = "prompts prompt_file"
SIZE = "height"
SCALE = "guidance_scale"
MODEL = "teacher student"
RUN = "student teacher output_dir"
GUESSES = {
    PROMPT: "prompt prompts prompts_file prompt_path promptfile text texts caption captions caption_file p data dataset "
    "data_dir train_data_dir dataset_name train_data data_path validation_prompts",
    STEPS: "steps step num_steps n_steps num_train_steps train_steps total_steps training_steps iterations iters "
    "num_iterations max_steps sampling_steps inference_steps num_sampling_steps ddim_steps max_iter epochs epoch "
    "num_epochs num_train_epochs max_epochs teacher_steps",
    "learning_rate": "lr rate learningrate base_lr max_lr peak_lr",
    "lr_scheduler": "scheduler lr_schedule schedule",
    "lr_warmup_steps": "warmup warmup_steps num_warmup_steps warmup_ratio",
    BATCH: "batch_size train_batch_size batch bs batchsize bsz per_device_train_batch_size mini_batch_size "
    "eval_batch_size per_gpu_batch_size b",
    MODEL: "model model_path model_name model_id model_dir pretrained_model pretrained pretrained_model_name "
    "pretrained_model_path pretrained_model_name_or_path base_model teacher_model teacher_path unet pipeline pipe repo "
    "repo_id name m teacher_dir model_name_or_path",
    RUN: "run run_dir run_folder student_path student_dir student_model checkpoint_path ckpt ckpt_path checkpoint "
    "checkpoint_dir weights path folder dir input input_dir i",
    WHERE: "output out output_path out_dir outdir output_folder outputs output_file save save_dir save_path save_to "
    "results results_dir dest destination logdir o output_dir log_dir outfile out_file",
    COUNT: "n num count num_samples n_samples number num_images_per_prompt num_image images samples num_outputs "
    "n_images n_iter num_images num_generated",
    SCALE: "cfg cfg_scale guidance guidance_weight scale w cfg_weight classifier_free_guidance guidance_strength "
    "guidance_factor unconditional_guidance_scale scale_guidance omega",
    SIZE: "resolution size image_size img_size sample_size res h image_resolution",
    "width": "w_px image_width",
    "mixed_precision": "fp16 bf16 half amp precision dtype fp32 float16 bfloat16 autocast torch_dtype use_fp16",
    "device": "gpu cuda cpu gpus gpu_id gpu_ids use_cuda use_gpu device_id no_cuda mps devices",
    "negative_prompt": "neg negative neg_prompt n_prompt uncond_prompt negative_prompts",
    "class_labels": "class classes label labels class_label y class_id class_ids num_classes class_cond",
    "resume_from_checkpoint": "resume resume_from resume_path resume_training continue load_checkpoint",
    "checkpointing_steps": "save_steps save_every checkpoint_every save_interval checkpoint_steps checkpoint_interval",
    "checkpoints_total_limit": "save_total_limit keep_checkpoints max_checkpoints",
    "validation_steps": "eval_steps eval_every validation_epochs sample_every eval_interval",
    "logging_steps": "log_every log_interval log_steps",
    "gradient_accumulation_steps": "grad_accum accumulation_steps accumulate_grad_batches grad_accumulation "
    "gradient_accumulation accum",
    "max_grad_norm": "clip grad_clip gradient_clip clip_grad clip_grad_norm gradient_clip_val",
    "adam_weight_decay": "weight_decay wd",
    "ema_width": "ema use_ema ema_decay ema_rate ema_max_decay sigma_rel ema_std",
    "lora_rank": "rank lora r use_lora lora_r lora_dim",
    "report_to": "wandb tensorboard log_with logger use_wandb tracker",
    "t_max": "max_t t_start start_time",
    "t_min": "min_t t_end end_time",
    "overwrite": "force f overwrite_output_dir exist_ok y_es replace",
    "local_files_only": "offline no_download local",
    "budget": "time time_limit time_budget max_time hours minutes duration",
    "recipe": "method preset",
    "config": "config_file yaml config_path cfg_file c settings args",
    "reference": "real ref reference_dir real_dir ground_truth fid_ref real_images",
    "features": "fid inception feature feature_extractor fid_stats",
    "clip": "clip_model clip_score clip_path",
    "seed": "random_seed manual_seed rng s",
    "variant": "weights_variant weight_variant",
    "cache_dir": "hf_home hub_cache",
    "solver": "sampler ode_solver integrator",
}
"""Settings, the first that a command has, for what is typed in their place."""
NAMES = {guess: settings.split() for settings, guesses in GUESSES.items() for guess in guesses.split()}


def meant(flag: str, known: Sequence[str]) -> str:
    """Return the flag of a command that was meant by one it has not; "" if none comes near."""
    name = flag.lstrip("-").replace("-", "_").lower()
    for setting in NAMES.get(name, ()):
        if f"--{setting}" in known:
            return f"--{setting}"
    if name in NAMES:  # which is none of the command's: what is spelt alike means something else
        return ""
    near = difflib.get_close_matches(f"--{name[:80]}", [each for each in known if each.startswith("--")], n=1)
    return near[0] if near else ""
