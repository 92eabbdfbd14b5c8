#!/usr/bin/env bash
# transformers 5.23.0: NLLB-MoE trains otherwise once it was evaluated.
# A good engineer expects a forward pass under eval() to leave no state that training uses. The
# router's expert_capacity, unset in a new configuration, is set for good by the first forward
# pass under eval(), to the number of that batch's tokens, and later training drops tokens by it.
# It matters where training and evaluation take turns, and where activations below a layer are
# kept: how often, and on how few tokens, a device evaluated decides its gradient.
# Seen: training loss 3.67033 twice, and 3.67026 after 2 tokens were evaluated; the capacity
# went from 64 (the default) to 2.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cat > "$dir/try.py" <<'P'
import torch, transformers
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration
transformers.logging.set_verbosity_error()

torch.manual_seed(0)
config = NllbMoeConfig(
    vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2,
    encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=16, decoder_ffn_dim=16, num_experts=2,
    encoder_sparse_step=1, decoder_sparse_step=1, dropout=0.0, attention_dropout=0.0,
    activation_dropout=0.0, moe_token_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
)
model = NllbMoeForConditionalGeneration(config)
ids = torch.randint(5, 40, (4, 12))
def training_loss():
    model.train(); torch.manual_seed(1)
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()
def capacities():
    return {m.expert_capacity for m in model.modules() if hasattr(m, "expert_capacity")}
before, first = training_loss(), capacities()
again = training_loss()
model.eval()
with torch.no_grad():
    model(input_ids=ids[:1, :2], labels=ids[:1, :2])
after, then = training_loss(), capacities()
print(f"training loss {before:.5f}, again {again:.5f}, after one evaluation of 2 tokens {after:.5f}")
print("expert_capacity", first, "->", then)
raise SystemExit(not (before == again != after and first != then))
P
"$dir/venv/bin/python" "$dir/try.py"
