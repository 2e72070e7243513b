"""save and load: a model with packed layers as a folder that stock readers understand, and back bit for bit.

    config.json           the model's, with the quantization_config of the format (none if no layer has codes)
    model.safetensors     every tensor, packed layers in the format's layout
    llmkern.json          which layer is which packed class: what `load` needs and no standard file says
    llmkern.safetensors   masks that the standard layout does not tell (absent when there are none)
    generation_config.json, tokenizer files, report.json, report.html   where there are any

A folder is written beside its place under a temporary name, flushed, and renamed: it is complete or absent.
"""

from __future__ import annotations

from llmkern.checkpoint_folder import EXTRA, FORMAT_VERSION, FORMATS, META, WEIGHTS, refuse_foreign
from llmkern.loading import load
from llmkern.saving import save

__all__ = ["EXTRA", "FORMATS", "FORMAT_VERSION", "META", "WEIGHTS", "load", "refuse_foreign", "save"]
