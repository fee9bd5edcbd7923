"""Which of the hundreds of flags of optimum-habana's trainers --help shows, by group, in our users' words."""

from align.cli import REST
from align.training.unused import WITHOUT_EFFECT

# Left to --help_all, as are those of optimum-habana that no group names
RARE = """torch_dtype token dataset_mix eval_subset data_format text_as_chat only_true_labels shuffle_buffer
    size_valid_set validation_split_percentage max_bad_rows num_workers skip_probe ref_log_probs_dir share_prompts
    save_seconds max_nonfinite_steps label_smoothing disable_dropout max_grad_norm resume_from_checkpoint use_habana
    use_hpu_graphs_for_inference attn_implementation""".split()
FLAGS = {
    "Preferences": {
        "beta": "How closely the policy keeps to the reference: larger is closer.",
        "loss_type": "Loss of a pair.",
        "precompute_ref_log_probs": "Store the reference's log-probs before training.",
    },
    "Batches": {
        "per_device_train_batch_size": "Rows (dpo.py: pairs) a card trains on at once.",
        "per_device_eval_batch_size": "Rows (dpo.py: pairs) a card evaluates at once.",
        "gradient_accumulation_steps": "Batches of each card that make one step.",
        "packing": "Put whole samples side by side into rows of --max_seq_length.",
        "max_seq_length": "Longest sample in tokens, and the length of packed rows.",
        "max_length": "Longest prompt and answer in tokens.",
        "max_prompt_length": "Longest prompt in tokens.",
    },
    "Optimisation": {
        "learning_rate": "Highest learning rate.",
        "lr_scheduler_type": "How the learning rate falls.",
        "warmup_steps": "Steps in which the learning rate rises from 0.",
        "weight_decay": "Weight decay of AdamW.",
        "optim": "Optimizer; any kind of AdamW runs as Gaudi's fused one.",
        "num_train_epochs": "Passes over the data.",
        "max_steps": "Steps to train for, in place of epochs.",
        "gradient_checkpointing": "Compute activations twice, to save memory.",
        "seed": "Seed of everything that is random.",
    },
    "Evaluation, logs and checkpoints": {
        "do_train": "Train.",
        "do_eval": "Evaluate at the end.",
        "eval_strategy": "Evaluate while training.",
        "eval_steps": "Steps between evaluations.",
        "logging_steps": "Steps between two lines of the log.",
        "save_steps": "Steps between checkpoints.",
        "save_total_limit": "Keep this many checkpoints.",
        "output_dir": "Folder for the adapter or model, checkpoints and results.",
        "overwrite_output_dir": "Replace an earlier run in --output_dir.",
        "report_to": "Where else the log goes, such as tensorboard.",
    },
    "Gaudi": {
        "bf16": "Compute in bfloat16.",
        "deepspeed": "DeepSpeed's configuration: a file, see configs/.",
        "use_lazy_mode": "Gather operations into graphs instead of running each by itself.",
        "use_hpu_graphs_for_training": "Record and replay the training step.",
        "flash_attention_recompute": "Flash attention's mode that saves memory.",
    },
    REST: {
        **dict.fromkeys(RARE, ""),
        "label_smoothing": "Share of the preferences that are taken for wrong, 0 to 0.5.",
        "disable_dropout": "Leave out the dropout of model and adapter.",
        "max_grad_norm": "Longer gradients are clipped to this norm.",
        "resume_from_checkpoint": "Go on from this checkpoint; True: the last one in --output_dir.",
        "use_habana": "Run on Gaudi's cards.",
        "use_hpu_graphs_for_inference": "Record and replay the forward pass of evaluations.",
        "attn_implementation": "How attention is computed.",
        **{name: f"No effect here: {instead}." for name, instead in WITHOUT_EFFECT.items()},
        "pad_max": "Without packing: pad every sample to --max_seq_length.",
        "neftune_noise_alpha": "Scale of noise on the embeddings while training (NEFTune).",
        "reference_free": "Take 0 for the reference's log-probs.",
        "f_divergence_type": "Divergence from the reference that the loss holds down.",
        "f_alpha_divergence_coef": "Coefficient of --f_divergence_type alpha_divergence.",
        "sync_ref_model": "Move the reference towards the policy while training.",
        "ref_model_mixup_alpha": "Share of the policy in a reference that is moved.",
        "ref_model_sync_steps": "Steps between two moves of the reference.",
        "rpo_alpha": "Weight of the chosen answers' negative log-likelihood in the loss.",
    },
}
