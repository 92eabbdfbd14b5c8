#!/usr/bin/env bash
# transformers 5.24.0: use_cache decides whether packed sequences see each other.
# A good engineer expects use_cache to change speed and memory, not one forward pass's result.
# Where positions restart at 0 in a row and there is no attention mask, Llama keeps the two
# sequences apart, but only if it makes no cache. The default makes one, in training too, and
# then the second sequence sees the first, without a word. Gradient checkpointing turns the cache
# off, so it changes the loss.
# It matters where short examples are packed into one row to spare a slow device padding, and
# where only devices of little memory checkpoint: they then train on another loss.
# Seen: the second sequence's logits are 0.109 off from its own alone by default, and 0 off with
# use_cache=False; the training loss is 3.6604 by default, and 3.6643 with use_cache=False and with
# checkpointing.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cat > "$dir/try.py" <<'P'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2,
    )
)
first, second = torch.randint(3, 40, (2, 1, 5))
row = torch.cat([first, second], dim=1)
positions = torch.arange(5).repeat(2)[None]


def off(**options):
    model.eval()
    with torch.no_grad():
        alone = model(input_ids=second).logits
        packed = model(input_ids=row, position_ids=positions, **options).logits[:, 5:]
    return (packed - alone).abs().max().item()


def loss(**options):
    model.train()
    return model(input_ids=row, position_ids=positions, labels=row, **options).loss.item()


by_default, without = off(), off(use_cache=False)
print(f"second sequence's logits off by {by_default:.3g}, with use_cache=False {without:.3g}")
plain, uncached = loss(), loss(use_cache=False)
model.gradient_checkpointing_enable()
checkpointed = loss()
print(f"loss {plain:.4f}, use_cache=False {uncached:.4f}, checkpointing {checkpointed:.4f}")
assert by_default > 1e-2 and without < 1e-5
assert abs(plain - uncached) > 1e-3 and abs(uncached - checkpointed) < 1e-5
P
"$dir/venv/bin/python" "$dir/try.py" 2> /dev/null
