"""The network of `recurrent_text.py` trained as Huginn is, through the last of many steps: the baseline.

COMMAND: python launch.py --config=configs/huginn_text.py
TIME: not measured yet.
ACCURACY: not measured yet.
"""

from configs import recurrent_text


def get_config():
    config = recurrent_text.get_config()
    config.model_type = "huginn"
    config.num_inference_steps = 32
    return config
