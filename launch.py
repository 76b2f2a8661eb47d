"""Train, evaluate, and more: python launch.py --config=configs/dblock_digits.py [--config.FIELD=VALUE] [--mode=eval]

Exit codes: 0 done; 1 a mistake in config, data or workdir (one line says which); 2 a mistake in the flags; 3 something
could not be saved; 4 the numbers were not finite, for too many steps or as the trained model's answers; 75 stopped by a
signal with everything saved (the same command goes on from there); 130 or 143 after a second signal.
"""

import os
import signal


def _end_at_once(number: int, _: object) -> None:
    os.write(2, f"launch.py: {signal.Signals(number).name}: ending at once: nothing has begun\n".encode())
    os._exit(75)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):  # until `dblocks_jax.run.stop` listens there is nothing to be saved
        signal.signal(number, _end_at_once)

import math
import sys
import traceback
from itertools import pairwise
from logging import WARNING, Formatter, LogRecord
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import dblocks_jax
from dblocks_jax.fields.defaults import DEFAULTS
from dblocks_jax.run.errors import Diverged, Stopped, Unsaved, UserError
from dblocks_jax.run.naming import shown_lines, split_names
from dblocks_jax.run.targets import parse_targets, prepare_environment

CONFIG = config_flags.DEFINE_config_file("config", None, "Path of the config file, such as configs/dblock_digits.py.")
MODES = {
    "train": "start or resume a run",
    "eval": "score a saved run",
    "predict": "classify image files; score a text, or fill in its blanks",
    "sample": "make images or texts",
    "demo": "a page to play with a model, for the browser of this machine",
    "report": "one HTML page about a run",
    "compare": "one HTML page and a table about several runs",
    "inspect": "model, blocks' shares and data, without training",
    "memory": "what a step needs, without training",
    "merge": "join blocks that were trained apart",
    "import": "make a run of the released program's checkpoint",
    "export": "safetensors, model card and StableHLO of a run",
}
MODE = flags.DEFINE_enum("mode", "train", list(MODES), "; ".join(f"{name}: {text}" for name, text in MODES.items()))
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run [checkpoints/<config><postfix>].")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes; see docs/use.md.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "Of a run: best, last, or the step of a checkpoint.")
PARTS = flags.DEFINE_multi_string("parts", [], "For merge: folders of the runs to join, with commas between.")
RUNS = flags.DEFINE_multi_string("runs", [], "For compare: folders of runs, with commas or spaces between.")
IMAGES = flags.DEFINE_multi_string("images", [], "For predict: image files and folders, with commas or spaces between.")
SOURCE = flags.DEFINE_string("source", None, "For import: the checkpoint file of the released program.")
CLASSES = flags.DEFINE_list("classes", [], "For sample: names or numbers of classes, with commas between [all].")
COUNT = flags.DEFINE_integer("count", 64, "For sample: how many images or texts.")
TEXT = flags.DEFINE_string("text", None, "For sample and predict: a text; where symbols are masked _ is one to find.")
CFG_SCALE = flags.DEFINE_float("cfg_scale", None, "For sample: strength of guidance, 1 is none [the config's].")
TRAIN_ON_SAMPLES = flags.DEFINE_bool(
    "train_on_samples",
    False,
    "For eval of a generator: score classifiers trained on its samples and on real images, too.",
)
PORT = flags.DEFINE_integer("port", 0, "For demo: the port of its page on this machine [a free one].")
GIB = flags.DEFINE_float("gib", None, "For memory: say what fits in so many GiB.")
TARGET = flags.DEFINE_string(
    "target", None, "For memory: devices that are not here, with commas between: h100, a100, v5e, h100:1x2x8, v5e:4x4."
)
# flag -> the modes that take it
MODES_OF = {
    "checkpoint": ("eval", "predict", "sample", "demo", "report", "export"),
    "distributed": ("train", "eval"),
    "parts": ("merge",),
    "runs": ("compare",),
    "images": ("predict",),
    "source": ("import",),
    "port": ("demo",),
    "gib": ("memory",),
    "target": ("memory",),
    "classes": ("sample",),
    "count": ("sample",),
    "text": ("sample", "predict"),
    "cfg_scale": ("sample",),
    "train_on_samples": ("eval",),
}
# flag -> the tasks whose models have a use for it
TASKS_OF = {
    "images": ("classify",),
    "classes": ("generate",),
    "cfg_scale": ("generate",),
    "train_on_samples": ("generate",),
    "text": ("mask", "next_token", "recurrent"),
}
# mode -> the flags of which it needs one
NEEDED = {"merge": ("parts",), "compare": ("runs",), "predict": ("images", "text"), "import": ("source",)}
LAST_PORT = 2**16 - 1

KINDS = {  # how the reason begins why a flag does not parse -> what it must be
    "('Non-boolean": "True or False",
    "invalid literal for int()": "a whole number",
    "could not convert string to float": "a number",
}


