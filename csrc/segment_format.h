// Constants of segments that the native core shares with ciuic_async/format/segment.py (docs/format.md, section 5).
// tests/unit/test_native_constants.py compares the two.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ciuic {

constexpr std::size_t kDirectAlignmentBytes = 4096;         // offset, length and memory of a direct write
constexpr std::size_t kMaxChunkBytes = std::size_t{64} << 20;  // raw bytes of one record
constexpr std::size_t kMaxItemBytes = 16;                   // complex128

constexpr std::uint8_t kPlaneRaw = 0;   // plane bytes as they are
constexpr std::uint8_t kPlaneZstd = 1;  // one zstd frame

static_assert((kDirectAlignmentBytes & (kDirectAlignmentBytes - 1)) == 0, "alignments are powers of two");
static_assert(kMaxChunkBytes <= UINT32_MAX, "the plane directory holds sizes in 4 bytes");

}  // namespace ciuic
