"""DiffusionBlocks on a small masked transformer that writes as presidents do: no download.

COMMAND: python launch.py --config=configs/mask_text.py
TIME: 4.7 minutes on 2 CPU cores, nothing compiled before.
ACCURACY: at most 3.211 ± 0.002 bits per character (one run; the error is that of the estimate).
"""

from dblocks_jax.fields import mask


def get_config():
    config = mask.get_config()
    config.text_length = 128
    config.num_layers = 6
    config.hidden_size = 96
    config.num_heads = 4
    config.intermediate_size = 384
    config.num_blocks = 3
    config.grow_at = (0.5,)
    config.num_epochs = 1
    config.max_steps = 2700
    config.batch_size = 16
    config.lr = 2e-3
    config.weight_decay = 0.03
    config.scheduler_type = "cosine"
    config.num_warmup_steps = 100
    config.ema_decay = 0.995
    config.num_inference_steps = 64
    config.score_samples = 50
    config.save_every_n_epochs = 3
    config.log_every_n_steps = 100
    return config
