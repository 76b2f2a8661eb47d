"""DiffusionBlocks of a DiT-S/2 on CIFAR-10, with the paper's settings.

COMMAND: python launch.py --config=configs/dit_cifar10.py
TIME: not measured by us.
ACCURACY: not measured by us; the paper: FID 30.59 (train), 37.20 (test), plain 32.84, 39.83. Its plain DiT is
--config.num_blocks=1 --config.sampler_spacing=karras.
"""

from dblocks_jax.fields import generate


def get_config():
    config = generate.get_config()
    config.num_layers = 12
    config.hidden_size = 384
    config.num_heads = 6
    config.intermediate_size = 1536
    config.num_epochs = 100
    config.batch_size = 512
    config.lr = 1e-4
    config.score_samples = 10_000
    return config
