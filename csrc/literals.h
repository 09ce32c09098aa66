// Order-0 compression as ordinary zstd frames (RFC 8878): every block is raw, one repeated byte, or Huffman-coded
// literals without sequences. Byte planes of floats have no repetitions to find, so looking for none is what makes this
// faster than the library's fastest level, at the same size or less. Any zstd decodes it; no library is needed here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ciuic {

// Enough for a frame of any `size_bytes` of content.
std::size_t literals_bound(std::size_t size_bytes) noexcept;

// Shannon's bound in bytes for `size_bytes` coded byte by byte, judged by samples of every block. Not an upper bound.
std::size_t literals_estimate(const std::uint8_t* data, std::size_t size_bytes,
                              unsigned minimum_gain_permille) noexcept;

// Writes one frame to `out`, which has literals_bound(size_bytes), and returns its length. A block of which a sample
// promises less than the minimum gain is stored raw. `quickly` makes codes by samples too, which takes a third less
// time and hardly more space. Returns 0, having written nothing of use, where no block shrank. Runs on the calling
// thread; `out` does not overlap `data`. Throws std::bad_alloc.
std::size_t compress_literals(const std::uint8_t* data, std::size_t size_bytes, unsigned minimum_gain_permille,
                              bool quickly, std::uint8_t* out);

}  // namespace ciuic
