"""Sentences to tensors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from lola_flwr.model.backprop import Batch
from lola_glue.tasks import Examples


def make_batch(
    examples: Examples,
    indices: npt.NDArray[np.intp],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
) -> Batch:
    """Tokenize some examples into the arguments of a sequence classifier.

    Parameters
    ----------
    examples
        Sentences or sentence pairs, with labels.
    indices
        Which of them, shape [B].
    tokenizer
        The model's tokenizer.
    max_length
        Tokens to cut to. Shorter batches are padded to their own longest sentence.

    Returns
    -------
    Tensors of shape [B, S], and ``labels`` [B]: long for classes, float for a
    regression.
    """
    pairs = [examples.sentences[index] for index in indices]
    first = [pair[0] for pair in pairs]
    second = [pair[1] or "" for pair in pairs] if pairs[0][1] is not None else None
    encoded = tokenizer(
        first,
        second,
        truncation=True,
        max_length=max_length,
        padding=True,
        return_tensors="pt",
    )
    return {**encoded, "labels": torch.as_tensor(examples.labels[indices])}
