"""GLUE's metrics."""

import numpy as np
import pytest

from lola_glue.scoring import score
from lola_glue.tasks import TASKS


def one_hot(classes: list[int], num_labels: int = 2) -> np.ndarray:
    return np.eye(num_labels)[classes]


class TestScore:
    def test_accuracy_and_f1_by_hand(self):
        # Two true positives, one false positive, one false negative:
        # accuracy 2/4, F1 = 2*2 / (2*2 + 1 + 1).
        result = score(TASKS["mrpc"], one_hot([1, 1, 1, 0]), [1, 1, 0, 1])
        assert list(result) == ["accuracy", "f1"]
        assert result == pytest.approx({"accuracy": 0.5, "f1": 2 / 3})

    def test_matthews_by_hand(self):
        # tp=2 tn=1 fp=1 fn=0: (2*1 - 1*0) / sqrt(3*2*2*1).
        result = score(TASKS["cola"], one_hot([1, 1, 1, 0]), [1, 1, 0, 0])
        assert result == pytest.approx({"matthews_correlation": 2 / np.sqrt(12)})

    def test_three_classes(self):
        result = score(TASKS["mnli"], one_hot([0, 1, 2, 2], 3), [0, 1, 2, 0])
        assert result == {"accuracy": 0.75}

    def test_correlations_by_hand(self):
        # Ranks agree fully; Pearson of (1,2,3) and (1,4,9):
        # 8 / sqrt(2 * 98/3).
        logits, labels = [[1.0], [4.0], [9.0]], [1.0, 2.0, 3.0]
        assert score(TASKS["sts-b"], logits, labels) == pytest.approx(
            {"pearson": 8 / np.sqrt(2 * 98 / 3), "spearman": 1.0}
        )

    @pytest.mark.parametrize("name", TASKS)
    def test_constant_predictions_give_finite_python_floats(self, name):
        task = TASKS[name]
        logits = np.zeros((4, task.num_labels), dtype=np.float32)
        result = score(task, logits, np.array([0, 1, 0, 1]))
        assert tuple(result) == task.metrics
        assert all(type(value) is float for value in result.values())
        for metric in ("matthews_correlation", "pearson", "spearman", "f1"):
            assert result.get(metric, 0.0) == 0.0

    def test_f1_without_any_positive_is_zero(self):
        assert score(TASKS["mrpc"], one_hot([0, 0]), [0, 0])["f1"] == 0.0

    def test_constant_labels_give_no_nan(self):
        assert score(TASKS["sts-b"], [[0.0], [1.0]], [3.0, 3.0])["pearson"] == 0.0

    @pytest.mark.parametrize(
        ("logits", "labels", "message"),
        [
            (np.zeros((3, 1)), [0, 1, 0], r"\[3, 1\] .*\[3, 2\]"),
            (np.zeros((2, 2)), [0, 1, 0], r"\[2, 2\] .*\[3, 2\]"),
            (np.full((1, 2), np.nan), [0], "Not finite"),
            (np.zeros((0, 2)), [], "No examples"),
        ],
    )
    def test_unusable_logits_are_refused(self, logits, labels, message):
        with pytest.raises(ValueError, match=message):
            score(TASKS["cola"], logits, labels)
