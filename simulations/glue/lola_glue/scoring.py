"""The metrics of GLUE's tasks."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from lola_flwr.errors import UserError
from lola_glue.readers import Labels
from lola_glue.tasks import Task

# SciPy's statistics and scikit-learn (with pandas) take a second to import, which tasks
# that are measured by accuracy alone need not wait for.


def _accuracy(labels: Labels, predicted: Labels) -> float:
    return float(np.mean(labels == predicted))


def _f1(labels: Labels, predicted: Labels) -> float:
    """F1 of class 1; 0 where it is neither predicted nor there."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, zero_division=0.0))


def _matthews(labels: Labels, predicted: Labels) -> float:
    """Matthews correlation; sklearn's is 0 for constant predictions."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def _correlation(
    statistic: Callable[..., tuple[float, float]], first: Labels, second: Labels
) -> float:
    """Correlate; 0 where a side is constant, which predicts nothing of the other."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(statistic(first, second)[0])


def _pearson(labels: Labels, predicted: Labels) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, labels, predicted)


def _spearman(labels: Labels, predicted: Labels) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, labels, predicted)


_METRICS: dict[str, Callable[[Labels, Labels], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}


def _predict(task: Task, logits: npt.ArrayLike, num_examples: int) -> Labels:
    """Turn logits into classes, or into scores; [M]."""
    values = np.asarray(logits, dtype=np.float64)
    if values.shape != (num_examples, task.num_labels):
        raise ValueError(
            f"Shape mismatch: logits is {list(values.shape)} but task={task.name!r} "
            f"and the labels need [{num_examples}, {task.num_labels}]."
        )
    if not np.isfinite(values).all():
        raise UserError(
            f"Not finite: logits of {np.count_nonzero(~np.isfinite(values))} entries "
            "are nan or inf. Lower the learning rate."
        )
    if task.is_regression:
        return values[:, 0]
    return np.asarray(values.argmax(axis=1), dtype=np.int64)


def score(task: Task, logits: npt.ArrayLike, labels: npt.ArrayLike) -> dict[str, float]:
    """Compute the task's metrics.

    Parameters
    ----------
    task
        The task.
    logits
        The model's output, shape [M, num_labels]; [M, 1] for a regression.
    labels
        The true labels, shape [M].

    Returns
    -------
    Metric by name, the primary one first. None is ever nan: a Matthews, Pearson or
    Spearman correlation is 0 where predictions or labels are constant. It is
    undefined there; 0 is its value for a prediction that tells nothing of the label,
    and a run goes on.

    Raises
    ------
    ValueError
        If there are no examples, the shapes do not match or a logit is not finite.
    """
    truth = np.asarray(labels)
    if truth.size == 0:
        raise ValueError("No examples: labels is empty. Give at least one example.")
    predicted = _predict(task, logits, len(truth))
    return {name: _METRICS[name](truth, predicted) for name in task.metrics}
