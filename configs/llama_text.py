"""The plain decoder of `next_text.py`, trained end to end: the baseline."""

from configs import next_text


def get_config():
    config = next_text.get_config()
    config.model_type = "llama"
    config.grow_at = ()
    return config
