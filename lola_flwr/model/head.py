"""The head of a sequence classifier: the task's classes, in the task's order.

A model that was trained as a classifier before brings that task along: the names, the
number and the order of its classes, and its loss. None of these may outlive it unseen.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lola_flwr.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# What transformers calls a class that was given no name.
_NO_NAME = re.compile(r"(label_?)?\d+", re.IGNORECASE)

# Further entries of a configuration that speak of the task it was trained for.
_OF_A_TASK = ("finetuning_task", "function_to_apply", "task_specific_params")


def check_class_names(num_labels: int, class_names: Sequence[str]) -> None:
    """Check that there is one name for each class, or none at all.

    Raises
    ------
    UserError
        There is not, or two names are alike.
    """
    if class_names and len({_plain(name) for name in class_names}) != num_labels:
        raise UserError(
            f"class_names={tuple(class_names)!r} must be {num_labels} different names, "
            f"one for each of num_labels={num_labels}."
        )


def own_names(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the names that a model gives its classes, in the order of its outputs."""
    names: Mapping[int, str] = config.id2label or {}
    return tuple(str(names.get(index, "")) for index in range(len(names)))


def are_named(names: Sequence[str]) -> bool:
    """Tell whether classes have names, or the numbers that stand for them."""
    return not all(map(_NO_NAME.fullmatch, names))


def set_task(
    config: PretrainedConfig, num_labels: int, class_names: Sequence[str]
) -> None:
    """Let a configuration be that of a task, whatever it was trained for.

    Parameters
    ----------
    config
        Changed in place: classes and kind of loss.
    num_labels
        Classes; 1 makes a regression.
    class_names
        Their names; none leaves those that the configuration has for so many.
    """
    for key in _OF_A_TASK:
        if getattr(config, key, None) is not None:
            setattr(config, key, None)
    # Left to itself a model takes the first batch's labels for a hint, for good.
    config.problem_type = None
    config.num_labels = num_labels
    if class_names:
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: index for index, name in enumerate(class_names)}
    config.problem_type = (
        "regression" if num_labels == 1 else "single_label_classification"
    )


def fit_head(
    model: PreTrainedModel,
    own: Sequence[str],
    class_names: Sequence[str],
    *,
    missing: Collection[str],
    mismatched: Collection[str],
) -> str:
    """Let the outputs of a loaded model be the task's classes.

    Where the model's own classes are the task's by name, in any order and spelling,
    the rows of its head are put into the task's order; a head of other classes is made
    anew. (With one output there is no order to mistake: that of a regression is kept.)

    Parameters
    ----------
    model
        The model under the task's configuration; its head is changed in place. What is
        drawn for a new one comes from PyTorch's default generator.
    own
        The names that its classes had.
    class_names
        Those of the task, if it has any.
    missing, mismatched
        Parameters that were not loaded, since the model has none or smaller ones.

    Returns
    -------
    What there is to tell the user of the head's classes; "" if nothing.

    Raises
    ------
    UserError
        The head's classes have names and the task's have none.
    """
    rows = _class_dimensions(model)
    if rows.keys() & set(mismatched):
        return (
            f"it has another number of classes ({', '.join(own)}) than the task "
            f"({model.config.num_labels}): the head's last layer starts anew"
        )
    if rows.keys() <= set(missing) or model.config.num_labels == 1:
        return ""
    if not class_names:
        listed = ", ".join(f"{index} {name}" for index, name in enumerate(own))
        if not are_named(own):
            return ""
        raise UserError(
            f"The model has classes already ({listed}), and which of the task's each "
            "is does not follow: pass class_names=, in the order of the task's "
            f"numbers, as {list(own)} if they are the same."
        )
    order = _matched(own, class_names)
    if order is None:
        _renew(model, rows)
        return (
            f"its classes ({', '.join(own)}) are not the task's "
            f"({', '.join(class_names)}): the head's last layer starts anew"
        )
    tensors = _tensors(model)
    with torch.no_grad():
        for name, dimensions in rows.items():
            for dim in dimensions:
                ordered = tensors[name].index_select(dim, torch.tensor(order))
                tensors[name].copy_(ordered)
    return ""


def _class_dimensions(model: PreTrainedModel) -> dict[str, list[int]]:
    """Find the tensors that have an entry for each class, and along which dimensions.

    They are those that have one more in the same model of one more class. Of that one
    only shapes are made.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    config.problem_type = None
    config.num_labels += 1
    with torch.device("meta"):
        larger = AutoModelForSequenceClassification.from_config(config)
    shapes = {name: tensor.shape for name, tensor in _tensors(larger).items()}
    found = {
        name: [
            dim for dim, size in enumerate(tensor.shape) if size != shapes[name][dim]
        ]
        for name, tensor in _tensors(model).items()
    }
    return {name: dimensions for name, dimensions in found.items() if dimensions}


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _matched(own: Sequence[str], class_names: Sequence[str]) -> list[int] | None:
    """Return the index among a model's own classes of each of the task's, or None."""
    places = {_plain(name): index for index, name in enumerate(own)}
    names = [_plain(name) for name in class_names]
    if len(places) != len(own) or places.keys() != set(names):
        return None
    return [places[name] for name in names]


def _plain(name: str) -> str:
    """Drop what spellings of one name differ in: NOT_ENTAILMENT, not-entailment."""
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def _renew(model: Any, names: Collection[str]) -> None:
    """Draw the parameters of some modules anew, as the model's class does."""
    for path in {name.rpartition(".")[0] for name in names}:
        module: Any = model.get_submodule(path)
        for name, parameter in list(module.named_parameters(recurse=False)):
            # transformers 5 passes over the tensors that it has loaded.
            setattr(module, name, nn.Parameter(torch.empty_like(parameter)))
        # What the class leaves alone has PyTorch's values.
        module.reset_parameters()
        with torch.no_grad():
            model._init_weights(module)
