"""The training loop: transformers' `Trainer` with callbacks, whole checkpoints and a plain run folder."""