def parse_flags(argv: list[str]) -> list[str]:
    """Parse, with a mistake answered by one line and exit code 2. What is left are names for --runs or --images."""
    for path in _config_paths(argv):
        if not Path(path).is_file():
            sys.exit(_complain(f"there is no config file {path}", code=2))
    for name in (arg.split("=")[0] for arg in argv if arg.lstrip("-").startswith("config.")):
        if name.count(".") > 1:
            sys.exit(_complain(f"unknown config field {name.split('.', 1)[1]}: fields have no parts", code=2))
    try:
        rest = flags.FLAGS(argv)
        config = CONFIG.value
    except (AttributeError, KeyError) as error:  # an override of a field that does not exist
        sys.exit(_complain(f"unknown config field {_innermost(error)}", code=2))
    except flags.IllegalFlagValueError as error:
        sys.exit(_complain(_in_plain_words(_innermost(error)), code=2))
    except Exception as error:  # whatever a config file raises, besides flags that do not parse
        sys.exit(_complain(_innermost(error), code=2))
    if mistake := _mistake(config, rest[1:]):
        sys.exit(_complain(mistake, code=2))
    return rest


def _mistake(config: Any, rest: list[str]) -> str | None:
    """What is wrong with flags that parse, or nothing."""
    mode = MODE.value
    for flag, modes in MODES_OF.items():
        if flags.FLAGS[flag].present and mode not in modes:
            return f"--{flag} is for --mode={' or '.join(modes)}, not for {mode}"
    task = config.get("task") if isinstance(config, ConfigDict) else None
    for flag, tasks in TASKS_OF.items():
        if flags.FLAGS[flag].present and task in DEFAULTS and task not in tasks:
            return f"--{flag} is for models of the task {' or '.join(tasks)}, not for {task}"
    needed = [flag for flag in NEEDED.get(mode, ()) if task is None or task in TASKS_OF.get(flag, (task,))]
    if mode in NEEDED and not needed:
        return f"--mode={mode} is not for models of the task {task}"
    if needed and not any(flags.FLAGS[flag].present and any(flags.FLAGS[flag].value or "") for flag in needed):
        return f"--mode={mode} needs {' or '.join(f'--{flag}' for flag in needed)}"
    if GIB.value is not None and not 0 < GIB.value < math.inf:
        return f"--gib must be a finite number greater than 0, not {GIB.value}"
    if not 0 <= PORT.value <= LAST_PORT:
        return f"--port must lie in [0, {LAST_PORT}], not {PORT.value}"
    try:
        parse_targets(TARGET.value or "h100")
    except UserError as error:
        return f"--target: {error}"
    if rest and (mode not in ("compare", "predict") or not flags.FLAGS[NEEDED[mode][0]].present):
        return f"unexpected argument {rest[0]!r}: flags start with --"
    if config is None:  # comparing reads those of the runs, playing that of the folder
        is_known = mode == "compare" or (mode == "demo" and WORKDIR.value)
        return None if is_known else "--config is missing: name a file, such as --config=configs/dblock_digits.py"
    if task not in DEFAULTS:
        return f"get_config must return a ConfigDict whose task is one of {', '.join(DEFAULTS)}, not {task!r}"
    if differing := set(config) ^ set(DEFAULTS[task]()):
        names = ", ".join(sorted(differing))
        return f"get_config must return the fields of dblocks_jax/fields/{task}.py; differing: {names}"
    return None


def _config_paths(argv: list[str]) -> list[str]:
    """The config files that the command names, as --config=PATH or --config PATH, without a :argument."""
    named = [arg.split("=", 1)[1] for arg in argv if arg.startswith(("--config=", "-config="))]
    named += [after for arg, after in pairwise(argv) if arg in ("--config", "-config")]
    return [path.split(":")[0] for path in named]


def _in_plain_words(message: str) -> str:
    """What absl and Python say of a value that does not parse, as a user would say it."""
    start, _, why = message.partition(": ")
    name, _, value = start.removeprefix("flag ").partition("=")
    for sign, kind in KINDS.items():
        if why.startswith(sign):
            return f"{name} must be {kind}, not {value!r}"
    return message


def _innermost(error: Exception) -> str:
    """The message at the heart of wrapped errors, on one line."""
    cause: object = error
    while isinstance(cause, Exception) and cause.args and not isinstance(cause, SyntaxError):
        cause = cause.args[0]
    return " ".join(str(cause).split()) or type(error).__name__


def main(argv: list[str]) -> None:
    config = CONFIG.value
    overrides, folder = {}, "checkpoints"
    if config is not None:
        overrides = config_flags.get_override_values(flags.FLAGS["config"])
        name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
        folder = f"checkpoints/{name}{config.postfix}"
    workdir = Path(WORKDIR.value or folder)
    if TARGET.value is not None:
        prepare_environment()  # before JAX starts
    _log_our_own_lines()
    _hide_what_is_raised_anyway()
    _keep_compiled_programs()

    from dblocks_jax.run import processes
    from dblocks_jax.run.devices import naming_lack_of_memory
    from dblocks_jax.run.files import naming_lack_of_room, obstacle
    from dblocks_jax.run.stop import Stop
    from dblocks_jax.run.workdir import finish

    stop = Stop()
    try:
        if DISTRIBUTED.value:
            processes.join()
            logging.set_verbosity(logging.INFO if processes.is_first() else logging.WARNING)
        stop.listen()
        if why := obstacle(workdir):
            raise UserError(f"--workdir={workdir} cannot be a run's folder: {why}")
        with naming_lack_of_memory(), naming_lack_of_room():
            result = run_mode(config, workdir, overrides, argv[1:], stop)
            if result is not None:
                finish(workdir, result)
    except (UserError, Unsaved, Diverged, Stopped) as end:
        processes.end_all(f"launch.py: {end}", end.exit_code)
        sys.exit(_complain(end, end.exit_code))
    except BaseException:
        processes.end_all(traceback.format_exc(), 1)
        raise
    finally:
        stop.end()


