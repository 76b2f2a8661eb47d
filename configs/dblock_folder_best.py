"""DiffusionBlocks from the start on your own images, as they classify best in our experiments.

COMMAND: python launch.py --config=configs/dblock_folder_best.py --config.data_dir=ROOT
TIME: depends on your images; the model is the one of CIFAR, at 32 pixels.
ACCURACY: depends on your images; docs/results.md has CIFAR-10 as JPEG files.
OTHER ARMS: on a reduced CIFAR-10 these settings have 55.5 %, short-long 62.7 %, and grown blocks 62.1 %
(grow_at=(0.5,), answer="joined").
"""

from configs import dblock_cifar100_best


def get_config():
    config = dblock_cifar100_best.get_config()
    config.dataset = "folder"
    config.data_dir = "images"
    return config
