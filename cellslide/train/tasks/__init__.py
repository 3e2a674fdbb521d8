"""The trainings that are built in, one file a model; importing this registers them."""

from cellslide.train.task import TASKS, TrainingTask, register
from cellslide.train.tasks import celldetr, fusion, hover, nuclass, points, pretrain

for _task in (hover.TASK, *nuclass.TASKS, points.TASK, celldetr.TASK, *fusion.TASKS, *pretrain.TASKS):
    register(_task)


def tasks_of(command: str) -> dict[str, TrainingTask]:
    """Return the trainings of a command by name."""
    return {task.name: task for task in TASKS.values() if task.command == command}
