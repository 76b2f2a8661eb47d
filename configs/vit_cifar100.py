"""The plain ViT on CIFAR-100, as the released program trains it without heavy augmentation.

COMMAND: python launch.py --config=configs/vit_cifar100.py
TIME: not measured by us; the paper's 0.0507 s a step on one H100 makes it 2.7 hours.
ACCURACY: not measured by us; the paper's recipe (RandAugment, other learning rate) reached 60.25 %.
"""

from dblocks_jax.fields import classify


def get_config():
    config = classify.get_config()
    config.model_type = "vit"
    return config
