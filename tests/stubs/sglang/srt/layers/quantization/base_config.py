"""Facts: python/sglang/srt/layers/quantization/base_config.py, commit 008b79d2358b (2026)."""

from abc import ABC, abstractmethod


class QuantizeMethodBase(ABC):
    def create_weights(self, layer, *weight_args, **extra_weight_attrs):
        raise NotImplementedError()

    @abstractmethod
    def apply(self, layer, *args, **kwargs): ...

    def process_weights_after_loading(self, layer):
        return


class LinearMethodBase(QuantizeMethodBase):
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype,
        **extra_weight_attrs,
    ):  # fmt: skip
        raise NotImplementedError()

    @abstractmethod
    def apply(self, layer, x, bias=None): ...


class QuantizationConfig(ABC):
    def __init__(self):
        super().__init__()
        self.packed_modules_mapping = {}

    def update_packed_modules_mapping(self, mapping):
        self.packed_modules_mapping = mapping

    @abstractmethod
    def get_name(self): ...

    @abstractmethod
    def get_supported_act_dtypes(self): ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...

    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...

    @classmethod
    @abstractmethod
    def from_config(cls, config): ...

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg, user_quant):
        return None

    @abstractmethod
    def get_quant_method(self, layer, prefix): ...

    @abstractmethod
    def get_scaled_act_names(self): ...
