"""The plain ViT on your own images: <root>/train/<class>/*.{jpg,png}, with test/ or val/ beside train/.

COMMAND: python launch.py --config=configs/vit_folder.py --config.data_dir=ROOT
TIME: depends on your images; the model is the one of CIFAR, at 32 pixels.
ACCURACY: depends on your images.
"""

from dblocks_jax.fields import classify


def get_config():
    config = classify.get_config()
    config.model_type = "vit"
    config.dataset = "folder"
    config.data_dir = "images"
    return config
