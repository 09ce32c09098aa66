#include "literals.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>

#include "huffman.h"

namespace ciuic {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bits are stored eight bytes at a time");

constexpr std::size_t kBlockBytes = 64 << 10;  // follows changes within a tensor; a table costs 20 to 60 bytes
constexpr std::size_t kMaxHeaderBytes = 4 + 1 + 8;
constexpr std::size_t kBlockHeaderBytes = 3;
constexpr std::size_t kSamplePieces = 8;
constexpr std::size_t kSampleBytes = 4096;
constexpr int kQuickSymbols = 128;  // from the least to the greatest: more would make rare ones take too much room
constexpr std::size_t kMinimumCodedBytes = 256;  // below, four streams and a table eat the gain
constexpr std::size_t kPairSymbols = 128;        // with more symbols a table of pairs costs more than it saves

enum BlockType : unsigned { kRawBlock = 0, kRepeatedBlock = 1, kCompressedBlock = 2 };

void put_little_endian(std::uint8_t* to, std::uint64_t value, std::size_t bytes) noexcept {
  for (std::size_t at = 0; at < bytes; ++at) to[at] = static_cast<std::uint8_t>(value >> (8 * at));
}

// Four tables, so that runs of one byte do not wait for the previous increment.
void count_bytes(const std::uint8_t* data, std::size_t size, Histogram& histogram) noexcept {
  std::uint32_t parts[4][256] = {};
  std::size_t at = 0;
  for (; at + 8 <= size; at += 8) {
    std::uint64_t word;
    std::memcpy(&word, data + at, sizeof(word));
    ++parts[0][word & 0xFF];
    ++parts[1][word >> 8 & 0xFF];
    ++parts[2][word >> 16 & 0xFF];
    ++parts[3][word >> 24 & 0xFF];
    ++parts[0][word >> 32 & 0xFF];
    ++parts[1][word >> 40 & 0xFF];
    ++parts[2][word >> 48 & 0xFF];
    ++parts[3][word >> 56];
  }
  for (; at < size; ++at) ++parts[0][data[at]];
  for (std::size_t symbol = 0; symbol < 256; ++symbol) {
    histogram[symbol] = parts[0][symbol] + parts[1][symbol] + parts[2][symbol] + parts[3][symbol];
  }
}

// c * log2(c) for every count that a sample can have: logarithms would take longer than counting.
const float* count_logs() {
  static const auto table = [] {
    std::array<float, kSampleBytes + 1> made{};
    for (std::size_t count = 1; count < made.size(); ++count) {
      made[count] = static_cast<float>(static_cast<double>(count) * std::log2(static_cast<double>(count)));
    }
    return made;
  }();
  return table.data();
}

struct Sample {
  Histogram counts{};
  std::size_t size = 0;
};

// Bytes from evenly spread places of a block.
Sample sample_of(const std::uint8_t* block, std::size_t size) noexcept {
  Sample sample;
  const std::size_t pieces = size > kSampleBytes ? kSamplePieces : 1;
  const std::size_t piece = size > kSampleBytes ? kSampleBytes / kSamplePieces : size;
  const std::size_t step = pieces > 1 ? (size - piece) / (pieces - 1) : 0;
  std::uint16_t counts[2][256] = {};
  for (std::size_t number = 0; number < pieces; ++number) {
    const std::uint8_t* const from = block + number * step;
    std::size_t at = 0;
    for (; at + 2 <= piece; at += 2) {
      ++counts[0][from[at]];
      ++counts[1][from[at + 1]];
    }
    if (at < piece) ++counts[0][from[at]];
  }
  for (std::size_t symbol = 0; symbol < 256; ++symbol) {
    sample.counts[symbol] = static_cast<std::uint32_t>(counts[0][symbol]) + counts[1][symbol];
  }
  sample.size = pieces * piece;
  return sample;
}

// Expected coded size of a block, as a share, from a sample of it. A small sample sees too few symbols, so it looks
// more compressible than the block is: Miller and Madow's correction.
double expected_share(const Sample& sample) noexcept {
  if (sample.size == 0) return 1;
  const float* const logs = count_logs();
  double sum = 0;
  std::size_t symbols = 0;
  for (const std::uint32_t count : sample.counts) {
    sum += static_cast<double>(logs[count]);
    symbols += count != 0;
  }
  const auto used = static_cast<double>(sample.size);
  const double correction = 0.72 * static_cast<double>(symbols - 1);  // (symbols - 1) / 2 nats, in bits
  return std::min(1.0, (used * std::log2(used) - sum + correction) / (8.0 * used));
}

// Counts to make a code by without looking at every byte for it: the sample's, and a little for every other symbol
// between the least and the greatest, so that all have a code. Costs under a percent of what the plane takes; where the
// range is so wide that it would cost more, all bytes are counted.
void count_quickly(const std::uint8_t* block, std::size_t size, const Sample& sample, Histogram& histogram) noexcept {
  std::uint8_t least = 255, greatest = 0;
  for (std::size_t at = 0; at < size; ++at) {  // compiles to vector minimum and maximum
    least = std::min(least, block[at]);
    greatest = std::max(greatest, block[at]);
  }
  if (greatest - least >= kQuickSymbols) return count_bytes(block, size, histogram);
  const auto scale = static_cast<std::uint32_t>(size / sample.size);
  histogram.fill(0);
  for (unsigned symbol = least; symbol <= greatest; ++symbol) histogram[symbol] = sample.counts[symbol] * scale + 1;
}

// What a thread keeps: codes of pairs of bytes (the first in the low byte): value << 5 | bits.
struct PairTable {
  std::uint32_t entries[1 << 16];
};

PairTable& pair_table() {
  thread_local std::unique_ptr<PairTable> mine(new PairTable);
  return *mine;
}

void fill_pairs(const Code& code, PairTable& table) noexcept {
  std::uint8_t present[256];
  std::size_t n = 0;
  for (unsigned symbol = 0; symbol <= code.last; ++symbol) {
    if (code.bits[symbol] != 0) present[n++] = static_cast<std::uint8_t>(symbol);
  }
  for (std::size_t b = 0; b < n; ++b) {
    const std::uint32_t low = code.value[present[b]], low_bits = code.bits[present[b]];
    std::uint32_t* const row = table.entries + (std::size_t{present[b]} << 8);
    for (std::size_t a = 0; a < n; ++a) {  // streams are written backwards: the second byte comes first
      const std::uint32_t value = low | static_cast<std::uint32_t>(code.value[present[a]]) << low_bits;
      row[present[a]] = value << 5 | (low_bits + code.bits[present[a]]);
    }
  }
}

// One backward bit stream (RFC 8878, 4.2.2).
struct Stream {
  const std::uint8_t* begin;
  const std::uint8_t* from;  // one past the next byte to code
  std::uint8_t* to;
  std::uint64_t pending = 0;
  unsigned count = 0;

