"""A small network of recurrent depth, trained as a denoiser in one pass, that writes as presidents do: no download.

COMMAND: python launch.py --config=configs/recurrent_text.py
TIME: 2.8 to 3.5 minutes on 2 CPU cores, nothing compiled before.
ACCURACY: 2.627 bits per character, by the first level (one run).
"""

from dblocks_jax.fields import recurrent


def get_config():
    config = recurrent.get_config()
    config.text_length = 128
    config.num_layers = 6
    config.prelude_layers = 2
    config.coda_layers = 2
    config.hidden_size = 96
    config.num_heads = 4
    config.intermediate_size = 256
    config.num_epochs = 1
    config.max_steps = 1000
    config.batch_size = 16
    config.lr = 2e-3
    config.scheduler_type = "cosine"
    config.num_warmup_steps = 100
    config.num_inference_steps = 1  # later levels sharpen a guess: see docs/decisions.md
    config.score_samples = 20
    config.save_every_n_epochs = 3
    config.log_every_n_steps = 100
    return config
