"""Facts: python/sglang/srt/arg_groups/choices.py, commit 0099dee6aa65 (2026), which server_args re-exports."""

QUANTIZATION_CHOICES = ["awq", "gptq", "compressed-tensors"]
add_quantization_method_choices = QUANTIZATION_CHOICES.extend
