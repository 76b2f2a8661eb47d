"""DiffusionBlocks on CIFAR-100, as the released program trains it without heavy augmentation.

COMMAND: python launch.py --config=configs/dblock_cifar100.py
TIME: not run in full; steps of 3.8 to 4.0 ms on an H200 make 37 to 39 minutes, the paper's on an H100 2.9 hours.
ACCURACY: not measured by us; the paper's recipe (RandAugment, other learning rate) reached 59.30 %, plain 60.25 %.
"""

from dblocks_jax.fields import classify


def get_config():
    return classify.get_config()
