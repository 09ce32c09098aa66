// Huffman codes as zstd has them (RFC 8878, 4.2): lengths, values, and how a frame describes them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace ciuic {

constexpr unsigned kMaxBits = 11;               // of one code
constexpr std::size_t kMaxTreeBytes = 1 + 127;  // a description: its length, and coded weights or 4 bits for each

using Histogram = std::array<std::uint32_t, 256>;

struct Code {
  std::array<std::uint8_t, 256> bits;    // 0: does not occur
  std::array<std::uint16_t, 256> value;  // of that many bits
  unsigned longest = 0;
  unsigned last = 0;  // highest symbol
  std::size_t symbols = 0;
};

// Code lengths by Huffman's algorithm on two queues, cut to kMaxBits, then zstd's canonical codes (4.2.1.3). At least
// two symbols have a count.
void build_code(const Histogram& histogram, Code& code) noexcept;

// Writes the tree description (4.2.1.1) to `out`, which has kMaxTreeBytes; its size, or 0 where it cannot be said.
std::size_t write_tree(const Code& code, std::uint8_t* out) noexcept;

}  // namespace ciuic
