"""Every example on one device, the same for the same seed, and clear refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lola_glue.partitions import PARTITIONINGS, PartitionError, partition_examples


@pytest.fixture
def labels():
    return np.random.default_rng(0).integers(0, 2, size=1000)


def class_shares(labels, parts):
    """Share of class 1 on each device, [num_partitions]."""
    return np.array([labels[part].mean() for part in parts])


class TestPartitionExamples:
    @given(
        num_examples=st.integers(60, 200),
        num_partitions=st.integers(1, 8),
        partitioning=st.sampled_from(PARTITIONINGS),
        seed=st.integers(0, 2**32 - 1),
    )
    @settings(max_examples=30, deadline=None)
    def test_every_example_is_on_exactly_one_device(
        self, num_examples, num_partitions, partitioning, seed
    ):
        labels = np.random.default_rng(seed).integers(0, 3, size=num_examples)
        parts = partition_examples(
            labels, num_partitions, partitioning=partitioning, alpha=5.0, seed=seed
        )
        assert len(parts) == num_partitions
        assert sorted(np.concatenate(parts)) == list(range(num_examples))

    @pytest.mark.parametrize("partitioning", PARTITIONINGS)
    def test_same_seed_same_parts_and_another_seed_others(self, labels, partitioning):
        first, again, other = (
            partition_examples(labels, 6, partitioning=partitioning, seed=seed)
            for seed in (7, 7, 8)
        )
        for one, two in zip(first, again, strict=True):
            np.testing.assert_array_equal(one, two)
        assert any(a.tolist() != b.tolist() for a, b in zip(first, other, strict=True))

    def test_iid_parts_are_equal_and_shuffled(self, labels):
        # Sorted labels: contiguous parts would hold one class each.
        ordered = np.sort(labels)
        parts = partition_examples(ordered, 6, seed=0)
        assert {len(part) for part in parts} <= {166, 167}  # 1000 / 6
        # Standard error of a share over 166 examples: 0.04.
        np.testing.assert_allclose(class_shares(ordered, parts), 0.5, atol=0.2)

    def test_smaller_alpha_skews_the_classes_more(self, labels):
        spreads = [
            np.mean(
                [
                    class_shares(
                        labels,
                        partition_examples(
                            labels, 5, partitioning="dirichlet", alpha=alpha, seed=seed
                        ),
                    ).std()
                    for seed in range(5)
                ]
            )
            for alpha in (0.3, 3.0, 300.0)
        ]
        assert spreads[0] > spreads[1] > spreads[2]

    def test_iid_takes_regression_labels(self):
        parts = partition_examples(np.linspace(0, 5, 20), 4, seed=0)
        assert [len(part) for part in parts] == [5, 5, 5, 5]

    def test_dirichlet_draws_other_sizes_for_another_seed(self, labels):
        sizes = [
            [
                len(part)
                for part in partition_examples(
                    labels, 6, partitioning="dirichlet", seed=seed
                )
            ]
            for seed in (0, 1)
        ]
        assert sizes[0] != sizes[1]

    def test_dirichlet_meets_min_examples(self, labels):
        parts = partition_examples(
            labels, 8, partitioning="dirichlet", alpha=1.0, min_examples=20, seed=0
        )
        assert min(len(part) for part in parts) >= 20

    @pytest.mark.parametrize("partitioning", PARTITIONINGS)
    def test_no_warning_reaches_the_user(self, labels, partitioning, recwarn):
        partition_examples(
            labels, 8, partitioning=partitioning, min_examples=40, alpha=2.0, seed=0
        )
        assert not recwarn.list


class TestAnotherSeed:
    def test_it_may_do_where_one_finds_no_split(self):
        labels = np.random.default_rng(0).integers(0, 2, 60)

        def split(seed):
            return partition_examples(
                labels,
                8,
                partitioning="dirichlet",
                alpha=0.5,
                min_examples=3,
                seed=seed,
            )

        with pytest.raises(
            PartitionError, match=r"by seed=0\. Try another seed, "
        ) as no:
            split(0)
        assert "\n" not in str(no.value)
        assert min(map(len, split(3))) >= 3


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"partitioning": "sharded"}, r"partitioning='sharded'.*iid, dirichlet"),
            ({"num_partitions": 0}, "num_partitions=0"),
            ({"min_examples": 0}, "min_examples=0"),
            ({"num_partitions": 300}, "300 devices are 3 each, min_examples=4"),
            ({"partitioning": "dirichlet", "alpha": 0.0}, "alpha=0.0"),
            ({"partitioning": "dirichlet", "alpha": float("nan")}, "alpha=nan"),
            ({"partitioning": "dirichlet", "alpha": float("inf")}, "alpha=inf"),
            (
                {"partitioning": "dirichlet", "alpha": 0.01, "num_partitions": 50},
                r"alpha=0.01 .*50 devices .*min_examples=4.*raise alpha",
            ),
            ({"labels": np.zeros((2, 2))}, r"labels is \[2, 2\]"),
            (
                {"partitioning": "dirichlet", "labels": np.linspace(0, 5, 100)},
                "regression.*partitioning='iid'",
            ),
        ],
    )
    def test_one_clear_line(self, labels, arguments, message):
        call = {
            "labels": labels,
            "num_partitions": 6,
            "min_examples": 4,
            "seed": 0,
            **arguments,
        }
        with pytest.raises(PartitionError, match=message) as caught:
            partition_examples(call.pop("labels"), call.pop("num_partitions"), **call)
        assert "\n" not in str(caught.value)
