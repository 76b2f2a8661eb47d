"""DiffusionBlocks on Tiny-ImageNet, with the paper's settings (Table 9): two blocks.

COMMAND: python launch.py --config=configs/dblock_tiny_imagenet.py
TIME: not measured by us, and the paper gives none.
ACCURACY: not measured by us; the paper reached 36.16 %, the plain ViT 35.32 %.
"""

from configs import vit_tiny_imagenet


def get_config():
    config = vit_tiny_imagenet.get_config()
    config.model_type = "dblock"
    return config
