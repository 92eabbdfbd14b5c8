from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from lola_flwr.d2ft.branches import contribute, enter, leave
from lola_flwr.d2ft.contexts import contexts_from_mask
from lola_flwr.d2ft.execution import replaced_layers, run_layer, scheduled
from lola_flwr.d2ft.find import find_subnetworks
from lola_flwr.d2ft.maps import adapters_of, base_of
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.scores import score_subnetworks
from lola_flwr.d2ft.subnetworks import Branch, LayerNotUnderstood, parameter_slices
from lola_flwr.d2ft.training import scheduled_gradient, split_batch
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import BatchWeight, block_gradient, num_examples_of
from lola_flwr.model.blocks import partition_parameters
from tests.conftest import SMALL
from tests.marks import rest_slow
from tests.model.test_backprop import saved_bytes

SKIP, FORWARD, FULL = Operation.SKIP, Operation.FORWARD, Operation.FULL
SIZES = {**SMALL, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def text_batch():
    generator = torch.Generator().manual_seed(1)
    attention_mask = torch.ones(6, 10, dtype=torch.long)
    attention_mask[4:, 7:] = 0
    return {
        "input_ids": torch.randint(5, 60, (6, 10), generator=generator),
        "attention_mask": attention_mask,
        "labels": torch.tensor([0, 1, 1, 0, 1, 0]),
    }


def image_batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(6, 3, 16, 16, generator=generator),
        "labels": torch.tensor([0, 1, 1, 0, 1, 0]),
    }


@dataclass
class Case:
    model: torch.nn.Module
    batch: dict[str, torch.Tensor]
    batch_weight: BatchWeight = num_examples_of

    def __post_init__(self):
        trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        self.partition = partition_parameters(trained)
        self.subnetworks = find_subnetworks(self.model, self.partition)
        self.trainable = self.partition.trainable

    def table(self, operation):
        return [[operation] * 4 for _ in range(3)]

    def run(self, operations, num_parts=1):
        operations = np.array(operations).reshape(12, 1).repeat(num_parts, axis=1)
        parts = split_batch(self.batch, num_parts)
        return scheduled_gradient(
            self.model,
            self.subnetworks,
            self.trainable,
            parts,
            operations,
            batch_weight=self.batch_weight,
        )


WORDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama():
    """Make one whose query heads share keys and values, two by two."""
    sizes = {**SIZES, **WORDS, "num_attention_heads": 8, "num_key_value_heads": 4}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
    )


def modernbert():
    """Make one with local and global layers, the first of which lacks a norm."""
    config = transformers.ModernBertConfig(
        **SIZES | WORDS,
        cls_token_id=3,
        sep_token_id=4,
        local_attention=4,
        global_attn_every_n_layers=2,
    )
    return transformers.ModernBertForSequenceClassification(config)


def gpt2_with_adapters():
    """Make one with one map for queries, keys and values, all maps transposed."""
    peft = pytest.importorskip("peft")
    config = transformers.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, n_positions=40, **WORDS
    )
    lora = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        target_modules=["c_attn", "c_proj", "c_fc"],
        init_lora_weights=False,
        fan_in_fan_out=True,
    )
    model = transformers.GPT2ForSequenceClassification(config)
    return peft.get_peft_model(model, lora)


def num_learned(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


def language_batch():
    batch = text_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


def make(family):
    torch.manual_seed(0)
    if family == "llama":
        return Case(llama().eval(), language_batch(), num_learned)
    if family == "modernbert":
        return Case(modernbert().eval(), text_batch())
    if family == "gpt2-lora":
        return Case(gpt2_with_adapters().eval(), text_batch())
    if family == "vit":
        config = transformers.ViTConfig(
            **{k: v for k, v in SIZES.items() if k != "vocab_size"},
            image_size=16,
            patch_size=4,
        )
        return Case(
            transformers.ViTForImageClassification(config).eval(), image_batch()
        )
    if family == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=60, dim=32, hidden_dim=64, n_heads=4, n_layers=3
        )
        model = transformers.DistilBertForSequenceClassification(config)
        return Case(model.eval(), text_batch())
    config = transformers.RobertaConfig(**SIZES, max_position_embeddings=40)
    model = transformers.RobertaForSequenceClassification(config).eval()
    if family == "roberta-lora":
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(
            task_type="SEQ_CLS",
            r=2,
            target_modules=["query", "value", "dense"],
            # Adapters that do nothing would have no gradient of their first factor.
            init_lora_weights=False,
        )
        model = peft.get_peft_model(model, lora).eval()
    return Case(model, text_batch())


