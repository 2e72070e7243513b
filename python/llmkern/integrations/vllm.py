"""The plug-in for vLLM: `--quantization llmkern` runs linear layers with packed weights on llmkern's ops.

Untested against the real server. Entry point group `vllm.general_plugins`, whose functions run in every process and
may run more than once (vllm/plugins/__init__.py). The interface as of vLLM's sources of 2026:

    vllm/model_executor/layers/quantization/__init__.py      register_quantization_config
    vllm/model_executor/layers/quantization/base_config.py   QuantizationConfig, QuantizeMethodBase
    vllm/model_executor/layers/linear.py                     LinearBase, LinearMethodBase, UnquantizedLinearMethod
    vllm/config/model.py (_verify_quantization)              override_quantization_method(config, user's, hf_config)

The parameters are plain ones with attributes, for `weight_loader`; `weight_loader_v2` is for classes that vLLM lists by
name. Mixtures of experts and packed output heads are refused.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def register() -> None:
    """Make `--quantization llmkern` known to vLLM; does nothing where vLLM is missing. May be called again."""
    if importlib.util.find_spec("vllm") is None:
        logger.debug("llmkern: vllm is not installed")
        return
    from vllm.model_executor.layers import quantization

    if "llmkern" not in quantization.QUANTIZATION_METHODS:
        quantization.register_quantization_config("llmkern")(config_class())


def config_class() -> type:
    """The QuantizationConfig, made when it is needed: its base is vLLM's."""
    from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from llmkern.integrations import serving

    class LlmkernLinearMethod(serving.LinearMethod, LinearMethodBase):
        """Linear layers with packed weights."""

    class LlmkernConfig(serving.Config, QuantizationConfig):
        """Ours on the server's base."""

        linear, dense_method, packed_method = LinearBase, UnquantizedLinearMethod, LlmkernLinearMethod

        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
        ) -> str | None:
            """Other methods' checkpoints are taken over where `--quantization llmkern` asks for it."""
            return serving.override(hf_quant_cfg, user_quant)

        def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
            """gptq and awq do not say which layers are dense: a local folder's headers do."""
            if Path(model_name).is_dir():
                self.formats.look_at(Path(model_name))

    return LlmkernConfig