  // Eight bytes are written of which fewer count: `to` has that much room beyond the longest stream.
  inline __attribute__((always_inline)) void flush() noexcept {
    std::memcpy(to, &pending, sizeof(pending));
    to += count >> 3;
    pending >>= count & ~7U;
    count &= 7;
  }
  inline __attribute__((always_inline)) void add(std::uint64_t value, unsigned bits) noexcept {
    pending |= value << count;
    count += bits;
  }
  // At most 7 + 4 * 11 bits are pending at once.
  template <bool kPairs>
  inline __attribute__((always_inline)) void four(const Code& code, const std::uint32_t* pairs) noexcept {
    from -= 4;
    if constexpr (kPairs) {
      std::uint32_t bytes;
      std::memcpy(&bytes, from, sizeof(bytes));
      const std::uint32_t high = pairs[bytes >> 16], low = pairs[bytes & 0xFFFF];
      add(high >> 5, high & 31);
      add(low >> 5, low & 31);
    } else {
      for (int at = 3; at >= 0; --at) add(code.value[from[at]], code.bits[from[at]]);
    }
    flush();
  }
  std::uint8_t* close() noexcept {
    add(1, 1);
    flush();
    return count > 0 ? to + 1 : to;
  }
};

// Two streams side by side, which a core works on at once; both at their ends afterwards, not closed.
template <bool kPairs>
inline __attribute__((always_inline)) void write_both(const Code& code, const std::uint32_t* pairs, Stream& first,
                                                      Stream& second) noexcept {
  for (Stream* stream : {&first, &second}) {
    for (; (stream->from - stream->begin) % 4 != 0; --stream->from) {
      stream->add(code.value[stream->from[-1]], code.bits[stream->from[-1]]);
    }
    stream->flush();
  }
  Stream a = first, b = second;  // in registers
  for (auto left = std::min(a.from - a.begin, b.from - b.begin) / 4; left > 0; --left) {
    a.four<kPairs>(code, pairs);
    b.four<kPairs>(code, pairs);
  }
  while (a.from > a.begin) a.four<kPairs>(code, pairs);
  while (b.from > b.begin) b.four<kPairs>(code, pairs);
  first = a;
  second = b;
}

using WriteBoth = void (*)(const Code&, const std::uint32_t*, Stream&, Stream&);

template <bool kPairs>
void write_portable(const Code& code, const std::uint32_t* pairs, Stream& first, Stream& second) {
  write_both<kPairs>(code, pairs, first, second);
}

#if defined(__x86_64__)
template <bool kPairs>
__attribute__((target("bmi2"))) void write_bmi2(const Code& code, const std::uint32_t* pairs, Stream& first,
                                                Stream& second) {
  write_both<kPairs>(code, pairs, first, second);
}

bool has_bmi2() {
  static const bool supported = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("bmi2") != 0;
  }();
  return supported;
}

