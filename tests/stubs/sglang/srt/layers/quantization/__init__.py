"""Facts: python/sglang/srt/layers/quantization/__init__.py, commit 0116a682fcad (2026)."""

QUANTIZATION_METHODS = {"awq": None, "gptq": None, "compressed-tensors": None}


def get_quantization_config(quantization):
    if quantization not in QUANTIZATION_METHODS:
        raise ValueError(f"Invalid quantization method: {quantization}")
    return QUANTIZATION_METHODS[quantization]
