"""The generated task: minimal, balanced, held out, and closed to a word count."""

import re
from collections import Counter

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from lola_glue.acceptability import PHENOMENA, minimal_pairs
from lola_glue.tasks import Examples, TaskError, load_task
from lola_glue.vocabulary import DEV_VOCABULARY, TRAIN_VOCABULARY

SEEDS = (0, 1, 2)
VOCABULARIES = {"train": TRAIN_VOCABULARY, "dev": DEV_VOCABULARY}


def words_of(sentence: str) -> list[str]:
    return re.findall(r"\w+", sentence.lower())


def texts(examples: Examples) -> list[str]:
    return [first for first, _ in examples.sentences]


def word_count_accuracy(seed: int) -> tuple[float, dict[str, float]]:
    """Dev accuracy of logistic regression on word counts: overall, per phenomenon."""
    _, train, dev = load_task("acceptability", seed=seed)
    counts = CountVectorizer(token_pattern=r"\w+")
    model = LogisticRegression(max_iter=500)
    model.fit(counts.fit_transform(texts(train)), train.labels)
    right = model.predict(counts.transform(texts(dev))) == dev.labels
    groups = np.asarray(dev.groups)
    return right.mean(), {name: right[groups == name].mean() for name in PHENOMENA}


class TestMinimalPairs:
    @pytest.mark.parametrize("split", VOCABULARIES)
    def test_members_differ_in_one_word_or_in_the_order_of_the_same_words(self, split):
        for pair in minimal_pairs(VOCABULARIES[split], 500, seed=0):
            good, bad = words_of(pair.acceptable), words_of(pair.unacceptable)
            assert good != bad, pair
            assert len(good) == len(bad), pair
            if Counter(good) != Counter(bad):
                different = [a != b for a, b in zip(good, bad, strict=True)]
                assert sum(different) == 1, pair

    def test_reordered_pairs_move_words_within_one_stretch_only(self):
        # Outside the stretch the sentences are the same; two nouns with their
        # determiners make the longest one ("No X that the" / "The X that no").
        for pair in minimal_pairs(TRAIN_VOCABULARY, 500, seed=0):
            good, bad = words_of(pair.acceptable), words_of(pair.unacceptable)
            moved = [i for i, a in enumerate(good) if a != bad[i]]
            assert moved[-1] - moved[0] <= 3, pair

    def test_same_seed_same_pairs_and_another_seed_others(self):
        first = minimal_pairs(TRAIN_VOCABULARY, 200, seed=3)
        assert first == minimal_pairs(TRAIN_VOCABULARY, 200, seed=3)
        assert first != minimal_pairs(TRAIN_VOCABULARY, 200, seed=4)

    def test_a_longer_list_starts_with_the_shorter_one(self):
        longer = minimal_pairs(DEV_VOCABULARY, 100, seed=0)
        assert longer[:40] == minimal_pairs(DEV_VOCABULARY, 40, seed=0)

    def test_phenomena_take_turns(self):
        pairs = minimal_pairs(DEV_VOCABULARY, 10 * len(PHENOMENA), seed=0)
        assert Counter(p.phenomenon for p in pairs) == dict.fromkeys(PHENOMENA, 10)

    def test_more_than_the_word_lists_hold_is_refused(self):
        with pytest.raises(ValueError, match=r"num_pairs=40000.*fewer examples"):
            minimal_pairs(DEV_VOCABULARY, 40_000, seed=0)

    @pytest.mark.parametrize(
        ("phenomenon", "pattern"),
        [
            # Linguistic facts, one per phenomenon that swaps a word.
            ("subject-verb-agreement", r"^(These|Those|Many|Several) \w+ (is|was|has)"),
            ("subject-verb-agreement", r"^(This|That|Every|Each) \w+ (are|were|have)"),
            ("determiner-noun", r"(this|that) \w+(?<!s)s\.$"),
            ("reflexive-agreement", r"that they .*(himself|herself|myself)"),
            ("auxiliary-form", r"(will|can|should|must) been|(has|have|had) be "),
            ("irregular-forms", r"(has|have|had) (broke|took|chose|saw|wrote) "),
        ],
    )
    def test_a_known_violation_is_only_ever_unacceptable(self, phenomenon, pattern):
        pairs = [
            pair
            for pair in minimal_pairs(TRAIN_VOCABULARY, 2000, seed=0)
            if pair.phenomenon == phenomenon
        ]
        assert any(re.search(pattern, pair.unacceptable) for pair in pairs)
        assert not [p for p in pairs if re.search(pattern, p.acceptable)]


