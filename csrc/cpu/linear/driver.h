// The fp32 linear driver for the level of the file that includes this, after cpu/simd/<level>.h.
#pragma once

#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/linear/linear.h"

namespace llmkern::LLMKERN_NS {

#include "cpu/linear/scales.inl"

#include "cpu/linear/source.inl"

#include "cpu/linear/stream.inl"

#include "cpu/linear/multiply.inl"

#include "cpu/linear/driver.inl"

}  // namespace llmkern::LLMKERN_NS
