#include "huffman.h"

#include <algorithm>
#include <cstring>

namespace ciuic {
namespace {

constexpr unsigned kWeightsLog = 6;  // RFC 8878, 4.2.1.2: accuracy of the coded weights

// Bits from the lowest upwards, for the few bits of a table description.
struct BitWriter {
  std::uint8_t* to;
  std::uint64_t pending = 0;
  unsigned count = 0;

  void add(std::uint64_t value, unsigned bits) noexcept {
    pending |= (value & ((std::uint64_t{1} << bits) - 1)) << count;
    count += bits;
    for (; count >= 8; count -= 8, pending >>= 8) *to++ = static_cast<std::uint8_t>(pending);
  }
  std::uint8_t* end() noexcept {
    if (count > 0) *to++ = static_cast<std::uint8_t>(pending);
    return to;
  }
};

// Weights by finite state entropy (RFC 8878, 4.1 and 4.2.1.2). Writes at most 127 bytes plus slack; 0 where that is no
// gain over 4 bits a weight or cannot be said.
std::size_t code_weights(const std::uint8_t* weights, std::size_t n, std::uint8_t* out) noexcept {
  constexpr int kStates = 1 << kWeightsLog;
  constexpr unsigned kSymbols = kMaxBits + 1;
  if (n <= 2) return 0;
  int counts[kSymbols] = {};
  for (std::size_t at = 0; at < n; ++at) ++counts[weights[at]];
  int shares[kSymbols] = {};
  int left = kStates, distinct = 0;
  unsigned most = 0;
  for (unsigned weight = 0; weight < kSymbols; ++weight) {
    if (counts[weight] == 0) continue;
    ++distinct;
    shares[weight] = std::max(1, static_cast<int>(static_cast<std::size_t>(counts[weight]) * kStates / n));
    left -= shares[weight];
    if (counts[weight] > counts[most]) most = weight;
  }
  if (distinct < 2 || shares[most] + left < 1) return 0;
  shares[most] += left;

  BitWriter header{out};
  header.add(kWeightsLog - 5, 4);
  int remaining = kStates + 1, threshold = kStates;
  unsigned bits = kWeightsLog + 1;
  bool after_zero = false;
  for (unsigned weight = 0; weight < kSymbols && remaining > 1;) {
    if (after_zero) {
      unsigned zeros = 0;
      while (weight < kSymbols && shares[weight] == 0) ++weight, ++zeros;
      for (; zeros >= 3; zeros -= 3) header.add(3, 2);
      header.add(zeros, 2);
    }
    int value = shares[weight++];
    const int most_short = 2 * threshold - 1 - remaining;
    remaining -= value;
    after_zero = value == 0;
    ++value;
    if (value >= threshold) value += most_short;
    header.add(static_cast<unsigned>(value), value < most_short ? bits - 1 : bits);
    for (; remaining < threshold; threshold >>= 1) --bits;
  }
  std::uint8_t* const stream = header.end();

  struct Step {
    std::uint32_t delta_bits;
    int delta_state;
  };
  std::uint8_t spread[kStates];
  std::uint16_t states[kStates];
  int starts[kSymbols];
  Step steps[kSymbols] = {};
  int total = 0, position = 0;
  for (unsigned weight = 0; weight < kSymbols; ++weight) {
    starts[weight] = total;
    for (int at = 0; at < shares[weight]; ++at) {
      spread[position] = static_cast<std::uint8_t>(weight);
      position = (position + (kStates >> 1) + (kStates >> 3) + 3) & (kStates - 1);
    }
    if (shares[weight] == 1) {
      steps[weight] = {(kWeightsLog << 16) - kStates, total - 1};
    } else if (shares[weight] > 1) {
      const unsigned high = 31U - static_cast<unsigned>(__builtin_clz(static_cast<unsigned>(shares[weight] - 1)));
      const unsigned most_bits = kWeightsLog - high;
      const unsigned least_state = static_cast<unsigned>(shares[weight]) << most_bits;
      steps[weight] = {(most_bits << 16) - least_state, total - shares[weight]};
    }
    total += shares[weight];
  }
  for (int state = 0; state < kStates; ++state) {
    states[starts[spread[state]]++] = static_cast<std::uint16_t>(kStates + state);
  }

  BitWriter coded{stream};
  const auto enter = [&](unsigned weight) {
    const Step& step = steps[weight];
    const std::uint32_t bits_out = (step.delta_bits + (1U << 15)) >> 16;
    const std::uint32_t value = (bits_out << 16) - step.delta_bits;
    return std::uint32_t{states[static_cast<int>(value >> bits_out) + step.delta_state]};
  };
  const auto advance = [&](std::uint32_t& state, unsigned weight) {
    const Step& step = steps[weight];
    const std::uint32_t bits_out = (state + step.delta_bits) >> 16;
    coded.add(state, bits_out);
    state = states[static_cast<int>(state >> bits_out) + step.delta_state];
  };
  std::size_t at = n;
  std::uint32_t first, second;
  if (n % 2 == 1) {
    first = enter(weights[--at]);
    second = enter(weights[--at]);
    advance(first, weights[--at]);
  } else {
    second = enter(weights[--at]);
    first = enter(weights[--at]);
  }
  while (at > 0) {
    advance(second, weights[--at]);
    advance(first, weights[--at]);
  }
  coded.add(second, kWeightsLog);
  coded.add(first, kWeightsLog);
  coded.add(1, 1);
  const auto size = static_cast<std::size_t>(coded.end() - out);
  return size < 128 && size < (n + 1) / 2 ? size : 0;
}

}  // namespace

void build_code(const Histogram& histogram, Code& code) noexcept {
  struct Leaf {
    std::uint32_t count;
    std::uint8_t symbol;
  };
  std::array<Leaf, 256> leaves;
  std::size_t n = 0;
  for (unsigned symbol = 0; symbol < 256; ++symbol) {
    if (histogram[symbol] != 0) {
      leaves[n++] = {histogram[symbol], static_cast<std::uint8_t>(symbol)};
      code.last = symbol;
    }
  }
  code.symbols = n;
  std::sort(leaves.begin(), leaves.begin() + static_cast<std::ptrdiff_t>(n), [](const Leaf& a, const Leaf& b) {
    return a.count != b.count ? a.count < b.count : a.symbol < b.symbol;
  });

  std::array<std::uint64_t, 512> weight;  // leaves, then inner nodes in order of creation
  std::array<std::uint16_t, 512> parent;
  for (std::size_t leaf = 0; leaf < n; ++leaf) weight[leaf] = leaves[leaf].count;
  std::size_t next_leaf = 0, next_inner = n;
  for (std::size_t made = n; made < 2 * n - 1; ++made) {
    std::uint64_t sum = 0;
    for (int child = 0; child < 2; ++child) {
      const bool take_leaf = next_leaf < n && (next_inner == made || weight[next_leaf] <= weight[next_inner]);
      const std::size_t chosen = take_leaf ? next_leaf++ : next_inner++;
      parent[chosen] = static_cast<std::uint16_t>(made);
      sum += weight[chosen];
    }
    weight[made] = sum;
  }
  std::array<std::uint16_t, 512> depth;
  depth[2 * n - 2] = 0;
  std::array<int, kMaxBits + 1> of_length{};
  for (std::size_t node = 2 * n - 2; node-- > 0;) {
    depth[node] = static_cast<std::uint16_t>(depth[parent[node]] + 1);
    if (node < n) ++of_length[std::min<unsigned>(depth[node], kMaxBits)];
  }
  // Cutting made the codes overfull by `excess` places of the longest length: take one code of the longest length as
  // the sibling of a shorter one, until they fit again.
  int excess = -(1 << kMaxBits);
  for (unsigned length = 1; length <= kMaxBits; ++length) excess += of_length[length] << (kMaxBits - length);
  for (; excess > 0; --excess) {
    unsigned shorter = kMaxBits - 1;
    while (of_length[shorter] == 0) --shorter;
    --of_length[shorter];
    of_length[shorter + 1] += 2;
    --of_length[kMaxBits];
  }

  code.bits.fill(0);
  std::size_t leaf = 0;  // rarest first gets the longest
  code.longest = 0;
  for (unsigned length = kMaxBits; length >= 1; --length) {
    if (of_length[length] > 0 && code.longest == 0) code.longest = length;
    for (int left = of_length[length]; left > 0; --left) {
      code.bits[leaves[leaf++].symbol] = static_cast<std::uint8_t>(length);
    }
  }
  std::array<std::uint16_t, kMaxBits + 2> first{};
  unsigned smallest = 0;
  for (unsigned length = code.longest; length >= 1; --length) {
    first[length] = static_cast<std::uint16_t>(smallest);
    smallest = (smallest + static_cast<unsigned>(of_length[length])) >> 1;
  }
  for (unsigned symbol = 0; symbol <= code.last; ++symbol) {
    code.value[symbol] = code.bits[symbol] != 0 ? first[code.bits[symbol]]++ : std::uint16_t{0};
  }
}

std::size_t write_tree(const Code& code, std::uint8_t* out) noexcept {
  std::uint8_t weights[257] = {};
  for (unsigned symbol = 0; symbol < code.last; ++symbol) {
    weights[symbol] = code.bits[symbol] != 0 ? static_cast<std::uint8_t>(code.longest + 1 - code.bits[symbol]) : 0;
  }
  std::uint8_t coded[512];  // 255 weights of at most 7 bits, and a header
  const std::size_t n = code.last;
  if (const std::size_t size = code_weights(weights, n, coded); size != 0) {
    out[0] = static_cast<std::uint8_t>(size);
    std::memcpy(out + 1, coded, size);
    return 1 + size;
  }
  if (n > 128) return 0;
  out[0] = static_cast<std::uint8_t>(127 + n);
  for (std::size_t at = 0; at < n; at += 2) {
    out[1 + at / 2] = static_cast<std::uint8_t>(weights[at] << 4 | weights[at + 1]);
  }
  return 1 + (n + 1) / 2;
}

}  // namespace ciuic
