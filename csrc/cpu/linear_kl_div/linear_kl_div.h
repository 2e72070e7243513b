// Rows of logits of two models: the divergence of their softmax, the cross-entropy, and the gradient of a weighted sum
// of the two in the place of the student's logits. ops/linear_kl_div/reference.py is the definition.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace llmkern {

// As KINDS in ops/linear_kl_div/reference.py.
enum class Divergence : int { FORWARD_KL, REVERSE_KL, JSD, SKEW_KL, SKEW_REVERSE_KL };

struct LinearKlDivArgs {
    void* student;  // [n, v] logits; the gradient afterwards, or anything
    DType student_dtype;
    const void* teacher;  // [n, v] logits, or null: log_probs
    DType teacher_dtype;
    const int64_t* indices;  // [n, k] in [0, v)
    const float* log_probs;  // [n, k]; an entry of -inf is not listed
    const int64_t* labels;   // [n] in [0, v), or null
    float* stats;            // [n, 3] out: divergence, cross-entropy, 1 if the likeliest classes agree
    int64_t n, v, k;
    Divergence kind;
    float mix;  // share of the teacher in the mixture of the last three kinds
    float temperature;
    float divergence_weight, ce_weight;
    float softcap, teacher_softcap;  // 0: none
    bool tail, gradient;
    int threads;
};

#define LLMKERN_KERNEL(level)                        \
    namespace level {                                \
    void linear_kl_div(const LinearKlDivArgs& args); \
    }
#include "cpu/linear_kl_div/kernels.def"
#undef LLMKERN_KERNEL

}  // namespace llmkern
