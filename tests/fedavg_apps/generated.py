"""Data that the projects here learn from, generated in place of a download.

A project imports it as a module beside its package, where the bench puts it. A node's
part is a function of its number: labels are skewed a little from node to node, and
``HELD_OUT`` is a part of its own.
"""

import tempfile
from functools import cache

import torch
from torch import nn

HELD_OUT = 10_000


def images(part, count=192, size=16, noise=1.8):
    """Ten shapes on RGB images [count, 3, size, size]; each shifted, and in noise."""
    shapes = torch.randn(10, 3, 4, 4, generator=_generator(-1))
    shapes = nn.functional.interpolate(shapes, size=(size, size), mode="bilinear")
    generator = _generator(part)
    labels = _labels(part, count, 10, generator)
    x = shapes[labels]
    for shift, dim in ((3, 1), (3, 2)):
        by = torch.randint(-shift, shift + 1, (count,), generator=generator)
        x = torch.stack([i.roll(int(b), dim) for i, b in zip(x, by, strict=True)])
    return x + noise * torch.randn(x.shape, generator=generator), labels


def table(part, count=192, features=12):
    """Rows of numbers [count, features], labelled 0 to 3 by how pairs of them agree."""
    generator = _generator(part)
    x = torch.randn(count, features, generator=generator)
    first = x[:, 0] * x[:, 1] + 0.5 * x[:, 2] > 0
    second = x[:, 3] * x[:, 4] + 0.5 * x[:, 5] > 0
    labels = 2 * first.long() + second.long()
    flipped = torch.rand(count, generator=generator) < 0.1
    anything = torch.randint(0, 4, (count,), generator=generator)
    return x, torch.where(flipped, anything, labels)


def signals(part, count=192, features=32):
    """Mixtures of six waves [count, features], in noise."""
    places = torch.linspace(0, 3.14, features)
    waves = torch.stack([torch.sin((k + 1) * places) for k in range(6)])
    generator = _generator(part)
    shares = torch.tanh(2 * torch.randn(count, 6, generator=generator))
    x = shares @ waves / 2
    return x + 0.4 * torch.randn(x.shape, generator=generator)


def sentences(part, count=192, length=16, vocabulary=64):
    """Token ids [count, length], labelled 0 to 3 by which of four words are said most.

    Word ``4 + k`` speaks for label k % 4; others say nothing.
    """
    generator = _generator(part)
    labels = _labels(part, count, 4, generator)
    ids = torch.randint(20, vocabulary, (count, length), generator=generator)
    told = torch.rand(count, length, generator=generator) < 0.25
    words = (
        4 + labels[:, None] + 4 * torch.randint(0, 4, ids.shape, generator=generator)
    )
    ids = torch.where(told, words, ids)
    misled = torch.rand(count, length, generator=generator) < 0.1
    other = torch.randint(4, 20, ids.shape, generator=generator)
    return torch.where(misled, other, ids), labels


def text(part, count=96, length=24, vocabulary=32):
    """Token ids [count, length] of a language: most words have four that follow."""
    language = _generator(-2)
    followers = torch.randint(0, vocabulary, (vocabulary, 4), generator=language)
    generator = _generator(part)
    ids = torch.randint(0, vocabulary, (count, 1), generator=generator)
    for _ in range(length - 1):
        choice = torch.randint(0, 4, (count, 1), generator=generator)
        following = followers[ids[:, -1:]].squeeze(1).gather(1, choice)
        any_word = torch.randint(0, vocabulary, (count, 1), generator=generator)
        said = torch.rand(count, 1, generator=generator) < 0.9
        ids = torch.cat([ids, torch.where(said, following, any_word)], 1)
    return ids


@cache
def language_model():
    """Return the directory of a small Llama, as if it had been downloaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.1,
    )
    directory = tempfile.mkdtemp()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def _generator(part):
    return torch.Generator().manual_seed(100 + part)


def _labels(part, count, classes, generator):
    """Labels; those of a node are not quite uniform."""
    skew = 0.0 if part >= HELD_OUT else 0.5
    weights = torch.exp(skew * torch.randn(classes, generator=generator))
    return torch.multinomial(weights, count, replacement=True, generator=generator)
