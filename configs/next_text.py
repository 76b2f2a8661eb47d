"""DiffusionBlocks on a small decoder that writes as presidents do: no download.

COMMAND: python launch.py --config=configs/next_text.py
TIME: 7 minutes on 2 CPU cores, nothing compiled before.
ACCURACY: 2.478 bits per character, by the first block (one run).
"""

from dblocks_jax.fields import next_token


def get_config():
    config = next_token.get_config()
    config.text_length = 128
    config.num_layers = 6
    config.hidden_size = 96
    config.num_heads = 4
    config.intermediate_size = 256
    config.num_blocks = 3
    config.grow_at = (0.5,)
    config.num_epochs = 1
    config.max_steps = 1500
    config.batch_size = 32
    config.lr = 2e-3
    config.scheduler_type = "cosine"
    config.num_warmup_steps = 100
    config.save_every_n_epochs = 3
    config.log_every_n_steps = 100
    return config
