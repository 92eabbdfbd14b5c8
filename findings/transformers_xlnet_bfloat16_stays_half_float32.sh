#!/usr/bin/env bash
# transformers 5.23.0: XLNet asked for in bfloat16 is loaded in two types, and does not run.
# A good engineer expects from_pretrained(dtype=torch.bfloat16) to give a model in that type, as
# BERT's does. Parameters that XLNet holds itself and not in a linear layer (relative attention's
# q, k, v, o and biases, mask_emb) stay float32, without a word, and the first product fails.
# It matters where memory is planned by the type that was asked for, and for frozen
# half-precision bases under adapters.
# Seen: XLNet's types are bfloat16 and float32, and a forward pass raises "expected scalar type
# Float but found BFloat16"; BERT's is bfloat16 alone.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cat > "$dir/try.py" <<'P'
import tempfile, torch, transformers
from transformers import XLNetConfig, XLNetForSequenceClassification, BertConfig, BertForSequenceClassification
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
def types(model):
    return sorted({str(p.dtype) for p in model.parameters()})
small = dict(d_model=16, n_layer=2, n_head=2, d_inner=16, vocab_size=40)
with tempfile.TemporaryDirectory() as d:
    XLNetForSequenceClassification(XLNetConfig(**small)).save_pretrained(d)
    model = XLNetForSequenceClassification.from_pretrained(d, dtype=torch.bfloat16)
print("XLNet:", types(model), [n for n, p in model.named_parameters() if p.dtype == torch.float32][:4])
try:
    model(input_ids=torch.ones(1, 4, dtype=torch.long)); said = "runs"
except RuntimeError as error:
    said = f"RuntimeError: {error}"
print("forward:", said)
with tempfile.TemporaryDirectory() as d:
    BertForSequenceClassification(BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=40)).save_pretrained(d)
    other = BertForSequenceClassification.from_pretrained(d, dtype=torch.bfloat16)
print("BERT:", types(other))
raise SystemExit(not (len(types(model)) == 2 and said.startswith("RuntimeError") and types(other) == ["torch.bfloat16"]))
P
"$dir/venv/bin/python" "$dir/try.py"
