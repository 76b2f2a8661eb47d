"""The plain ViT on scikit-learn's digits: real images, no download.

COMMAND: python launch.py --config=configs/vit_digits.py
TIME: 0.8 minutes on 2 CPU cores.
ACCURACY: 98.0 +- 0.6 % (5 seeds, 360 test images).
"""

from dblocks_jax.fields import classify


def get_config():
    config = classify.get_config()
    config.model_type = "vit"
    config.dataset = "digits"
    config.image_size = 8
    config.patch_size = 4
    config.num_layers = 6
    config.hidden_size = 64
    config.intermediate_size = 256
    config.dropout = 0.0
    config.pool = "mean"
    config.crop_padding = 1  # shifts by one pixel
    config.flip = False
    config.num_epochs = 100
    config.lr = 3e-3
    config.scheduler_type = "cosine"
    config.num_warmup_steps = 100
    config.save_every_n_epochs = 25
    config.log_every_n_steps = 100
    return config
