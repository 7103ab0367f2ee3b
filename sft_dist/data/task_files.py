"""Tasks with several instances: one record, many conversations.

    self_instruct          instruction, instances: [{input?, output}]
    natural_instructions   Definition, Instances: [{input, output: [text, ...]}]   (a task file)
                           definition, input, output: [text, ...]                  (one of its instances)

Each instance asks the task's instruction with its own input, and is good or bad alone: a task file is one record of
thousands of them. Where an instance has several right outputs, each
different one is a conversation: none is better than the others. The positive and negative examples of a task file are
demonstrations for prompts, not part of the data that Tk-Instruct is trained on, and are not read (Wang et al., 2022,
"Super-NaturalInstructions", section 3; Wang et al., 2023, "Self-Instruct").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sft_dist.data.fields import Turns, Value, task_message, text_field
from sft_dist.data.strict_json import kind_of
from sft_dist.errors import BadRecord
from sft_dist.types import Message

Task = tuple[str, list[Any]]  # instruction, instances


def is_self_instruct(value: Value) -> bool:
    return "instruction" in value and isinstance(value.get("instances"), list)


def is_natural_instructions(value: Value) -> bool:
    return {"Definition", "Instances"} <= value.keys() or {"definition", "input", "output"} <= value.keys()


def read_self_instruct(value: Value) -> Task:
    return text_field(value, "instruction"), _instances(value, "instances")


def read_natural_instructions(value: Value) -> Task:
    definition = _definition(value, "Definition" if "Definition" in value else "definition")
    return definition, _instances(value, "Instances") if "Instances" in value else [value]


TASKS: dict[str, Callable[[Value], Task]] = {
    "self_instruct": read_self_instruct,
    "natural_instructions": read_natural_instructions,
}


def read_instance(instruction: str, instance: Any) -> list[Turns]:
    """One conversation for each different output of an instance."""
    if not isinstance(instance, Mapping):
        raise BadRecord(f"an instance must be an object with 'input' and 'output', it is {kind_of(instance)}")
    asked = task_message(instruction, text_field(instance, "input", optional=True))
    given = instance.get("output")
    if given == []:
        raise BadRecord("field 'output' is empty")
    texts = [text_field({"output": one}, "output") for one in (given if isinstance(given, list) else [])]
    outputs = dict.fromkeys(texts or [text_field(instance, "output")])
    return [([asked, Message("assistant", output)], ()) for output in outputs]


def _definition(value: Value, key: str) -> str:
    """Task files write it as a list of paragraphs."""
    given = value.get(key)
    if isinstance(given, list) and all(isinstance(part, str) for part in given):
        return text_field({key: "\n".join(given)}, key)
    return text_field(value, key)


def _instances(value: Value, key: str) -> list[Any]:
    instances = value.get(key)
    if not isinstance(instances, list):
        raise BadRecord(f"field {key!r} must be a list of instances, it is {kind_of(instances)}")
    if not instances:
        raise BadRecord(f"field {key!r} is empty")
    return instances
