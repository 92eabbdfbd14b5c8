"""Records to tokens, and tokens to batches: padded, or packed into full rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lola_causal.records import Record
from lola_flwr.errors import UserError, reason_of
from lola_flwr.model.backprop import Batch

IGNORED = -100
"""The label of what is not to be learned, as the losses of transformers know it."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """A prompt's tokens and those of its completion.

    Parameters
    ----------
    ids
        All of them.
    prompt_length
        How many are the prompt's, of which none is to be learned.
    """

    ids: tuple[int, ...]
    prompt_length: int

    @property
    def labels(self) -> Tensor:
        """What is to be learned; the first token is not, nothing stands before it."""
        skipped = max(1, self.prompt_length)
        return torch.tensor([IGNORED] * skipped + list(self.ids[skipped:]))


def encode(
    records: Sequence[Record], tokenizer: Any, *, max_length: int, model_name: str
) -> list[Tokens]:
    """Turn records into tokens.

    The prompt's tokens are those that it has by itself, as when the model is to answer.
    A completion ends with the tokenizer's end token, and a dialogue as its template has
    it; what is longer than ``max_length`` is cut, which is logged.

    Parameters
    ----------
    records
        The records.
    tokenizer
        The model's tokenizer.
    max_length
        Most tokens of a record.
    model_name
        What messages call the model.

    Raises
    ------
    UserError
        A prompt leaves no room for its completion, or there is no chat template; the
        message names file and line.
    """
    encoded = []
    num_cut = 0
    for record in records:
        if record.messages:
            prompt, answer = _of_dialogue(record, tokenizer, model_name)
        else:
            prompt, answer = _of_text(record, tokenizer)
        if len(prompt) >= max_length:
            raise UserError(
                f"{record.where}: the prompt has {len(prompt)} tokens, and "
                f"max-length={max_length} leaves none for its completion; raise "
                "max-length, or shorten the prompt."
            )
        if len(prompt) + len(answer) < 2 or not answer:
            raise UserError(
                f"{record.where}: the completion has no token that could be learned; "
                "take the line out."
            )
        num_cut += len(prompt) + len(answer) > max_length
        encoded.append(Tokens((*prompt, *answer)[:max_length], len(prompt)))
    if num_cut:
        _logger.warning(
            "%d of %d completions are cut to max-length=%d",
            *(num_cut, len(records), max_length),
        )
    return encoded


def _of_text(record: Record, tokenizer: Any) -> tuple[list[int], list[int]]:
    end = tokenizer.eos_token_id
    prompt = _without_end(tokenizer(record.prompt)["input_ids"], end)
    whole = tokenizer(record.prompt + record.completion)["input_ids"]
    answer = _after(prompt, _without_end(whole, end))
    if answer is None:
        # Letters of both would be in one token.
        answer = tokenizer(record.completion, add_special_tokens=False)["input_ids"]
    return prompt, [*answer, end]


def _of_dialogue(
    record: Record, tokenizer: Any, model_name: str
) -> tuple[list[int], list[int]]:
    if not tokenizer.chat_template:
        raise UserError(
            f"{record.where}: has messages, but the tokenizer of model={model_name!r} "
            "has no chat template; use a model that is tuned for dialogues, or write "
            "prompt and completion."
        )
    before = [{"role": role, "content": text} for role, text in record.messages]
    answer = {"role": "assistant", "content": record.completion}
    try:
        prompt_text, whole_text = (
            tokenizer.apply_chat_template(
                spoken, tokenize=False, add_generation_prompt=is_asked
            )
            for spoken, is_asked in ((before, True), ([*before, answer], False))
        )
    # Templates refuse roles and orders that they do not know, by errors of their own.
    except Exception as error:
        raise UserError(
            f"{record.where}: the chat template of model={model_name!r} refuses these "
            f"messages ({reason_of(error)})."
        ) from error
    prompt, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (prompt_text, whole_text)
    )
    found = _after(prompt, whole)
    if found is None:
        raise UserError(
            f"{record.where}: the chat template of model={model_name!r} writes the "
            "prompt otherwise once it is answered, so that what is learned would not "
            "follow from what the model is given; write prompt and completion."
        )
    if tokenizer.eos_token_id in found:
        # Behind its end nothing is ever written.
        found = found[: found.index(tokenizer.eos_token_id) + 1]
    return prompt, found


def _without_end(ids: list[int], end: int) -> list[int]:
    return ids[:-1] if ids and ids[-1] == end else ids


def _after(prompt: list[int], whole: list[int]) -> list[int] | None:
    return whole[len(prompt) :] if whole[: len(prompt)] == prompt else None


def padded(sequences: Sequence[Tokens], pad_id: int) -> Batch:
    """Return a batch with a sequence a row, padded to the longest; [B, S] each."""
    ids = [torch.tensor(sequence.ids) for sequence in sequences]
    return {
        "input_ids": pad_sequence(ids, True, pad_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True),
        "labels": pad_sequence([s.labels for s in sequences], True, IGNORED),
    }


def rows_of(
    sequences: Iterator[Tokens], num_rows: int, max_length: int
) -> list[list[Tokens]]:
    """Fill rows one after the other; a sequence is in one row, whole.

    Parameters
    ----------
    sequences
        Sequences of at most ``max_length`` tokens, in the order to take them in.
    num_rows, max_length
        Rows to fill (fewer where the sequences do not suffice), and their tokens.
    """
    rows: list[list[Tokens]] = []
    room = 0
    for sequence in sequences:
        if len(sequence.ids) > room:
            if len(rows) == num_rows:
                break
            rows.append([])
            room = max_length
        rows[-1].append(sequence)
        room -= len(sequence.ids)
    return rows


def packed(rows: Sequence[Sequence[Tokens]], pad_id: int) -> Batch:
    """Return a batch with several sequences a row, which do not see each other.

    Their positions begin anew; by these, and since there is no attention mask, models
    of transformers tell them apart. (`lola_causal.model.check_packing` tries it.)
    """
    ids = [torch.tensor([*chain(*(s.ids for s in row))]) for row in rows]
    labels = [torch.cat([s.labels for s in row]) for row in rows]
    positions = [torch.cat([torch.arange(len(s.ids)) for s in row]) for row in rows]
    longest = max(map(len, ids))
    # What fills a row up is a sequence of its own.
    filled = [torch.cat([p, torch.arange(longest - len(p))]) for p in positions]
    return {
        "input_ids": pad_sequence(ids, True, pad_id),
        "position_ids": torch.stack(filled),
        "labels": pad_sequence(labels, True, IGNORED),
    }


def num_learned(batch: Batch) -> int:
    """Return how many tokens a batch's loss is a mean over."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def batches_of(sequences: Sequence[Tokens], size: int, pad_id: int) -> Iterator[Batch]:
    """Give all sequences in padded batches, those of like length together."""
    ordered = sorted(sequences, key=lambda sequence: len(sequence.ids))
    ends = [*accumulate([0] + [size] * (-(-len(ordered) // size)))]
    for start in ends[:-1]:
        yield padded([*islice(ordered, start, start + size)], pad_id)
