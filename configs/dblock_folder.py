"""DiffusionBlocks on your own images: <root>/train/<class>/*.{jpg,png}, with test/ or val/ beside train/.

COMMAND: python launch.py --config=configs/dblock_folder.py --config.data_dir=ROOT
TIME: depends on your images; the model is the one of CIFAR, at 32 pixels.
ACCURACY: depends on your images.
"""

from configs import vit_folder


def get_config():
    config = vit_folder.get_config()
    config.model_type = "dblock"
    return config
