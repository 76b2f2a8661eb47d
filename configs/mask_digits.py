"""DiffusionBlocks of masked diffusion on the grey levels of scikit-learn's digits: bits per dimension, no download.

COMMAND: python launch.py --config=configs/mask_digits.py
TIME: not measured by us.
ACCURACY: not measured by us. Digits have 17 grey levels of the 256 symbols, so knowing that alone takes 8 bits to 4.1.
"""

from dblocks_jax.fields import mask


def get_config():
    config = mask.get_config()
    config.dataset = "digits"
    config.image_size = 8
    config.num_layers = 6
    config.hidden_size = 96
    config.num_heads = 4
    config.intermediate_size = 384
    config.num_blocks = 3
    config.grow_at = (0.5,)
    config.num_epochs = 60
    config.batch_size = 64
    config.lr = 1e-3
    config.weight_decay = 0.03
    config.scheduler_type = "cosine"
    config.num_warmup_steps = 100
    config.ema_decay = 0.999
    config.save_every_n_epochs = 60
    config.log_every_n_steps = 100
    return config
