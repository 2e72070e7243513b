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
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    from llmkern.integrations import serving

    class LlmkernLinearMethod(serving.LinearMethod, LinearMethodBase):
        """Linear layers with packed weights."""

    class LlmkernConfig(serving.Config, QuantizationConfig):
        """Ours on the server's base."""

        linear, dense_method, packed_method = LinearBase, UnquantizedLinearMethod, LlmkernLinearMethod

        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any] | None, user_quant: str | None
        ) -> str | None:
            """Other methods' checkpoints are taken over where `--quantization llmkern` asks for it."""
            return serving.override(hf_quant_cfg, user_quant)

        def get_scaled_act_names(self) -> list[str]:
            """No activation is scaled."""
            return []

    return LlmkernConfig
