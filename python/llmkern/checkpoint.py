"""save and load: a model with packed layers as a folder that stock readers understand, and back bit for bit.

    config.json           the model's, with the quantization_config of the format (none if no layer has codes)
    model.safetensors     every tensor, packed layers in the format's layout; or model-00001-of-00003.safetensors and so
                          on, with model.safetensors.index.json
    llmkern.json          which layer is which packed class: what `load` needs and no standard file says; checksums
    llmkern.safetensors   masks that the standard layout does not tell (absent when there are none)
    generation_config.json, tokenizer files, report.json, report.html   where there are any

A folder is written beside its place under a temporary name, flushed, and renamed: it is complete or absent.
"""

from __future__ import annotations

from llmkern.checkpoint_folder import EXTRA, FORMAT_VERSION, FORMATS, META, check_files, refuse_foreign
from llmkern.loading import load
from llmkern.saving import save
from llmkern.weight_files import INDEX, WEIGHTS

__all__ = [
    "EXTRA", "FORMATS", "FORMAT_VERSION", "INDEX", "META", "WEIGHTS", "check_files", "load", "refuse_foreign", "save",
]  # fmt: skip
