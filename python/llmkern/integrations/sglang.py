"""The plug-in for SGLang: `--quantization llmkern` runs linear layers with packed weights on llmkern's ops.

Untested against the real server. Entry point group `sglang.srt.plugins`, whose functions run in every process
(python/sglang/srt/plugins/__init__.py). SGLang has no function that registers a quantization: a plug-in adds to
`QUANTIZATION_METHODS`, and to the choices of the command line. The interface as of SGLang's sources of 2026:

    python/sglang/srt/layers/quantization/__init__.py      QUANTIZATION_METHODS
    python/sglang/srt/layers/quantization/base_config.py   QuantizationConfig, LinearMethodBase
    python/sglang/srt/layers/quantization/unquant.py       UnquantizedLinearMethod
    python/sglang/srt/layers/linear.py                     LinearBase, the loaders
    python/sglang/srt/arg_groups/choices.py                add_quantization_method_choices (server_args re-exports it)
    python/sglang/srt/configs/model_config.py              override_quantization_method(config, user's)

Mixtures of experts and packed output heads are refused.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

logger = logging.getLogger(__name__)


def register() -> None:
    """Make `--quantization llmkern` known to SGLang; does nothing where SGLang is missing. May be called again."""
    if importlib.util.find_spec("sglang") is None:
        logger.debug("llmkern: sglang is not installed")
        return
    from sglang.srt import server_args
    from sglang.srt.layers import quantization

    if "llmkern" not in quantization.QUANTIZATION_METHODS:
        quantization.QUANTIZATION_METHODS["llmkern"] = config_class()
        server_args.add_quantization_method_choices(["llmkern"])


def config_class() -> type:
    """The QuantizationConfig, made when it is needed: its base is SGLang's."""
    import torch
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    from llmkern.integrations import serving

    class LlmkernLinearMethod(serving.LinearMethod, LinearMethodBase):
        """Linear layers with packed weights."""

    class LlmkernConfig(QuantizationConfig):
        """The quantization_config of config.json (compressed-tensors, gptq or awq), or llmkern.json."""

        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__()
            self.formats = serving.Formats(config)

        def get_name(self) -> str:
            """The name of the method."""
            return serving.NAME

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            """What ops take."""
            return [torch.bfloat16, torch.float16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            """Ampere."""
            return 80

        @staticmethod
        def get_config_filenames() -> list[str]:
            """Read where config.json has no quantization_config: our folders of pruned float weights."""
            return [serving.CONFIG_FILE]

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> LlmkernConfig:
            """Of the quantization_config."""
            return cls(config)

        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any] | None, user_quant: str | None
        ) -> str | None:
            """Other methods' checkpoints are taken over where `--quantization llmkern` asks for it."""
            return serving.override(hf_quant_cfg, user_quant)

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
            """The method of a layer; None for what is not linear."""
            if isinstance(layer, LinearBase):
                scheme = self.formats.of(prefix, self.packed_modules_mapping)
                return UnquantizedLinearMethod() if scheme is None else LlmkernLinearMethod(scheme, prefix)
            self.formats.refuse_other(layer, prefix)
            return None

        def get_scaled_act_names(self) -> list[str]:
            """No activation is scaled."""
            return []

    return LlmkernConfig