template <bool kPairs>
WriteBoth stream_writer() {
  return has_bmi2() ? &write_bmi2<kPairs> : &write_portable<kPairs>;
}
#else
template <bool kPairs>
WriteBoth stream_writer() {
  return &write_portable<kPairs>;
}
#endif

// A literals section in four streams and no sequences (RFC 8878, 3.1.1.3); its size, or 0 where it does not get below
// `limit` bytes. Every byte of the block has a count, which may be a guess. `out` has room for 2 * size.
std::size_t write_coded(const std::uint8_t* block, std::size_t size, const Histogram& histogram, std::size_t limit,
                        std::uint8_t* out) {
  Code code;
  build_code(histogram, code);
  std::uint64_t bits = 0;
  for (unsigned symbol = 0; symbol <= code.last; ++symbol) bits += std::uint64_t{histogram[symbol]} * code.bits[symbol];
  if (bits / 8 >= limit) return 0;
  constexpr std::size_t kHeader = 5, kJumps = 6;
  std::uint8_t* const tree = out + kHeader;
  const std::size_t tree_size = write_tree(code, tree);
  if (tree_size == 0) return 0;
  std::uint8_t* const jumps = tree + tree_size;
  const bool in_pairs = code.symbols <= kPairSymbols;
  const std::uint32_t* pairs = nullptr;
  if (in_pairs) {
    PairTable& table = pair_table();
    fill_pairs(code, table);
    pairs = table.entries;
  }
  const WriteBoth write = in_pairs ? stream_writer<true>() : stream_writer<false>();
  const std::size_t quarter = (size + 3) / 4;
  std::uint8_t aside[kBlockBytes / 4 * kMaxBits / 8 + 16];  // the second of two, until the length of the first is known
  std::uint8_t* to = jumps + kJumps;
  for (std::size_t number = 0; number < 4; number += 2) {
    const std::uint8_t* const begin = block + number * quarter;
    const std::uint8_t* const middle = begin + quarter;
    Stream first{begin, middle, to}, second{middle, number == 0 ? middle + quarter : block + size, aside};
    write(code, pairs, first, second);
    std::uint8_t* const end = first.close();
    const auto second_size = static_cast<std::size_t>(second.close() - aside);
    put_little_endian(jumps + 2 * number, static_cast<std::uint64_t>(end - to), 2);
    if (number == 0) put_little_endian(jumps + 2, second_size, 2);
    std::memcpy(end, aside, second_size);
    to = end + second_size;
  }
  const auto stored = static_cast<std::uint64_t>(to - tree);
  constexpr std::uint64_t kCompressedLiterals = 2, kFourStreamsOf18Bits = 3;
  const std::uint64_t sizes = std::uint64_t{size} << 4 | stored << 22;
  put_little_endian(out, kCompressedLiterals | kFourStreamsOf18Bits << 2 | sizes, kHeader);
  *to++ = 0;  // no sequences
  const auto written = static_cast<std::size_t>(to - out);
  return written < limit ? written : 0;
}