FAMILIES = ["roberta", "roberta-lora", "distilbert", "vit"]
FAMILIES += ["llama", "modernbert", "gpt2-lora"]


@pytest.fixture(params=FAMILIES)
def case(request):
    return make(request.param)


def exact_gradient(case):
    return block_gradient(
        case.model,
        case.partition.merged(),
        0,
        case.batch,
        batch_weight=case.batch_weight,
    )


def test_subnetworks_in_pieces_make_the_layer(case):
    torch.manual_seed(2)
    x = torch.randn(3, 7, 32)
    tokens = torch.ones(3, 7, dtype=torch.bool)
    tokens[1, 5:] = False
    told = contexts_from_mask(case.model, case.subnetworks, tokens, num_layers=3)
    for parts, context in zip(case.subnetworks.layers, told, strict=True):
        positions = {"position_embeddings": context.positions}
        own = parts.layer(
            x,
            attention_mask=context.attention_mask,
            **(positions if context.positions else {}),
        )
        for row in ([FULL] * 4, [FULL, FORWARD, FULL, FULL], [FORWARD, FULL] * 2):
            torch.testing.assert_close(run_layer(parts, row, x, context), own)


def test_gradients_of_pieces_are_those_of_the_layer(case):
    operations = case.table(FULL)
    operations[2] = [FULL, FORWARD, FULL, FORWARD]
    result, expected = case.run(operations), exact_gradient(case)
    # Behind the last layer's feed-forward part nothing is left out.
    last = case.subnetworks.layers[2]
    names = {id(p): n for n, p in case.model.named_parameters()}
    down = [n for p in last.down.parameters() if (n := names[id(p)]) in case.trainable]
    assert down
    for group in (0, 2):
        for part in case.subnetworks.slices[8 + group]:
            if part.name in down:
                found = part.of(result.gradients[part.name])
                assert found.any()
                torch.testing.assert_close(
                    found, part.of(expected.gradients[part.name])
                )


def test_micro_batches_average_to_the_batch(case):
    expected = exact_gradient(case)
    result = case.run(case.table(FULL), num_parts=4)  # of 2, 2, 1 and 1 examples
    assert result.num_examples == expected.num_examples
    assert result.loss == pytest.approx(expected.loss)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(
            result.gradients[name], gradient, rtol=1e-3, atol=1e-6
        )


def test_a_skipped_subnetwork_does_as_its_zeroed_weights_would(case):
    operations = case.table(FULL)
    operations[1][2] = SKIP
    skipped = case.run(operations)
    state = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    gone = 1 * 4 + 2
    parts = case.subnetworks.slices[gone]
    layer = case.subnetworks.layers[1]
    names = {id(p): n for n, p in case.model.named_parameters()}
    out = {names[id(base_of(m).weight)] for m in (layer.project, layer.down)}
    for linear in (layer.project, layer.down):
        out |= {names[id(a.weight)] for a, *_ in adapters_of(linear)}
    back = [s for s in parts if s.name in out]  # what leads out of it
    assert back
    with torch.no_grad():
        named = dict(case.model.named_parameters())
        for part in back:
            part.of(named[part.name]).zero_()
    zeroed = case.run(case.table(FULL))
    with torch.no_grad():
        for name, parameter in case.model.named_parameters():
            parameter.copy_(state[name])
    assert skipped.loss == pytest.approx(zeroed.loss, rel=1e-5)
    # And it has no gradient of its own, while its neighbours have theirs.
    own = parameter_slices(case.subnetworks, skipped.gradients)
    assert all(not part.any() for part in own[gone])
    assert any(part.any() for part in own[gone + 1])


def test_forward_only_keeps_the_loss_and_has_no_gradient(case):
    operations = case.table(FULL)
    operations[2][0] = operations[2][1] = FORWARD
    result = case.run(operations)
    assert result.loss == pytest.approx(exact_gradient(case).loss, rel=1e-5)
    own = parameter_slices(case.subnetworks, result.gradients)
    for forward_only, full in ((8, 10), (9, 11)):
        assert all(not part.any() for part in own[forward_only])
        assert any(part.any() for part in own[full])


