"""The plain ViT on Tiny-ImageNet, with the paper's settings (Table 9).

COMMAND: python launch.py --config=configs/vit_tiny_imagenet.py
TIME: not measured by us, and the paper gives none.
ACCURACY: not measured by us; the paper reached 35.32 %.
"""

from dblocks_jax.fields import classify


def get_config():
    config = classify.get_config()
    config.model_type = "vit"
    config.dataset = "tiny_imagenet"
    config.image_size = 64
    config.hidden_size = 768
    config.num_heads = 12
    config.num_blocks = 2
    config.resized_crop = True
    config.num_epochs = 100
    config.batch_size = 256
    config.lr = 1e-4
    return config
