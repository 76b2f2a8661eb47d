"""The plain decoder of `next_text.py`, trained end to end: the baseline.

COMMAND: python launch.py --config=configs/llama_text.py
TIME: not measured by us.
ACCURACY: not measured by us; see docs/results.md for the arms of a smaller model.
"""

from configs import next_text


def get_config():
    config = next_text.get_config()
    config.model_type = "llama"
    config.grow_at = ()
    return config
