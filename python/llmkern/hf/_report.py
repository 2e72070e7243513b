"""The report of a load: every layer that is packed, and every one that multiplies with a dense weight, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from llmkern.nn import PackedLinear, dense_weight, is_linear
from llmkern.patching import kernel_of, matrices
from llmkern.report import Report, Row, Skipped, model_bytes


def report_of(model: Any, layers: Mapping[str, PackedLinear], source: Any) -> Report:
    """Rows have no loss: nothing was approximated here. Bytes before: of a dense weight in the model's dtype."""
    report = Report(f"from_pretrained ({source.format})", notes=list(source.notes))
    dtype = model.dtype
    for name, layer in layers.items():
        n, k = layer.out_features, layer.in_features
        notes = [] if not layer.is_share else [f"tensor parallel: this rank holds {list(layer.shape)} of it"]
        if notes and layer.activations and layer.shape[1] < k:
            notes.append("each rank quantizes its own columns of x")
        report.rows.append(
            Row(
                name=name,
                shape=(n, k),
                method=layer.method or layer.format,
                kernel=kernel_of(layer, dtype),
                loss=None,
                seconds=0.0,
                bytes_before=n * k * dtype.itemsize,
                bytes_after=layer.nbytes,
                notes=tuple(notes),
            )
        )
    report.skipped += [Skipped(name, f"a {type(model).__name__} has no such layer", 0) for name in source.missing]
    for name, module in model.named_modules():
        if is_linear(module):
            reason = source.why_dense(name)
            report.skipped.append(Skipped(name, reason, dense_weight(module).nbytes))
        elif not isinstance(module, PackedLinear | nn.Embedding) and (own := matrices(module)):
            reason = f"{type(module).__name__} multiplies with its weight in a forward of its own"
            report.skipped.append(Skipped(name, reason, sum(matrix.nbytes for matrix in own)))
    report.model_bytes_after = model_bytes(model)
    report.model_bytes_before = report.model_bytes_after + sum(
        row.bytes_before - row.bytes_after for row in report.rows
    )
    return report
