"""A generated acceptability task: minimal pairs of sentences, built in code.

In the manner of BLiMP [1]_: a pair is one acceptable and one unacceptable sentence
that differ in one word, or in the order of the same words. A model sees single
sentences and says which are acceptable (label 1), as in CoLA [2]_.

Two properties make the score mean something:

- Every template is used both ways round (singular and plural, with and without the
  auxiliary, ...), so that no word by itself tells the label: a classifier on word
  counts stays near chance.
- The nouns, verbs and adjectives of the dev split never occur in the train split.

References
----------
.. [1] Warstadt et al., "BLiMP: The Benchmark of Linguistic Minimal Pairs for
   English", TACL 8, 2020. https://arxiv.org/abs/1912.00582
.. [2] Warstadt, Singh and Bowman, "Neural Network Acceptability Judgments",
   TACL 7, 2019. https://arxiv.org/abs/1805.12471
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from lola_glue.vocabulary import Vocabulary


@dataclass(frozen=True)
class MinimalPair:
    """An acceptable sentence, its unacceptable twin, and what tells them apart."""

    phenomenon: str
    acceptable: str
    unacceptable: str


# Determiners that fit a subject of one number. "The" fits both.
_SINGULAR = ("this", "that", "every", "each", "the")
_PLURAL = ("these", "those", "many", "several", "the")

# Pronouns as subjects: with a noun ("the doctor blamed themselves") the singular
# "they" would make the unacceptable sentence acceptable.
_REFLEXIVES = {
    "I": "myself",
    "we": "ourselves",
    "he": "himself",
    "she": "herself",
    "they": "themselves",
}


def _sentence(*parts: str) -> str:
    """Join the words of the parts; capital letter and full stop."""
    words = " ".join(part for part in parts if part)
    return f"{words[0].upper()}{words[1:]}."


def _subject(words: Vocabulary, rng: random.Random, plural: bool) -> str:
    """Give a person or people, after a determiner of the same number."""
    determiner = rng.choice(_PLURAL if plural else _SINGULAR)
    return f"{determiner} {rng.choice(words.people)[plural]}"


def _two_people(words: Vocabulary, rng: random.Random) -> tuple[str, str]:
    """Draw two different people, each in a random number."""
    first, second = rng.sample(words.people, 2)
    return rng.choice(first), rng.choice(second)


def _matching(plural: bool, singular_form: str, plural_form: str) -> tuple[str, str]:
    """Give the form that agrees, then the one that does not."""
    if plural:
        return plural_form, singular_form
    return singular_form, plural_form


def _subject_verb_agreement(words: Vocabulary, rng: random.Random) -> tuple[str, str]:
    """Make "This doctor is tired" / "are tired"; likewise has, and full verbs."""
    plural = rng.random() < 0.5
    start = _subject(words, rng, plural)
    other = rng.choice(rng.choice(words.people))
    frame = rng.randrange(3)
    if frame == 0:
        good, bad = _matching(plural, *rng.choice((("is", "are"), ("was", "were"))))
        rest = rng.choice(words.adjectives)
    elif frame == 1:
        good, bad = _matching(plural, "has", "have")
        rest = f"{rng.choice(words.transitive).past} the {other}"
    else:
        verb = rng.choice(words.transitive)
        good, bad = _matching(plural, verb.third, verb.base)
        rest = f"the {other}"
    return _sentence(start, good, rest), _sentence(start, bad, rest)


def _attractor_agreement(words: Vocabulary, rng: random.Random) -> tuple[str, str]:
    """Make "This doctor near the lamps is tired" / "are tired"."""
    plural = rng.random() < 0.5
    place = rng.choice(("near", "behind", "beside"))
    attractor = rng.choice(words.things)[not plural]
    start = f"{_subject(words, rng, plural)} {place} the {attractor}"
    good, bad = _matching(plural, *rng.choice((("is", "are"), ("was", "were"))))
    rest = rng.choice(words.adjectives)
    return _sentence(start, good, rest), _sentence(start, bad, rest)


def _reflexive_agreement(words: Vocabulary, rng: random.Random) -> tuple[str, str]:
    """Make "The doctors said that she blamed herself" / "blamed themselves"."""
    pronoun, other = rng.sample(tuple(_REFLEXIVES), 2)
    person = rng.choice(rng.choice(words.people))
    report = rng.choice(("said", "thought", "hoped"))
    verb = rng.choice(words.transitive).past
    start = f"the {person} {report} that {pronoun} {verb}"
    return (
        _sentence(start, _REFLEXIVES[pronoun]),
        _sentence(start, _REFLEXIVES[other]),
    )


def _determiner_noun(words: Vocabulary, rng: random.Random) -> tuple[str, str]:
    """Make "The doctor cleaned this lamp" / "these lamp"."""
    plural = rng.random() < 0.5
    person = rng.choice(rng.choice(words.people))
    start = f"the {person} {rng.choice(words.handling).past}"
    pair = rng.choice((("this", "these"), ("that", "those")))
    good, bad = _matching(plural, *pair)
    thing = rng.choice(words.things)[plural]
    return _sentence(start, good, thing), _sentence(start, bad, thing)


def _adjective_order(words: Vocabulary, rng: random.Random) -> tuple[str, str]:
    """Make "The tired doctor cleaned the lamp" / "The doctor tired cleaned"."""
    person = rng.choice(rng.choice(words.people))
    adjective = rng.choice(words.adjectives)
    rest = f"{rng.choice(words.handling).past} the {rng.choice(words.things)[0]}"
    return (
        _sentence("the", adjective, person, rest),
        _sentence("the", person, adjective, rest),
    )


def _clause_order(words: Vocabulary, rng: random.Random) -> tuple[str, str]:
    """Make "The doctor praised the pilots" / "The doctor the pilots praised"."""
    subject, other = _two_people(words, rng)
    verb = rng.choice(words.transitive).past
    return (
        _sentence("the", subject, verb, "the", other),
        _sentence("the", subject, "the", other, verb),
    )


def _question_inversion(words: Vocabulary, rng: random.Random) -> tuple[str, str]:
    """Make "What will the doctor clean?" / "What the doctor will clean?"."""
    auxiliary = rng.choice(("will", "did", "should", "can"))
    person = f"the {rng.choice(rng.choice(words.people))}"
    verb = rng.choice(words.handling).base
    question = rng.choice(("what", "why", "when", "where"))
    # "What" asks for the object; after the others the object is named.
    thing = "" if question == "what" else f"the {rng.choice(rng.choice(words.things))}"
    good = _sentence(question, auxiliary, person, verb, thing)
    bad = _sentence(question, person, auxiliary, verb, thing)
    return f"{good[:-1]}?", f"{bad[:-1]}?"


def _argument_structure(words: Vocabulary, rng: random.Random) -> tuple[str, str]:
    """Make "The doctor smiled at the pilot" / "praised at"; likewise without "at"."""
    subject, other = _two_people(words, rng)
    transitive = rng.choice(words.transitive).past
    intransitive = rng.choice(words.intransitive).past
    preposition = rng.choice(("", "at"))
    good, bad = _matching(preposition == "at", transitive, intransitive)
    return (
        _sentence("the", subject, good, preposition, "the", other),
        _sentence("the", subject, bad, preposition, "the", other),
    )


def _negative_polarity(words: Vocabulary, rng: random.Random) -> tuple[str, str]:
    """Make "No doctor that the pilot hired has ever smiled" / "The ... no ..."."""
    subject, other = rng.sample(words.people, 2)
    clause = f"{rng.choice(words.transitive).past} has ever"
    first, second = f"{subject.singular} that", rng.choice(other)
    verb = rng.choice(words.intransitive).past
    return (
        _sentence("no", first, "the", second, clause, verb),
        _sentence("the", first, "no", second, clause, verb),
    )


def _irregular_forms(words: Vocabulary, rng: random.Random) -> tuple[str, str]:
    """Make "The doctor has broken the lamp" / "has broke"; likewise without "has"."""
    plural = rng.random() < 0.5
    start = f"the {rng.choice(words.people)[plural]}"
    verb = rng.choice(words.irregular)
    perfect = rng.random() < 0.5
    auxiliary = rng.choice((("has", "have")[plural], "had")) if perfect else ""
    good, bad = _matching(perfect, verb.past, verb.participle)
    rest = f"the {rng.choice(rng.choice(words.things))}"
    return (
        _sentence(start, auxiliary, good, rest),
        _sentence(start, auxiliary, bad, rest),
    )


def _auxiliary_form(words: Vocabulary, rng: random.Random) -> tuple[str, str]:
    """Make "The lamp will be cleaned" / "has be"; likewise "has been" / "will been"."""
    plural = rng.random() < 0.5
    modal = rng.choice(("will", "can", "should", "must"))
    perfect = rng.choice((("has", "have")[plural], "had"))
    use_perfect = rng.random() < 0.5
    good, bad = _matching(use_perfect, modal, perfect)
    start = f"the {rng.choice(words.things)[plural]}"
    be = "been" if use_perfect else "be"
    rest = f"{be} {rng.choice(words.handling).past}"
    if rng.random() < 0.5:
        rest = f"{rest} by the {rng.choice(rng.choice(words.people))}"
    return _sentence(start, good, rest), _sentence(start, bad, rest)


def _phrase_order(words: Vocabulary, rng: random.Random) -> tuple[str, str]:
    """Make "The doctor near the lamp smiled" / "The doctor the near lamp smiled"."""
    person = rng.choice(rng.choice(words.people))
    place = rng.choice(("near", "behind", "beside"))
    thing = rng.choice(rng.choice(words.things))
    verb = rng.choice(words.intransitive).past
    return (
        _sentence("the", person, place, "the", thing, verb),
        _sentence("the", person, "the", place, thing, verb),
    )


def _passive_order(words: Vocabulary, rng: random.Random) -> tuple[str, str]:
    """Make "The lamp was cleaned by the doctor" / "was by cleaned the doctor"."""
    plural = rng.random() < 0.5
    start = f"the {rng.choice(words.things)[plural]} {('was', 'were')[plural]}"
    verb = rng.choice(words.handling).past
    agent = f"the {rng.choice(rng.choice(words.people))}"
    return (
        _sentence(start, verb, "by", agent),
        _sentence(start, "by", verb, agent),
    )


_Template = Callable[[Vocabulary, random.Random], tuple[str, str]]

PHENOMENA: dict[str, _Template] = {
    "subject-verb-agreement": _subject_verb_agreement,
    "attractor-agreement": _attractor_agreement,
    "reflexive-agreement": _reflexive_agreement,
    "determiner-noun": _determiner_noun,
    "adjective-order": _adjective_order,
    "clause-order": _clause_order,
    "question-inversion": _question_inversion,
    "argument-structure": _argument_structure,
    "negative-polarity": _negative_polarity,
    "irregular-forms": _irregular_forms,
    "auxiliary-form": _auxiliary_form,
    "phrase-order": _phrase_order,
    "passive-order": _passive_order,
}
"""Phenomenon by name: its template makes (acceptable, unacceptable)."""

# A template that meets only known sentences this often has run out of new ones.
_MAX_TRIES = 1000


def minimal_pairs(
    vocabulary: Vocabulary, num_pairs: int, seed: int
) -> tuple[MinimalPair, ...]:
    """Generate pairs whose sentences are all different.

    The phenomena take turns, so their numbers differ by at most one pair.

    Parameters
    ----------
    vocabulary
        The content words to use.
    num_pairs
        Number of pairs; twice as many sentences.
    seed
        The same seed gives the same pairs.

    Returns
    -------
    The pairs, phenomenon by phenomenon in turn.

    Raises
    ------
    ValueError
        If the word lists do not hold that many different sentences.
    """
    rng = random.Random(seed)
    names = tuple(PHENOMENA)
    seen: set[str] = set()
    pairs: list[MinimalPair] = []
    while len(pairs) < num_pairs:
        name = names[len(pairs) % len(names)]
        for _ in range(_MAX_TRIES):
            good, bad = PHENOMENA[name](vocabulary, rng)
            if good not in seen and bad not in seen:
                break
        else:
            raise ValueError(
                f"Too few different sentences: num_pairs={num_pairs} pairs asked "
                f"for, {name} ran out after {len(pairs)}. Ask for fewer examples."
            )
        seen.update((good, bad))
        pairs.append(MinimalPair(name, good, bad))
    return tuple(pairs)
