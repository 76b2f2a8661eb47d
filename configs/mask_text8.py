"""DiffusionBlocks on the paper's masked transformer of text8, which a user places in `data_dir`.

Where the paper is silent, as MD4 trains it: cosine to 0, averages of 0.9999.

COMMAND: python launch.py --config=configs/mask_text8.py
TIME: not measured by us.
ACCURACY: not measured by us; the paper: 1.45 bits per character, plain masked diffusion 1.56.
"""

from dblocks_jax.fields import mask


def get_config():
    config = mask.get_config()
    config.dataset = "text8"
    config.data_dir = "~/text8"
    config.text_length = 256
    config.num_layers = 12
    config.hidden_size = 768
    config.num_heads = 12
    config.intermediate_size = 3072
    config.num_blocks = 3
    config.num_epochs = 100
    config.batch_size = 256
    config.lr = 3e-4
    config.weight_decay = 0.03
    config.scheduler_type = "cosine"
    config.num_warmup_steps = 2000
    config.ema_decay = 0.9999
    config.save_every_n_epochs = 10
    return config
