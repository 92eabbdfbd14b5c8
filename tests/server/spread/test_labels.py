"""Who sends gradients of no label is found; whose loss is another is never accused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from lola_flwr.server.spread.exchange import LieFound
from lola_flwr.server.spread.labels import LabelledLoss, nearest_labels
from lola_flwr.server.spread.losses import LossLimits, OwnLosses
from lola_flwr.server.spread.verdicts import Verdict, refuse_lies

TOKENS, WIDTH = 3, 4


class Head:
    """A head of the first token, and micro-batches for it."""

    def __init__(self, seed, num_labels, scale=1.0):
        self.dice = torch.Generator().manual_seed(seed)
        self.num_labels = num_labels
        self.parts = [self.draw(WIDTH, WIDTH), scale * self.draw(num_labels, WIDTH)]
        self.parts.append(torch.zeros(num_labels))

    def draw(self, *shape):
        return torch.randn(shape, generator=self.dice)

    def rand(self):
        return float(torch.rand((), generator=self.dice))

    def hidden(self, count):
        return self.draw(count, TOKENS, WIDTH)

    def loss(self, hidden, labels, how):
        hidden = hidden.clone().requires_grad_()
        first, last, bias = parts = [p.clone().requires_grad_() for p in self.parts]
        logits = torch.tanh(hidden[:, 0] @ first.T) @ last.T + bias
        loss = how(logits, labels)
        slopes, *head = torch.autograd.grad(loss, [hidden, *parts])
        return LabelledLoss(loss.item(), slopes, head)

    def owner(self, batches, how=cross_entropy):
        """What an owner sends of some micro-batches: hidden states and labels."""
        found = [self.loss(hidden, labels, how) for hidden, labels in batches]
        weights = [len(labels) for _, labels in batches]
        head = [
            sum(w * one.head[n] for w, one in zip(weights, found, strict=True))
            / sum(weights)
            for n in range(3)
        ]
        losses = [one.loss for one in found]
        return OwnLosses(weights, losses, [one.slopes for one in found], head)

    def verdict(self, own, batches):
        nearest = [
            nearest_labels(
                lambda labels, hidden=hidden: self.loss(hidden, labels, cross_entropy),
                self.num_labels,
                slopes,
            )
            for (hidden, _), slopes in zip(batches, own.slopes, strict=True)
        ]
        return Verdict.of(own, nearest, self.num_labels)


@given(
    seed=st.integers(0, 2**31),
    num_labels=st.integers(2, 4),
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    unlabelled=st.booleans(),
)
def test_labels_are_told_from_their_gradients(
    seed, num_labels, counts, scale, unlabelled
):
    head = Head(seed, num_labels, scale)
    batches = []
    for count in counts:
        labels = torch.randint(num_labels, (count,), generator=head.dice)
        labels[: count // 2 * unlabelled] = -100
        batches.append((head.hidden(count), labels))
    own = head.owner(batches)
    for (hidden, labels), slopes in zip(batches, own.slopes, strict=True):
        found = nearest_labels(
            lambda each, hidden=hidden: head.loss(hidden, each, cross_entropy),
            num_labels,
            slopes,
        )
        assert found.far < 1e-3
        assert found.apart < 1e-3
        # What a model is sure of may have no gradient.
        flat = (slopes == 0).flatten(1).all(1)
        assert torch.equal(found.labels[~flat], labels[~flat])
    verdict = head.verdict(own, batches)
    assert verdict.is_near
    assert verdict.head_apart < 1e-3
    assert verdict.lie == ""
    each = [set(labels.tolist()) - {-100} for _, labels in batches]
    full = any(len(some) == num_labels for some in each)
    assert verdict.has_all_labels == full or scale == 10.0
    assert verdict.shows == (True if verdict.has_all_labels else None)


def weighted(weights):
    return lambda logits, labels: cross_entropy(logits, labels, torch.tensor(weights))


def smoothed(part):
    return lambda logits, labels: cross_entropy(logits, labels, label_smoothing=part)


def focal(logits, labels):
    each = cross_entropy(logits, labels, reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


def rounded(own, head, part):
    """What a device of less precision sends."""
    return OwnLosses(
        own.weights,
        own.losses,
        [slope * (1 + part * head.draw(*slope.shape)) for slope in own.slopes],
        [p * (1 + part * head.draw(*p.shape)) for p in own.head],
    )


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    num_labels=st.integers(2, 3),
    # Classes of which some devices have one alone, and a model that is sure or not.
    skew=st.sampled_from([0.0, 0.5, 0.9]),
    scale=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    loss=st.sampled_from(["plain", "weighted", "smoothed", "focal"]),
    amount=st.floats(0.0, 0.5),
    noise=st.sampled_from([0.0, 0.01]),
)
def test_whatever_the_loss_no_honest_owner_is_accused(
    seed, num_labels, skew, scale, loss, amount, noise
):
    """Though at first all devices but one may be near plain cross-entropy."""
    head = Head(seed, num_labels, scale)
    how = {
        "plain": cross_entropy,
        "weighted": weighted([1.0, *[1 + amount] * (num_labels - 1)]),
        "smoothed": smoothed(amount),
        "focal": focal,
    }[loss]
    limits = LossLimits()
    for _ in range(5):
        received, verdicts = {}, {}
        for device in range(6):
            count = 8
            labels = torch.randint(num_labels, (count,), generator=head.dice)
            if head.rand() < skew:
                labels[:] = device % num_labels
            if head.rand() < 0.1:
                labels[0] = -100
            batches = [(head.hidden(count), labels)]
            own = rounded(head.owner(batches, how), head, noise)
            received[str(device)] = own
            verdicts[str(device)] = head.verdict(own, batches)
        shown = {d: v.shows for d, v in verdicts.items() if v.shows is not None}
        limits = limits.after(received, shown)
        refuse_lies(verdicts, limits.shown)
    if loss == "plain" and not noise:
        assert all(limits.shown.values())


def turned(times):
    def lie(own, head):
        return OwnLosses(
            own.weights,
            own.losses,
            [-times * slope for slope in own.slopes],
            [-times * part for part in own.head],
        )

    return lie


def of_noise(own, head):
    noise = [head.draw(*slope.shape) for slope in own.slopes]
    slopes = [n * (s.norm() / n.norm()) for n, s in zip(noise, own.slopes, strict=True)]
    return OwnLosses(own.weights, own.losses, slopes, own.head)


def with_another_head(own, head):
    return OwnLosses(
        own.weights, own.losses, own.slopes, [-9.9 * part for part in own.head]
    )


def liars(lie, count, *, num_labels=2, seed=0):
    """Have so many of six lie; return who is accused, and the error."""
    head = Head(seed, num_labels)
    received, verdicts = {}, {}
    for device in map(str, range(6)):
        labels = torch.arange(16) % num_labels
        batches = [(head.hidden(16), labels)]
        own = head.owner(batches)
        if int(device) < count:
            own = lie(own, head)
        received[device], verdicts[device] = own, head.verdict(own, batches)
    shown = {d: v.shows for d, v in verdicts.items() if v.shows is not None}
    limits = LossLimits().after(received, shown)
    try:
        refuse_lies(verdicts, limits.shown)
    except LieFound as error:
        return set(error.reasons), str(error)
    return set(), ""


LIES = {
    "turned": (turned(1.0), "gradients of losses"),
    "turned, 2.9 times": (turned(2.9), "gradients of losses"),
    "three times": (turned(-3.0), "gradients of losses"),
    "noise": (of_noise, "gradients of losses"),
    "another head": (with_another_head, "gradient of the head"),
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("num_labels", [2, 3])
def test_who_sends_what_no_labels_make_is_found(name, num_labels):
    lie, what = LIES[name]
    for seed in range(5):
        for count in (1, 2):
            found, text = liars(lie, count, num_labels=num_labels, seed=seed)
            assert found == {str(n) for n in range(count)}
            assert f"device 0: its {what}" in text
            assert "it is excluded from this run" in text
            assert "\n" not in text


def test_four_of_six_accuse_nobody():
    assert liars(turned(2.9), 4) == (set(), "")
    assert liars(turned(2.9), 3) == (set(), "")


def test_a_false_label_is_no_lie():
    head = Head(0, 2)
    labels = torch.arange(16) % 2
    hidden = head.hidden(16)
    own = head.owner([(hidden, 1 - labels)])
    assert head.verdict(own, [(hidden, labels)]).is_near


def test_fewer_than_three_devices_judge_nobody():
    verdict = Verdict(9.0, 9.0, is_near=False, has_all_labels=True)
    for count in (0, 1, 2):
        refuse_lies({"a": verdict}, {str(n): True for n in range(count)})
    with pytest.raises(LieFound, match="device a: its gradients of losses: 9 of"):
        refuse_lies({"a": verdict}, dict.fromkeys("bcd", True))


def test_a_head_to_which_all_labels_are_alike_says_nothing():
    """As one whose last layer begins with zeros."""
    head = Head(0, 2, scale=0.0)
    hidden, labels = head.hidden(4), torch.arange(4) % 2
    own = head.owner([(hidden, labels)])
    found = nearest_labels(
        lambda each: head.loss(hidden, each, cross_entropy), 2, own.slopes[0]
    )
    assert found is None


def test_no_gradient_at_all_is_none_of_labels():
    head = Head(0, 2)
    hidden = head.hidden(4)
    found = nearest_labels(
        lambda each: head.loss(hidden, each, cross_entropy),
        2,
        torch.zeros(4, TOKENS, WIDTH),
    )
    assert found.labels.tolist() == [-100] * 4
    assert found.implied.loss == 0.0
