"""A model, its tokenizer and a task that are made in code, and need no download.

The task: facts about animals, asked for in several ways. Each fact is held out in one
of the ways to ask, so that what is measured is whether the fact was learned, and not
the sentence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"

WITHOUT_NETWORK = (
    f"model='{EMBEDDED}', for its own data, a directory with config.json, "
    "model.safetensors and tokenizer files, or model='random:DIR', where DIR has a "
    "config.json and tokenizer files."
)
"""What there is without a network."""

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"

# Animal: its call, its home, its food, its young.
_ANIMALS = {
    "cow": ("moo", "barn", "grass", "calf"),
    "dog": ("woof", "kennel", "bones", "puppy"),
    "cat": ("meow", "house", "mice", "kitten"),
    "sheep": ("baa", "meadow", "clover", "lamb"),
    "horse": ("neigh", "stable", "hay", "foal"),
    "duck": ("quack", "pond", "weeds", "duckling"),
    "pig": ("oink", "sty", "scraps", "piglet"),
    "frog": ("croak", "swamp", "flies", "tadpole"),
    "owl": ("hoot", "tree", "voles", "owlet"),
    "lion": ("roar", "savanna", "zebras", "cub"),
    "wolf": ("howl", "forest", "deer", "pup"),
    "bee": ("buzz", "hive", "nectar", "larva"),
}

# What is asked, each in several ways, and how it is answered.
_QUESTIONS = (
    (
        (
            "what does the {} say ?",
            "which sound does the {} make ?",
            "the call of the {} is ?",
            "how does the {} sound ?",
            "say the call of the {} .",
        ),
        "the {} says {} .",
    ),
    (
        (
            "where does the {} live ?",
            "what is the home of the {} ?",
            "the {} lives where ?",
            "in which place is the {} found ?",
            "name the home of the {} .",
        ),
        "the {} lives in the {} .",
    ),
    (
        (
            "what does the {} eat ?",
            "the food of the {} is ?",
            "what is the {} fed with ?",
            "which food does the {} like ?",
            "name the food of the {} .",
        ),
        "the {} eats {} .",
    ),
    (
        (
            "what is the young of the {} ?",
            "how is the young {} called ?",
            "the {} raises what ?",
            "name the young of the {} .",
            "which young does the {} have ?",
        ),
        "the young of the {} is a {} .",
    ),
)

# Roles of dialogues, so that they can be tried with this tokenizer, too.
_DIALOGUE = ("user", "assistant", "system", ":")
_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }}"
    "{% if message.role == 'assistant' %} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)

Pair = tuple[str, str]


def facts(seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Return questions with their answers: to train on, and held out.

    Parameters
    ----------
    seed
        Seed of their order, and of which way to ask is held out for each fact.
    """
    rng = np.random.default_rng(seed)
    train: list[Pair] = []
    held_out: list[Pair] = []
    for animal, known in _ANIMALS.items():
        for (ways, answer), fact in zip(_QUESTIONS, known, strict=True):
            unseen = rng.integers(len(ways))
            for index, way in enumerate(ways):
                pair = (way.format(animal), f" {answer.format(animal, fact)}")
                (held_out if index == unseen else train).append(pair)
    order = rng.permutation(len(train))
    return [train[i] for i in order], held_out


def embedded_model() -> PreTrainedModel:
    """Make a decoder of four layers, from the random numbers of PyTorch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = _vocabulary()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            # Embeddings stay as they are drawn; smaller ones are learned from slowly.
            initializer_range=0.1,
            pad_token_id=words[PAD],
            bos_token_id=None,
            eos_token_id=words[END],
        )
    )


def embedded_tokenizer() -> PreTrainedTokenizerBase:
    """Make a tokenizer that knows the words of the task."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel(_vocabulary(), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        chat_template=_TEMPLATE,
    )


def _vocabulary() -> dict[str, int]:
    """Return the number of each word, special ones first."""
    texts = [text for ways, answer in _QUESTIONS for text in (*ways, answer)]
    asked = [word for text in texts for word in text.split()]
    known = [word for animal, facts in _ANIMALS.items() for word in (animal, *facts)]
    words = dict.fromkeys([PAD, END, UNKNOWN, *_DIALOGUE, *asked, *known])
    return {word: number for number, word in enumerate(w for w in words if w != "{}")}
