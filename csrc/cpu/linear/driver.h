// The fp32 linear driver for the level of the file that includes this, after cpu/simd/<level>.h.
#pragma once

#include <utility>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/linear/linear.h"

namespace llmkern::LLMKERN_NS {

#include "cpu/linear/carver.inl"

#include "cpu/linear/scales.inl"

#include "cpu/linear/source.inl"

#include "cpu/linear/stream.inl"

#include "cpu/linear/multiply.inl"

#include "cpu/linear/driver.inl"

#ifdef LLMKERN_CODE_STREAM
#include "cpu/linear/codes.inl"
#endif

#ifdef LLMKERN_PAIR_DOT
#include "cpu/linear/pair_codes.inl"

#include "cpu/linear/pair_tile.inl"

#ifdef LLMKERN_TILE_DOT
#include "cpu/linear/amx.inl"

#include "cpu/linear/amx_pairs.inl"
#else
#include "cpu/linear/pairs.inl"

#include "cpu/linear/pair_stream.inl"
#endif
#endif

}  // namespace llmkern::LLMKERN_NS
