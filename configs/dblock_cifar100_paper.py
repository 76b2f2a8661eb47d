"""DiffusionBlocks on CIFAR-100 as the paper's text has them: Eq. 6, unit label embeddings, the recipe of Table 1.

COMMAND: python launch.py --config=configs/dblock_cifar100_paper.py
TIME: not measured by us; the paper's 0.0181 s a step on one H100 makes it 2.9 hours.
ACCURACY: not measured by us; the paper has 59.30 %.
"""

from configs import vit_cifar100_paper


def get_config():
    config = vit_cifar100_paper.get_config()
    config.model_type = "dblock"
    config.weighting = "per_sample"
    config.label_table = "normalized"
    config.num_inference_steps = 4
    config.num_warmup_steps = 3900 * 3  # times num_blocks, as num_epochs is
    return config
