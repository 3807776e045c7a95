"""Keys of axolotl, LLaMA-Factory, TRL and transformers, and what stands in their place here.

An unknown key of this table is answered with its line; docs/from-others.md is for reading.
"""

GLOBAL = (
    "batch.examples, those of a step over all GPUs, and batch.tokens, the positions of one forward "
    "of one GPU; how many forwards a step has follows"
)
ROWS = "tasks, a mapping from names to their train, validation and format"
# What is wanted -> the names that others have for it.
NAMES = {
    "model.name": "base_model model_name_or_path",
    "model.lora.r": "lora_r lora_rank",
    "model.lora.alpha": "lora_alpha",
    "model.lora.dropout": "lora_dropout",
    "model.lora.target_modules": "lora_target lora_target_modules lora_target_linear",
    "model.lora; without it all weights are trained": "finetuning_type use_peft",
    "model.adapter.path": "lora_model_dir adapter_name_or_path",
    "model.quantize: nf4 or int8": (
        "load_in_4bit load_in_8bit quantization_bit quantization_config"
    ),
    "model.precision": "bf16 fp16 tf32 pure_bf16",
    "model.attention": "flash_attention flash_attn attn_implementation sdp_attention",
    "model.activation_checkpointing": "gradient_checkpointing",
    "model.compile": "torch_compile",
    "model.chat_template": "chat_template_jinja default_system template",
    "model.allow_remote_code": "trust_remote_code",
    ROWS: "datasets dataset dataset_dir dataset_name train_file eval_dataset",
    "tasks.<name>.validation, files or a part such as 5%": "val_set_size val_size",
    "mix.shares and tasks.<name>.share": "mix_strategy interleave_probs dataset_mixture",
    GLOBAL: (
        "micro_batch_size per_device_train_batch_size batch_size train_batch_size "
        "gradient_accumulation_steps"
    ),
    "evaluate.tokens, the positions of one forward in validation": (
        "eval_batch_size per_device_eval_batch_size"
    ),
    "batch.max_length": "sequence_len cutoff_len max_seq_length max_length model_max_length",
    "batch.packing": "sample_packing pad_to_sequence_len neat_packing eval_sample_packing",
    "train.steps": "max_steps",
    "train.epochs": "num_epochs num_train_epochs",
    "optimizer.lr": "learning_rate",
    "optimizer.betas": "adam_beta1 adam_beta2",
    "optimizer.eps": "adam_epsilon",
    "optimizer.clip": "max_grad_norm gradient_clipping",
    "optimizer.name": "optim",
    "schedule.name": "lr_scheduler lr_scheduler_type",
    "schedule.warmup, in steps": "warmup_steps warmup_ratio",
    "evaluate.every, in steps": "eval_steps evals_per_epoch eval_strategy evaluation_strategy",
    "checkpoint.every, in steps": "save_steps saves_per_epoch save_strategy",
    "checkpoint.keep": "save_total_limit",
    "evaluate.best": "metric_for_best_model load_best_model_at_end",
    "evaluate.patience": "early_stopping_patience",
    "the flag --resume of launch/train.py": "resume_from_checkpoint auto_resume_from_checkpoints",
    "output": "output_dir",
    "cache": "dataset_prepared_path preprocessing_num_workers tokenized_path",
    "trackers; every step is logged": "logging_steps report_to wandb_project logging_dir plot_loss",
    "engine.zero, or engine.deepspeed": "fsdp fsdp_config",
    "objective": "stage rl task_type",
    "nothing: a row's prompts and users' turns are no targets": (
        "train_on_inputs train_on_prompt completion_only_loss assistant_only_loss"
    ),
}
HERE = {name: wanted for wanted, names in NAMES.items() for name in names.split()}
