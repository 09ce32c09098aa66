// huffman.h, literals.h, zstd.h: what is encoded comes back, and hostile bytes are refused or decoded within bounds.
#include <algorithm>
#include <thread>

#include "../huffman.h"
#include "../literals.h"
#include "../segment_format.h"
#include "../zstd.h"
#include "checks.h"

namespace {

constexpr unsigned kMaxTransform = 3;

// Lengths of codes that fill the tree, whatever was counted.
void codes_of(const ciuic::Histogram& histogram) {
  ciuic::Code code;
  ciuic::build_code(histogram, code);
  std::uint32_t places = 0;
  for (std::size_t symbol = 0; symbol < histogram.size(); ++symbol) {
    CHECK((histogram[symbol] != 0) == (code.bits[symbol] != 0));
    CHECK(code.bits[symbol] <= ciuic::kMaxBits);
    if (code.bits[symbol] == 0) continue;
    CHECK(code.value[symbol] < 1U << code.bits[symbol]);
    places += 1U << (ciuic::kMaxBits - code.bits[symbol]);
  }
  CHECK(places == 1U << ciuic::kMaxBits);
  const Guarded tree(ciuic::kMaxTreeBytes);
  CHECK(ciuic::write_tree(code, tree.data()) <= tree.size());
}

void huffman_codes() {
  Source source(6);
  ciuic::Histogram histogram{};
  histogram[0] = histogram[255] = 1;
  codes_of(histogram);
  histogram[0] = histogram[1] = UINT32_MAX;
  codes_of(histogram);
  histogram.fill(1);
  codes_of(histogram);
  histogram.fill(UINT32_MAX);
  codes_of(histogram);
  histogram.fill(0);
  std::uint32_t before = 1, count = 1;  // as Fibonacci counted: the deepest of all trees
  for (std::size_t symbol = 0; symbol < 44; ++symbol) {
    histogram[symbol * 5] = count;
    const std::uint32_t next = before + count;
    before = count;
    count = next;
  }
  codes_of(histogram);
  for (int round = 0; round < 3000 / kFewer; ++round) {
    histogram.fill(0);
    const std::size_t symbols = 2 + source.below(255);
    for (std::size_t number = 0; number < symbols; ++number) {
      const std::size_t most = std::size_t{1} << (1 + source.below(31));
      histogram[source.below(256)] = static_cast<std::uint32_t>(1 + source.below(most));
    }
    histogram[source.below(128)] |= 1;
    histogram[128 + source.below(128)] |= 1;
    codes_of(histogram);
  }
}

// Bytes of every nature: noise, one byte, two, skewed, rising, repeated, mixed by blocks.
Bytes content_of(Source& source, unsigned kind, std::size_t size) {
  Bytes made = source.bytes(size);
  for (std::size_t at = 0; at < size; ++at) {
    const std::size_t nature = kind == 6 ? at / 70000 % 6 : kind;
    if (nature == 1) made[at] = 7;
    if (nature == 2) made[at] = made[at] % 2 == 0 ? 0 : 255;
    if (nature == 3) made[at] = static_cast<std::uint8_t>(__builtin_ctz(made[at] | 256U));
    if (nature == 4) made[at] = static_cast<std::uint8_t>(at >> 6);
    if (nature == 5) made[at] = static_cast<std::uint8_t>(at % 4 == 3 ? 0x3F : made[at]);
  }
  return made;
}

constexpr unsigned kKinds = 7;

void literals() {
  Source source(7);
  for (const std::size_t size : {0U, 1U, 2U, 255U, 256U, 257U, 1000U, 65535U, 65536U, 65537U, 200001U}) {
    for (unsigned kind = 0; kind < kKinds; ++kind) {
      const Bytes content = content_of(source, kind, size);
      const Guarded data(content);
      for (const unsigned gain : {0U, 80U, 1000U}) {
        for (const bool quickly : {false, true}) {
          const Guarded out(ciuic::literals_bound(size));
          const std::size_t written = ciuic::compress_literals(data.data(), size, gain, quickly, out.data());
          CHECK(written <= size);
          if (written == 0 || !ciuic::zstd_available()) continue;
          const Guarded frame(Bytes(out.data(), out.data() + written));
          const Guarded back(size);
          ciuic::decode_planes(frame.data(), written, {{ciuic::kPlaneZstd, written}}, ciuic::Transform::kNone, nullptr,
                               size, back.data());
          CHECK(back.holds(content));
        }
        CHECK(ciuic::literals_estimate(data.data(), size, gain) <= size);
      }
    }
  }
}

struct Encoded {
  std::vector<ciuic::PlaneEntry> planes;
  Bytes payload;
};

Encoded encode(const Guarded& raw, const std::uint8_t* base, const ciuic::EncodeParameters& parameters) {
  const Guarded out(raw.size());
  Encoded made{ciuic::encode_planes(raw.data(), base, raw.size(), parameters, out.data()), {}};
  std::size_t stored = 0;
  for (const ciuic::PlaneEntry& plane : made.planes) stored += plane.stored_size_bytes;
  CHECK(stored <= raw.size());
  made.payload.assign(out.data(), out.data() + stored);
  return made;
}

bool needs_base(ciuic::Transform how) { return how == ciuic::Transform::kXor || how == ciuic::Transform::kDifference; }

// Every item size, transform, level and nature of bytes, there and back.
void round_trips(unsigned seed, std::size_t largest) {
  Source source(seed);
  for (const std::size_t item : {1U, 2U, 4U, 8U, 16U}) {
    for (unsigned number = 0; number <= kMaxTransform; ++number) {
      if (!ciuic::is_transform(number, item)) continue;
      for (const int level : {0, 1, 3, -50}) {
        const std::size_t size = source.below(largest / item) * item;
        const auto kind = static_cast<unsigned>(source.below(kKinds));
        const Bytes content = content_of(source, kind, size);
        const Guarded raw(content);
        const Guarded base(content_of(source, kind, size));
        const ciuic::EncodeParameters parameters = {item, static_cast<ciuic::Transform>(number), level, 10};
        const std::uint8_t* const given = needs_base(parameters.transform) ? base.data() : nullptr;
        ciuic::estimate_planes(raw.data(), given, size, parameters);
        const Encoded encoded = encode(raw, given, parameters);
        if (encoded.planes.empty() || !ciuic::zstd_available()) continue;
        const Guarded payload(encoded.payload);
        const Guarded back(size);
        ciuic::decode_planes(payload.data(), payload.size(), encoded.planes, parameters.transform, given, size,
                             back.data());
        CHECK(back.holds(content));
      }
    }
  }
}

// One lie, or a few, about a payload.
void lie(Source& source, Encoded& encoded, std::size_t& raw_size) {
  for (std::size_t changes = 1 + source.below(3); changes > 0; --changes) {
    Bytes& payload = encoded.payload;
    ciuic::PlaneEntry& plane = encoded.planes[source.below(encoded.planes.size())];
    switch (source.below(9)) {
      case 0:
        plane.method = static_cast<std::uint8_t>(source.below(3));
        break;
      case 1:
        plane.stored_size_bytes = source.below(2 * payload.size() + 2);
        if (source.below(4) == 0) plane.stored_size_bytes = SIZE_MAX - source.below(4);
        break;
      case 2:
        raw_size = raw_size - std::min<std::size_t>(raw_size, 20) + source.below(40);
        if (source.below(3) == 0) raw_size = source.below(70000);
        break;
      case 3:
        payload.resize(source.below(payload.size() + 1));
        plane.stored_size_bytes = std::min(plane.stored_size_bytes, payload.size());
        break;
      case 4: {  // lengths that still add up
        ciuic::PlaneEntry& other = encoded.planes[source.below(encoded.planes.size())];
        const std::size_t moved = source.below(std::min<std::size_t>(plane.stored_size_bytes, 10000) + 1);
        plane.stored_size_bytes -= moved;
        other.stored_size_bytes += moved;
        break;
      }
      default:
        if (!payload.empty()) {  // where frames begin is where lies tell most
          const std::size_t near = source.below(2) == 0 ? payload.size() : std::min<std::size_t>(payload.size(), 40);
          payload[source.below(near)] = static_cast<std::uint8_t>(source.below(256));
        }
    }
  }
}

void hostile_payloads(unsigned seed, int rounds) {
  if (!ciuic::zstd_available()) return;
  Source source(seed);
  for (const std::size_t item : {1U, 2U, 4U, 16U}) {
    const std::size_t size = 800 * item;
    const Guarded raw(content_of(source, 3, size));
    auto how = ciuic::Transform::kNone;
    if (item == 2) how = ciuic::Transform::kRotated;
    if (item == 4) how = ciuic::Transform::kDifference;
    const Guarded base(content_of(source, 3, size));
    const std::uint8_t* const given = needs_base(how) ? base.data() : nullptr;
    const Encoded honest = encode(raw, given, {item, how, 1, 0});
    CHECK(!honest.planes.empty());
    int refused = 0;
    for (int round = 0; round < rounds; ++round) {
      Encoded changed = honest;
      std::size_t raw_size = size;
      lie(source, changed, raw_size);
      const Guarded payload(changed.payload);
      const Guarded out(raw_size);
      const Guarded same_length(content_of(source, 1, given != nullptr ? raw_size : 0));  // what callers see to
      try {
        ciuic::decode_planes(payload.data(), payload.size(), changed.planes, how,
                             given != nullptr ? same_length.data() : nullptr, raw_size, out.data());
      } catch (const ciuic::BadPayload&) {
        ++refused;
      }
    }
    CHECK(refused > rounds / 4);
  }
}

// No planes, planes of nothing, and more than a chunk may have.
void edges_of_payloads() {
  const Guarded none(0);
  const auto decode = [&none](const std::vector<ciuic::PlaneEntry>& planes, std::size_t raw_size) {
    ciuic::decode_planes(none.data(), 0, planes, ciuic::Transform::kNone, nullptr, raw_size, none.data());
  };
  CHECK_THROWS(ciuic::BadPayload, decode({}, 0));
  CHECK_THROWS(ciuic::BadPayload, decode({{ciuic::kPlaneRaw, 0}}, ciuic::kMaxChunkBytes + 1));
  if (ciuic::zstd_available()) CHECK_THROWS(ciuic::BadPayload, decode({{ciuic::kPlaneZstd, 0}}, 0));
  decode({{ciuic::kPlaneRaw, 0}}, 0);
}

// Lies that no loop would hit upon: each is caught by one check alone.
void single_lies() {
  if (!ciuic::zstd_available()) return;
  Source source(21);
  constexpr std::size_t kSize = 3000;
  constexpr std::size_t kFirstBlock = 13;  // where compress_literals puts it
  const Guarded raw(content_of(source, 3, kSize));
  const Guarded out(ciuic::literals_bound(kSize));
  const std::size_t stored = ciuic::compress_literals(raw.data(), kSize, 0, false, out.data());
  CHECK(stored > kFirstBlock);
  const Guarded back(kSize);
  const auto decode = [&](const Bytes& frame, const std::vector<ciuic::PlaneEntry>& planes) {
    const Guarded payload(frame);
    ciuic::decode_planes(payload.data(), payload.size(), planes, ciuic::Transform::kNone, nullptr, kSize, back.data());
  };
  const Bytes honest(out.data(), out.data() + stored);
  decode(honest, {{ciuic::kPlaneZstd, stored}});
  Bytes longer = honest;
  longer.push_back(0);
  CHECK_THROWS(ciuic::BadPayload, decode(longer, {{ciuic::kPlaneZstd, stored}}));      // of no plane
  CHECK_THROWS(ciuic::BadPayload, decode(longer, {{ciuic::kPlaneZstd, stored + 1}}));  // behind the frame
  Bytes reserved = honest;
  reserved[kFirstBlock] |= 6;  // a type of block that does not exist
  CHECK_THROWS(ciuic::BadPayload, decode(reserved, {{ciuic::kPlaneZstd, stored}}));
  Bytes lengths = honest;  // of codes: they follow the block's and the literals' headers
  std::fill(lengths.begin() + kFirstBlock + 8, lengths.begin() + kFirstBlock + 40, std::uint8_t{0xFF});
  CHECK_THROWS(ciuic::BadPayload, decode(lengths, {{ciuic::kPlaneZstd, stored}}));
  const std::size_t half = kSize / 2;  // of two planes; together they are 16 bytes long, modulo 2^64 alone
  const std::size_t wrapping = std::size_t{16} - half;
  CHECK_THROWS(ciuic::BadPayload, decode(source.bytes(16), {{ciuic::kPlaneRaw, half}, {ciuic::kPlaneZstd, wrapping}}));
}

// What threads keep is their own.
void several_threads() {
  std::vector<std::thread> threads;
  for (unsigned number = 0; number < 4; ++number) {
    threads.emplace_back([number] {
      round_trips(100 + number, 20000);
      hostile_payloads(200 + number, 50);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

void test_codecs() {
  huffman_codes();
  literals();
  for (unsigned seed = 10; seed < 14; ++seed) round_trips(seed, 150000 / kFewer);
  round_trips(14, 600);
  hostile_payloads(20, 4000 / kFewer);
  edges_of_payloads();
  single_lies();
  several_threads();
}