def flops(case, operations):
    """Count all but fused attention, which PyTorch counts on CPUs since 2.15."""
    with FlopCounterMode(display=False) as counter:
        case.run(operations)
    counts = counter.get_flop_counts()["Global"]
    return sum(n for packet, n in counts.items() if "attention" not in str(packet))


def test_what_is_skipped_is_not_computed(case):
    full, forward, skip = (
        flops(case, case.table(operation)) for operation in (FULL, FORWARD, SKIP)
    )
    # What is left when all layers are skipped is the head, and a ViT's patches.
    passes = (full - skip) / (forward - skip)
    # Weights and activations back: 3 forward passes, less the gradient that nobody
    # wants below the first layer. Of adapters: 2, and their own products.
    adapters = hasattr(case.model, "peft_config")
    low, high = (1.6, 2.7) if adapters else (2.6, 3.0)
    assert low < passes <= high
    halves = flops(case, [[FULL, FULL, SKIP, SKIP]] * 3)
    # One factor of an adapter is common to all groups of a layer.
    assert halves - skip == pytest.approx((full - skip) / 2, rel=0.08)


def kept(case, operations):
    return saved_bytes(case.model, lambda: case.run(operations))


def test_forward_only_stores_no_activations(case):
    full, forward = (kept(case, case.table(op)) for op in (FULL, FORWARD))
    nothing = kept(case, case.table(SKIP))
    # What the head keeps: the layers' own share is nothing.
    assert forward <= nothing
    upper = kept(case, [[FORWARD] * 4, [FORWARD] * 4, [FULL] * 4])
    assert nothing < upper < 0.55 * full
    half = kept(case, [[FULL, FULL, FORWARD, FORWARD]] * 3)
    assert half < 0.85 * full


def test_flags_and_forwards_are_restored(case):
    flags = [p.requires_grad for p in case.model.parameters()]
    with pytest.raises(UserError, match=r"operations has 2 layers"):
        scheduled(case.subnetworks, case.table(FULL)[:2])
    case.run(case.table(SKIP))
    with pytest.raises(RuntimeError):
        scheduled_gradient(
            case.model,
            case.subnetworks,
            case.trainable,
            [case.batch],
            np.zeros((12, 1), np.int64),
            loss_function=lambda *_: (_ for _ in ()).throw(RuntimeError("boom")),
        )
    assert [p.requires_grad for p in case.model.parameters()] == flags
    for parts in case.subnetworks.layers:
        assert "forward" not in vars(parts.layer)


def test_scores_are_sums_over_slices(case):
    parts = split_batch(case.batch, 2)
    scores = score_subnetworks(case.model, case.subnetworks, case.trainable, parts)
    assert scores.fisher.shape == scores.gradient.shape == (12, 2)
    trained = set(case.trainable)
    parameters = dict(case.model.named_parameters())
    gradients = scheduled_gradient(
        case.model,
        case.subnetworks,
        case.trainable,
        parts[:1],
        np.full((12, 1), FULL),
    ).gradients
    for number, slices in enumerate(case.subnetworks.slices):
        own = [s for s in slices if s.name in trained]
        fisher = sum(float(s.of(gradients[s.name]).square().sum()) for s in own)
        size = sum(s.of(parameters[s.name]).abs().sum().item() for s in own)
        assert scores.fisher[number, 0] == pytest.approx(fisher, rel=1e-3)
        assert scores.magnitude[number] == pytest.approx(size, rel=1e-5)


def test_slices_cover_each_layer_once(case):
    covered = {}
    for slices in case.subnetworks.slices:
        for part in slices:
            covered.setdefault(part.name, []).append((part.start, part.length))
    parameters = dict(case.model.named_parameters())
    for name, bounds in covered.items():
        dim = next(
            s.dim for group in case.subnetworks.slices for s in group if s.name == name
        )
        ends = [0, *np.cumsum([length for _, length in sorted(bounds)])]
        assert [start for start, _ in sorted(bounds)] == ends[:-1]
        assert ends[-1] == parameters[name].shape[dim]