class TestVocabularies:
    def test_splits_share_no_content_word(self):
        assert not TRAIN_VOCABULARY.words() & DEV_VOCABULARY.words()

    def test_words_shared_by_the_splits_are_function_words(self):
        _, train, dev = load_task("acceptability")
        train_words, dev_words = (
            {word for text in texts(split) for word in words_of(text)}
            for split in (train, dev)
        )
        content = TRAIN_VOCABULARY.words() | DEV_VOCABULARY.words()
        assert not train_words & dev_words & content
        # Every other word is one of the templates' own, and a closed class is small.
        assert len((train_words | dev_words) - content) < 60

    @pytest.mark.parametrize("split", VOCABULARIES)
    def test_no_word_stands_in_two_lists(self, split):
        vocabulary = VOCABULARIES[split]
        entries = [
            *(noun.singular for noun in vocabulary.people + vocabulary.things),
            *(verb.base for verb in vocabulary.transitive + vocabulary.intransitive),
            *(verb.base for verb in vocabulary.handling),
            *(verb.base for verb in vocabulary.irregular),
            *vocabulary.adjectives,
        ]
        assert len(entries) == len(set(entries))

    @pytest.mark.parametrize("split", VOCABULARIES)
    def test_forms_that_a_pair_contrasts_differ(self, split):
        vocabulary = VOCABULARIES[split]
        for noun in vocabulary.people + vocabulary.things:
            assert noun.singular != noun.plural
        for verb in vocabulary.irregular:
            assert len(set(verb)) == 3


class TestSplits:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_balanced_unique_and_short(self, seed):
        _, train, dev = load_task("acceptability", seed=seed)
        assert (len(train), len(dev)) == (4000, 600)
        for split in (train, dev):
            assert split.labels.mean() == 0.5  # exact: half ones, half zeros
            assert len(set(texts(split))) == len(split)
            assert max(len(words_of(text)) for text in texts(split)) < 16
            assert set(split.groups) == set(PHENOMENA)

    def test_balanced_within_each_phenomenon(self):
        _, train, _ = load_task("acceptability")
        groups = np.asarray(train.groups)
        for name in PHENOMENA:
            assert train.labels[groups == name].mean() == 0.5

    def test_order_is_random(self):
        _, train, _ = load_task("acceptability")
        # In pair order the labels would alternate and every neighbour would differ.
        assert 0.4 < np.mean(train.labels[1:] != train.labels[:-1]) < 0.6

    def test_label_one_is_the_acceptable_member(self):
        _, _, dev = load_task("acceptability", num_dev=60, seed=5)
        good = {p.acceptable for p in minimal_pairs(DEV_VOCABULARY, 30, seed=5)}
        for text, label in zip(texts(dev), dev.labels, strict=True):
            assert (text in good) == bool(label)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_word_counts_do_not_tell_the_label(self, seed):
        # Chance is 0.5; 600 examples give a standard error of 0.02.
        overall, _ = word_count_accuracy(seed)
        assert overall <= 0.60

    def test_word_counts_tell_the_label_of_no_phenomenon(self):
        # Mean of three seeds: 138 examples each, standard error 0.04 around 0.5.
        per_seed = [word_count_accuracy(seed)[1] for seed in SEEDS]
        for name in PHENOMENA:
            assert np.mean([scores[name] for scores in per_seed]) <= 0.65, name

    @pytest.mark.parametrize("field", ["num_train", "num_dev"])
    @pytest.mark.parametrize("size", [0, -2, 7])
    def test_sizes_that_are_not_whole_pairs_are_refused(self, field, size):
        with pytest.raises(TaskError, match=f"{field}={size}"):
            load_task("acceptability", **{field: size})

    def test_too_large_a_split_is_a_task_error(self):
        with pytest.raises(TaskError, match="num_dev=90000"):
            load_task("acceptability", num_train=2, num_dev=90_000)