def run_mode(
    config: Any, workdir: Path, overrides: dict[str, Any], more: list[str], stop: Any
) -> dict[str, Any] | None:
    """Do what --mode asks for; its result, if it has one, is the last line that is printed."""
    saved = {"overrides": overrides, "checkpoint": CHECKPOINT.value}
    start = {"overrides": overrides, "command": sys.argv}
    match MODE.value:
        case "train":
            from dblocks_jax.modes.train import train

            return train(config, workdir, stop=stop, **start)
        case "eval":
            from dblocks_jax.modes.evaluate import evaluate_run

            return evaluate_run(config, workdir, train_on_samples=TRAIN_ON_SAMPLES.value, **saved)
        case "predict" if config.task in TASKS_OF["text"]:
            from dblocks_jax.modes.reading import predict_text

            return predict_text(config, workdir, TEXT.value or "", **saved)
        case "predict":
            from dblocks_jax.modes.predict import predict

            return predict(config, workdir, [*_names(IMAGES), *more], **saved)
        case "sample" if config.task in ("next_token", "recurrent"):
            from dblocks_jax.modes.continuing import continue_text

            return continue_text(config, workdir, text=TEXT.value, count=COUNT.value, **saved)
        case "sample" if config.task == "mask":
            from dblocks_jax.modes.writing import sample_texts

            return sample_texts(config, workdir, text=TEXT.value, count=COUNT.value, **saved)
        case "sample":
            from dblocks_jax.modes.sample import sample

            wanted = {"classes": CLASSES.value, "count": COUNT.value, "cfg_scale": CFG_SCALE.value}
            return sample(config, workdir, **wanted, **saved)
        case "demo":
            from dblocks_jax.modes.demo import demo

            return demo(config, workdir, port=PORT.value, stop=stop, **saved)
        case "report":
            from dblocks_jax.modes.report import report

            return report(config, workdir, **saved)
        case "compare":
            from dblocks_jax.modes.compare import compare

            return compare([Path(run) for run in [*_names(RUNS), *more]], workdir)
        case "inspect":
            from dblocks_jax.modes.inspect import inspect

            return inspect(config, workdir)
        case "memory" if TARGET.value is not None:
            from dblocks_jax.modes.absent import absent_table

            return absent_table(config, parse_targets(TARGET.value), gib=GIB.value)
        case "memory":
            from dblocks_jax.modes.memory import memory_table

            return memory_table(config, gib=GIB.value)
        case "merge":
            from dblocks_jax.modes.merge import merge

            return merge([Path(part) for part in _names(PARTS)], workdir, **start)
        case "import":
            from dblocks_jax.modes.importing import import_released

            return import_released(config, workdir, Path(SOURCE.value or ""), **start)
        case mode:
            assert mode == "export"
            from dblocks_jax.modes.export import export_run

            return export_run(config, workdir, **saved)


def _names(flag: flags.FlagHolder[list[str]]) -> list[str]:
    """What a flag lists with commas between, or by being given several times."""
    return [name for text in flag.value or [] for name in split_names(text)]


def _log_our_own_lines() -> None:
    """Libraries log through absl too: of theirs, show warnings only, and nothing of Orbax, which raises it as well."""
    logging.set_verbosity(logging.INFO)
    package = str(Path(dblocks_jax.__file__).parent)

    def is_ours_or_matters(record: LogRecord) -> bool:
        is_orbax = "orbax" in record.pathname or record.name == "asyncio"  # nobody else here uses that
        return record.pathname.startswith(package) or (record.levelno >= WARNING and not is_orbax)

    logging.get_absl_handler().addFilter(is_ours_or_matters)
    logging.get_absl_handler().setFormatter(_Safe("%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S"))


class _Safe(Formatter):
    """Names in what is logged may be a stranger's: they are shown escaped."""

    def format(self, record: LogRecord) -> str:
        return shown_lines(super().format(record))


def _hide_what_is_raised_anyway() -> None:
    """When one file of a checkpoint cannot be read, TensorStore's other reads find Orbax's event loop closed."""

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


def _keep_compiled_programs() -> None:
    """A second start need not compile again, unless JAX_COMPILATION_CACHE_DIR is set (to nothing, for no cache)."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
        if str(home).startswith("~"):  # a user without a home, as in some containers
            return
        jax.config.update("jax_compilation_cache_dir", str(home / "dblocks_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # parameters start from many small ones


def _complain(problem: object, code: int) -> int:
    print(shown_lines(f"launch.py: {problem}"), file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
