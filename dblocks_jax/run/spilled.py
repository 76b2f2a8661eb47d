"""Arrays that wait on a disk: in files without a name, mapped into memory that the system may take back any time."""

import mmap
import tempfile
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from dblocks_jax.run.errors import UserError
from dblocks_jax.run.files import reason

ALIGNED = 64  # bytes: on a CPU, JAX computes with an array that begins so as it lies, without a copy


class InFile(np.ndarray):
    """An array that lies in a file, and is read only.

    Orbax copies NumPy's arrays before it writes them in the background, lest they change: all that waits would be in
    memory at once. What nobody can write to need not be copied.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> np.ndarray:
        return super().__deepcopy__(memo) if self.flags.writeable else self


def spill(tree: Any, folder: Path) -> Any:
    """Write the arrays of a tree to one file on the disk of `folder`, and return them mapped from there.

    The file has no name, as `tempfile.TemporaryFile` has none: the system removes it with the last of its arrays, or
    with the process, however that ends. It is never written again, so arrays stay what they are while others take
    their place. Those that lie in a file already stay there.

    Raises:
      UserError: the disk does not take it.
    """
    leaves, structure = jax.tree.flatten(tree)
    if all(isinstance(leaf, InFile) for leaf in leaves):
        return tree
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())  # before it is made, above it
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            arrays = [_append(file, leaf) for leaf in leaves]
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(
            f"idle_blocks=disk: blocks cannot wait on the disk of {folder}: {reason(error, place)}. Make room, choose "
            "another --workdir, or idle_blocks=host"
        ) from error
    return jax.tree.unflatten(structure, [_mapped(mapped, *array) for array in arrays])


def _append(file: IO[bytes], leaf: Any) -> tuple[int, np.dtype, tuple[int, ...]]:
    """Write an array: (where, type, shape)."""
    array = np.asarray(leaf)  # of a device's array a copy on the host, where it does not lie there
    file.write(bytes(-file.tell() % ALIGNED))
    at = file.tell()
    file.write(np.ascontiguousarray(array).data)
    return at, array.dtype, array.shape


def _mapped(file: mmap.mmap, at: int, dtype: np.dtype, shape: tuple[int, ...]) -> InFile:
    flat = np.frombuffer(file, dtype, int(np.prod(shape)), at)
    return flat.reshape(shape).view(InFile)