# Their layers' parts are called as BERT's, and there is more to them.
LOOK_LIKE_BERT = {
    "Nystromformer": {},
    "RoFormer": {},
    "ConvBert": {"embedding_size": 32},
}


@pytest.mark.parametrize("family", LOOK_LIKE_BERT)
def test_layers_that_compute_something_else_are_refused(family):
    torch.manual_seed(0)
    sizes = {**SIZES, **LOOK_LIKE_BERT[family]}
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    partition = partition_parameters(n for n, _ in model.named_parameters())
    with pytest.raises(
        LayerNotUnderstood, match=rf"{family}Layer\) (computes|runs) .*as those of BERT"
    ):
        find_subnetworks(model, partition)


def test_models_that_are_not_understood():
    sizes = {**SIZES, **WORDS}
    for family, what in {
        "Gemma2": "post_attention_layernorm and pre_feedforward_layernorm",
        "GPTNeoX": r"something else than its sub-networks together \(relative",
        "OPT": "in training only: by its dropout",
    }.items():
        config = getattr(transformers, f"{family}Config")(**sizes)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        partition = partition_parameters(n for n, _ in model.named_parameters())
        with pytest.raises(LayerNotUnderstood, match=what):
            find_subnetworks(model, partition)
    roberta = make("roberta")
    with pytest.raises(
        UserError, match=r"num_groups=5 must be a whole number from 1 to 4, the heads"
    ):
        find_subnetworks(roberta.model, roberta.partition, num_groups=5)
    decoder = make("llama")
    with pytest.raises(UserError, match=r"num_groups=8 .* 4, the key/value heads of"):
        find_subnetworks(decoder.model, decoder.partition, num_groups=8)


# What has a layer of attention and a feed-forward network, beside the families above.
OTHERS = {
    "Qwen2ForCausalLM": {"num_key_value_heads": 2},
    "Qwen3ForCausalLM": {"num_key_value_heads": 2, "head_dim": 8},
    "MistralForCausalLM": {"num_key_value_heads": 2, "sliding_window": 3},
    "Phi3ForCausalLM": {"num_key_value_heads": 2},
    "LlamaForSequenceClassification": {"num_key_value_heads": 2},
    "GPT2LMHeadModel": {},
    "ModernBertForMaskedLM": {"local_attention": 4, "global_attn_every_n_layers": 2},
    "OPTForCausalLM": {"dropout": 0.0},
    "BertForSequenceClassification": {"attn_implementation": "eager"},
}


@pytest.mark.parametrize("name", rest_slow(OTHERS, 2))
def test_layers_in_pieces_have_the_gradient_of_the_whole(name):
    """In float64, and each group by itself."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    batch = text_batch() if "Sequence" in name else language_batch()
    model = kind(kind.config_class(**SIZES | WORDS | OTHERS[name])).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    assert_same_in_pieces(Case(model, batch))


def test_tokens_that_see_nothing_have_the_gradient_of_the_whole():
    """Of a padded row's first tokens, where attention is masked by large numbers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | WORDS, attn_implementation="eager")
    batch = language_batch()
    left = {name: tensor.flip(1) for name, tensor in batch.items()}
    assert (left["attention_mask"][-1, :3] == 0).all()
    case = Case(transformers.LlamaForCausalLM(config).eval(), left)
    assert_same_in_pieces(case, rtol=1e-6)


def assert_same_in_pieces(case, *, rtol=1e-12):
    expected = exact_gradient(case)
    groups = case.subnetworks.num_groups

    def in_pieces(parts, x, context):
        for branch in Branch:
            y = enter(parts, branch, [FULL] * groups, x)
            total = sum(
                contribute(parts, branch, alone(group, groups), y, context)
                for group in range(groups)
            )
            x = leave(parts, branch, [FULL] * groups, x, total)
        return x

    with replaced_layers({p: partial(in_pieces, p) for p in case.subnetworks.layers}):
        found = exact_gradient(case)
    assert found.loss == pytest.approx(expected.loss, rel=rtol)
    for parameter, gradient in expected.gradients.items():
        assert gradient.any()
        torch.testing.assert_close(
            found.gradients[parameter], gradient, rtol=1e3 * rtol, atol=rtol
        )


def alone(group, groups):
    return [FULL if other == group else SKIP for other in range(groups)]
