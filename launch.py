"""Train or evaluate: python launch.py --config=configs/dblock_digits.py [--config.FIELD=VALUE] [--mode=eval]

Exit codes: 0 done, 1 a mistake in config, data or workdir (one line says which), 2 a mistake in the flags.
"""

import sys
from logging import WARNING
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

import dblocks_jax
from dblocks_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "Path of the config file, such as configs/dblock_digits.py.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "train: start or resume a run; eval: score a saved one.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run [checkpoints/<config><postfix>].")
CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "For eval: best, last, or the step of a checkpoint.")


def parse_flags(argv: list[str]) -> list[str]:
    """Parse, with a mistake answered by one line and exit code 2."""
    paths = [arg.split("=", 1)[1].split(":")[0] for arg in argv if arg.startswith(("--config=", "-config="))]
    for path in paths:
        if not Path(path).is_file():
            sys.exit(_complain(f"there is no config file {path}", code=2))
    try:
        rest = flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:  # an override of a field that does not exist
        cause = error.args[0]
        while isinstance(cause, Exception):
            cause = cause.args[0]
        sys.exit(_complain(f"unknown config field {' '.join(cause.split())}", code=2))
    except (flags.Error, TypeError, ValueError) as error:
        sys.exit(_complain(error, code=2))
    if len(rest) > 1:
        sys.exit(_complain(f"unexpected argument {rest[1]!r}: flags start with --", code=2))
    if not paths and CONFIG.value is None:
        sys.exit(_complain("--config is missing: name a file, such as --config=configs/dblock_digits.py", code=2))
    return rest


def main(argv: list[str]) -> None:
    config = CONFIG.value
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = Path(WORKDIR.value or f"checkpoints/{name}{config.postfix}")
    _log_our_own_lines()

    from dblocks_jax.evaluate import evaluate_run
    from dblocks_jax.train import train
    from dblocks_jax.workdir import finish

    try:
        if MODE.value == "eval":
            result = evaluate_run(config, workdir, overrides=overrides, checkpoint=CHECKPOINT.value)
        else:
            result = train(config, workdir, command=sys.argv, overrides=overrides)
    except UserError as error:
        sys.exit(_complain(error, code=1))
    finish(workdir, result)


def _log_our_own_lines() -> None:
    """Libraries log through absl too: of theirs, show warnings only."""
    logging.set_verbosity(logging.INFO)
    package = str(Path(dblocks_jax.__file__).parent)
    logging.get_absl_handler().addFilter(
        lambda record: record.levelno >= WARNING or record.pathname.startswith(package)
    )


def _complain(problem: object, code: int) -> int:
    print(f"launch.py: {problem}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
