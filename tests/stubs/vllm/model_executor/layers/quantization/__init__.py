"""Facts: vllm/model_executor/layers/quantization/__init__.py, commit 05d909563e1d (2026)."""

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

QUANTIZATION_METHODS = ["awq", "gptq", "compressed-tensors"]
_CUSTOMIZED_METHOD_TO_QUANT_CONFIG = {}


def register_quantization_config(quantization):
    def _wrapper(quant_config_cls):
        if quantization not in QUANTIZATION_METHODS:
            QUANTIZATION_METHODS.append(quantization)
        if not issubclass(quant_config_cls, QuantizationConfig):
            raise ValueError("The quantization config must be a subclass of `QuantizationConfig`.")
        _CUSTOMIZED_METHOD_TO_QUANT_CONFIG[quantization] = quant_config_cls
        return quant_config_cls

    return _wrapper


def get_quantization_config(quantization):
    return _CUSTOMIZED_METHOD_TO_QUANT_CONFIG[quantization]
