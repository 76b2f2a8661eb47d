"""DiffusionBlocks of a DiT-L/2 on latents: ROOT/train/<class>/*.npy and ROOT/test/<class>/*.npy, float [h, w, c].

COMMAND: python launch.py --config=configs/dit_latents.py --config.data_dir=ROOT
TIME: not measured by us; the paper's plain DiT takes about 1e20 FLOP on ImageNet.
ACCURACY: not measured by us; the paper on ImageNet at 256 pixels: FID 9.00 (train), 10.63 (test), plain 9.01, 12.09.
"""

from dblocks_jax.fields import generate


def get_config():
    config = generate.get_config()
    config.dataset = "latents"
    config.image_size = 32
    config.flip = False
    config.num_layers = 24
    config.hidden_size = 1024
    config.num_heads = 16
    config.intermediate_size = 4096
    config.num_epochs = 100
    config.batch_size = 512
    config.lr = 5e-5
    config.score_samples = 0  # what the decoder makes of samples.npz is scored
    return config
