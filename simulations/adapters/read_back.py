"""Read saved models back in a process of their own, as a user does.

``python -m simulations.adapters.read_back DIRECTORY`` prints a line of JSON for each
case under the directory: its name, and what is wrong, if anything is.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.loading import fingerprint
from simulations.adapters.cases import Case, base_model, example
from simulations.adapters.check import LOGIT_TOLERANCE


def fault(directory: Path) -> str:
    """Read a case back; return what is wrong, empty if nothing is."""
    told = json.loads((directory / "case.json").read_text(encoding="utf-8"))
    digest = told.pop("fingerprint")
    case = Case(**told)
    again = adapt(base_model(case.family), case.tuning, case.options)
    partition = model_partition(again)
    if fingerprint(again, (*partition.trainable, *partition.frozen)) != digest:
        return "another process adapts the model otherwise"
    logits = load_file(directory / "logits.safetensors")
    base = base_model(case.family)
    plain = getattr(transformers, type(base).__name__)
    torch.manual_seed(99)
    models = {}
    if "adapter" in logits:
        models["adapter"] = PeftModel.from_pretrained(base, directory / "adapter")
    if "merged" in logits:
        models["merged"] = plain.from_pretrained(directory / "merged")
    for name, model in models.items():
        got = model.eval()(**example(case.family)).logits
        difference = float((got - logits[name]).abs().max())
        if not difference <= LOGIT_TOLERANCE:
            return f"read back, the logits of {name} differ by {difference:.0e}"
    return ""


def main(directory: Path) -> None:
    """Read every case under a directory back."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Other than the process that saved, which rounds otherwise.
    torch.set_num_threads(2)
    for file in sorted(directory.glob("*/case.json")):
        try:
            found = fault(file.parent)
        except Exception as error:
            found = f"read back: {type(error).__name__}: {error}"
        print(json.dumps({"name": file.parent.name, "fault": found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
