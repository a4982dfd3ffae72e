"""Seeded long-context tasks of any length in any tokenizer: `TASKS[name].build(tokenizer, ...)`."""

from .registry import TASKS, Task
from .types import Example

__all__ = ["TASKS", "Example", "Task"]
