"""What a person sees of each task. Only pages need it: what draws charts takes a while to load."""

from dblocks_jax.tasks.classify import show as classify
from dblocks_jax.tasks.generate import show as generate
from dblocks_jax.tasks.mask import show as mask
from dblocks_jax.tasks.next_token import show as next_token
from dblocks_jax.tasks.recurrent import show as recurrent

SHOWN = {
    "classify": classify,
    "generate": generate,
    "mask": mask,
    "next_token": next_token,
    "recurrent": recurrent,
}