// A block header (RFC 8878, 3.1.1.2); returns where the content goes. `size` is of what is stored, of what is meant for
// a repeated byte.
std::uint8_t* begin_block(std::uint8_t* to, BlockType type, std::size_t size, bool last) noexcept {
  const std::uint64_t header = (last ? 1U : 0U) | static_cast<unsigned>(type) << 1 | std::uint64_t{size} << 3;
  put_little_endian(to, header, kBlockHeaderBytes);
  return to + kBlockHeaderBytes;
}

bool is_repeated(const std::uint8_t* block, std::size_t size) noexcept {
  return std::memcmp(block, block + 1, size - 1) == 0;
}

std::size_t least_gain(std::size_t size, unsigned minimum_gain_permille) noexcept {
  return size - std::max<std::size_t>(size * minimum_gain_permille / 1000, 1);
}

}  // namespace

std::size_t literals_bound(std::size_t size_bytes) noexcept {
  const std::size_t blocks = size_bytes / kBlockBytes + 1;
  // The last block's streams may be written in full before they turn out not to pay: 11 bits a byte, and a tree.
  return kMaxHeaderBytes + size_bytes + blocks * kBlockHeaderBytes + 2 * kBlockBytes + 2 * kMaxTreeBytes;
}

std::size_t literals_estimate(const std::uint8_t* data, std::size_t size_bytes,
                              unsigned minimum_gain_permille) noexcept {
  double total = 0;
  for (std::size_t start = 0; start < size_bytes; start += kBlockBytes) {
    const std::size_t size = std::min(kBlockBytes, size_bytes - start);
    const double share = expected_share(sample_of(data + start, size));
    total += static_cast<double>(size) * (share <= 1 - minimum_gain_permille / 1000.0 ? share : 1.0);
  }
  return static_cast<std::size_t>(total);
}

std::size_t compress_literals(const std::uint8_t* data, std::size_t size_bytes, unsigned minimum_gain_permille,
                              bool quickly, std::uint8_t* out) {
  if (size_bytes < kMinimumCodedBytes) return 0;
  const double promised = 1 - minimum_gain_permille / 1000.0;
  // Magic; one segment, content size in 8 bytes; no checksum, no dictionary: the chunk has a digest of its own.
  std::uint8_t* to = out;
  put_little_endian(to, 0xFD2FB528, 4);
  to[4] = 0xE0;
  put_little_endian(to + 5, size_bytes, 8);
  to += kMaxHeaderBytes;
  bool shrank = false;
  const std::uint8_t* copied = data;  // what lies before is written; blocks stored raw wait, for often all of them are
  const auto write_waiting = [&](const std::uint8_t* end) {
    for (; copied < end; copied += std::min<std::size_t>(kBlockBytes, static_cast<std::size_t>(end - copied))) {
      const std::size_t size = std::min<std::size_t>(kBlockBytes, static_cast<std::size_t>(end - copied));
      to = begin_block(to, kRawBlock, size, copied + size == data + size_bytes);
      std::memcpy(to, copied, size);
      to += size;
    }
  };
  for (std::size_t start = 0; start < size_bytes; start += kBlockBytes) {
    const std::uint8_t* const block = data + start;
    const std::size_t size = std::min(kBlockBytes, size_bytes - start);
    const bool last = start + size == size_bytes;
    if (is_repeated(block, size)) {
      write_waiting(block);
      to = begin_block(to, kRepeatedBlock, size, last);
      *to++ = block[0];
    } else {
      const Sample sample = sample_of(block, size);
      if (size < kMinimumCodedBytes || expected_share(sample) > promised) continue;
      Histogram histogram;
      if (quickly) {
        count_quickly(block, size, sample, histogram);
      } else {
        count_bytes(block, size, histogram);
      }
      write_waiting(block);
      const std::size_t limit = least_gain(size, minimum_gain_permille);
      const std::size_t stored = write_coded(block, size, histogram, limit, to + kBlockHeaderBytes);
      if (stored == 0) continue;
      to = begin_block(to, kCompressedBlock, stored, last) + stored;
    }
    copied = block + size;
    shrank = true;
  }
  if (!shrank) return 0;
  write_waiting(data + size_bytes);
  const auto written = static_cast<std::size_t>(to - out);
  return written < size_bytes ? written : 0;
}

}  // namespace ciuic
