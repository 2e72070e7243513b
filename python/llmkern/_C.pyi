"""The native module: per op a submodule, in it one function per CPU level that was built (csrc/cpu/module.cpp)."""

from types import ModuleType

int8_linear: ModuleType
int8_dynamic_linear: ModuleType
int4_linear: ModuleType
sparse24_linear: ModuleType
sparse24_int4_linear: ModuleType
bitmask_linear: ModuleType
gptq_block: ModuleType
sparsegpt_block: ModuleType
scale_search: ModuleType
linear_kl_div: ModuleType
peaks: ModuleType

def levels() -> list[tuple[str, bool, str]]:
    """(name, available here, compile flags) of every CPU level, lowest first."""

def fast_bf16_products() -> bool:
    """Whether products of bf16 pairs (avx512_bf16), where there are such, are faster than fp32's."""
