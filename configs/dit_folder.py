"""DiffusionBlocks of a DiT on your own images: ROOT/train/<class>/*.jpg or png, ROOT/test/<class>/.

COMMAND: python launch.py --config=configs/dit_folder.py --config.data_dir=ROOT
TIME: depends on your images.
ACCURACY: depends on your images.
"""

from configs import dit_cifar10


def get_config():
    config = dit_cifar10.get_config()
    config.dataset = "folder"
    config.ema_decay = 0.9999
    return config
