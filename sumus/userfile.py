"""Load users' Python files for the command line. A file defines a value under a name, or a function that makes the value.

    experiment = load_experiment("health.py:smaller")
    client = load_client("health.py")

An error in a user's file is reported in one sentence that names the line.
"""

import importlib.util
import sys
import traceback
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sumus.errors import ExperimentError, SumusError, needs
from sumus.experiment import Experiment
from sumus.plan import Plan
from sumus.task import Data, Task


def load_experiment(file: str) -> Experiment:
    """Return the experiment that a file defines as `experiment`, or under the name after the colon."""
    module, name = load(file)
    value = named(file, module, name or "experiment")
    if value is None:
        path = split(file)[0]
        raise ExperimentError(
            f"{path} defines no {name or 'experiment'!r}: add `{name or 'experiment'} = sumus.Experiment(...)`, or name "
            f"another as {path}:NAME"
        )
    if not isinstance(value, Experiment):
        raise ExperimentError(f"{name or 'experiment'!r} in {file} is a {type(value).__name__}, not a sumus.Experiment")
    return value


@dataclass(frozen=True)
class Trial:
    """A plan with the examples to try it on.

    Attributes:
        plan: The plan.
        population: The clients' examples, by client id.
        seed: The seed of the trial.
        made_up: Whether the examples are not real, but random numbers in the form that the task declares.
    """

    plan: Plan
    population: Mapping[Any, Any]
    seed: int = 0
    made_up: bool = False


MADE_UP = 20
"""The number of examples that `made_up` makes."""


def load_plan(file: str) -> Trial:
    """Return the plan that a file defines, with examples to try it on.

    The file defines either `experiment`, or `plan` and one device's `examples`. If the file has no examples, random ones
    are made in the form that the task declares.
    """
    module, value = experiment_or_plan(file)
    if isinstance(value, Experiment):
        return Trial(value.plan, value.population, value.seed)
    examples = named(file, module, "examples")
    if examples is not None:
        return Trial(value, {"examples": examples})
    if not isinstance(value.task, Task) or value.task.data is None:
        raise ExperimentError(
            f"{file} defines a plan, but neither `examples` to try it on nor their form: declare the form, such as "
            'Task(data=sumus.Data(inputs=(4,), inputs_dtype="float32", targets=(), targets_dtype="int64", classes=2)); or add '
            "`examples = (inputs, targets)`"
        )
    task = replace(value.task, prepare=None)  # the declared form is that of prepared examples
    return Trial(replace(value, task=task), {"made up": made_up(value.task.data)}, made_up=True)


def made_up(data: Data) -> tuple[Any, Any]:
    """Make random examples in the form that a task declares: random floats, zeros for integer inputs, random classes."""
    rng = np.random.default_rng(0)

    def of(shape: tuple[int, ...], dtype: str, drawn: Any) -> Any:
        whole = np.dtype(dtype).kind != "f"
        numbers = rng.normal(size=(MADE_UP, *shape)) if drawn is None else rng.integers(0, drawn, (MADE_UP, *shape))
        return (np.zeros_like(numbers) if whole and drawn is None else numbers).astype(dtype)

    known = {"bfloat16": "float32"}
    inputs = of(data.inputs, known.get(data.inputs_dtype, data.inputs_dtype), None)
    return inputs, of(data.targets, known.get(data.targets_dtype, data.targets_dtype), data.classes or 2)


@dataclass(frozen=True)
class Client:
    """The task and the examples with which a device takes part.

    Attributes:
        task: The task.
        examples: The examples, or a function that returns them and has not been called yet.
        held_out: Examples to evaluate on, or such a function; None to evaluate on `examples`.
    """

    task: Task
    examples: Any
    held_out: Any = None


def load_client(file: str) -> Client:
    """Read a device's file.

    The file defines `examples` (or the name after the colon), optionally `held_out`, and a task: either `task` itself, or
    the task of `plan` or `experiment`.
    """
    module, name = load(file)
    task = task_of(file, module)
    examples = getattr(module, name or "examples", None)
    if examples is None:
        raise ExperimentError(
            f"{file} defines no `{name or 'examples'}`: add `{name or 'examples'} = (inputs, targets)`, the "
            "examples of this device"
        )
    return Client(task, examples, getattr(module, "held_out", None))


def task_of(file: str, module: ModuleType) -> Task:
    """Return the `task` of a file, or the task of its `plan` or `experiment`."""
    found = (named(file, module, which) for which in ("task", "plan", "experiment"))
    value = next((value for value in found if isinstance(value, Task | Plan | Experiment)), None)
    value = value.plan if isinstance(value, Experiment) else value
    task = value.task if isinstance(value, Plan) else value
    if not isinstance(task, Task):
        raise ExperimentError(f"{file} defines no `task = sumus.Task(...)`, and no plan or experiment that has one")
    return task


def experiment_or_plan(file: str) -> tuple[ModuleType, Experiment | Plan]:
    """Return the module of a file, and its experiment or its plan."""
    module, name = load(file)
    value = named(file, module, name) if name else named(file, module, "experiment") or named(file, module, "plan")
    if not isinstance(value, Experiment | Plan):
        raise ExperimentError(
            f"{file} defines neither `experiment = sumus.Experiment(...)` nor `plan = sumus.Plan(...)`"
        )
    return module, value


def load(file: str) -> tuple[ModuleType, str | None]:
    """Run a file as a module. Return the module, and the name after the colon."""
    text, name = split(file)
    path = Path(text).resolve()
    if not path.is_file():
        raise ExperimentError(
            f"there is no file {text}: give the path of a Python file, such as examples/linear_regression.py"
        )
    module_name = f"sumus_file_{path.stem}"  # no other module has such a name
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ExperimentError(f"{text} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    sys.path.insert(0, str(path.parent))
    sys.argv = [text]
    with blaming(text):
        spec.loader.exec_module(module)
    return module, name


def split(file: str) -> tuple[str, str | None]:
    """Split FILE.py[:NAME] into file and name. The path itself may hold a colon."""
    text, colon, name = file.rpartition(":")
    return (text, name or None) if colon and not Path(file).is_file() and Path(text).is_file() else (file, None)


@contextmanager
def blaming(text: str) -> Generator[None, None, None]:
    """Turn an exception in the user's own file into one sentence that names the line."""
    try:
        yield
    except SumusError:
        raise
    except SystemExit as error:
        raise ExperimentError(
            f"{text} ended the program ({error}): guard it with `if __name__ == '__main__':`"
        ) from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == str(Path(text).resolve())]
        line = own[-1].lineno if own else None
        if isinstance(error, SyntaxError):
            text, line = (error.filename or text) if error.filename != str(Path(text).resolve()) else text, error.lineno
        where = f"{text}, line {line}" if line else text
        why = needs(error) if isinstance(error, ModuleNotFoundError) else ""
        raise ExperimentError(f"{where}: {why or f'{type(error).__name__}: {error}'}") from error


def named(file: str, module: ModuleType, name: str) -> Any:
    """Return the value that a file defines under a name, or the result of the function under that name; None if there
    is neither.
    """
    value = getattr(module, name, None)
    if not callable(value) or isinstance(value, Experiment | Plan):
        return value
    with blaming(split(file)[0]):
        return value()
