#include "zstd.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include <dlfcn.h>

#include "literals.h"
#include "planes.h"
#include "segment_format.h"

namespace ciuic {
namespace {

// Own prototypes of zstd's stable interface (zstd.h, since 1.4). The library is never unloaded.
struct Library {
  void* (*create_compressor)() = nullptr;
  std::size_t (*free_compressor)(void*) = nullptr;
  std::size_t (*set_parameter)(void*, int, int) = nullptr;
  std::size_t (*compress)(void*, void*, std::size_t, const void*, std::size_t) = nullptr;
  void* (*create_decompressor)() = nullptr;
  std::size_t (*free_decompressor)(void*) = nullptr;
  std::size_t (*decompress)(void*, void*, std::size_t, const void*, std::size_t) = nullptr;
  unsigned (*is_error)(std::size_t) = nullptr;
  unsigned long long (*frame_content_size)(const void*, std::size_t) = nullptr;
  std::size_t (*frame_compressed_size)(const void*, std::size_t) = nullptr;
  unsigned (*version)() = nullptr;
  bool complete = false;
};

constexpr int kCompressionLevel = 100;         // ZSTD_c_compressionLevel
constexpr int kLiteralCompressionMode = 1002;  // ZSTD_c_literalCompressionMode
constexpr int kLiteralsHuffman = 1;            // ZSTD_lcm_huffman: levels below zero would store literals as they are
constexpr std::uint8_t kFrameMagic[4] = {0x28, 0xB5, 0x2F, 0xFD};  // neither skippable frames nor old formats
constexpr std::size_t kSampleItems = 4096;  // of a chunk, to estimate
constexpr std::size_t kSamplePieces = 16;
constexpr std::size_t kRepetitionBytes = 8 << 10;  // of a plane, in each of four places: repetitions need room
constexpr std::size_t kRepetitionPieces = 4;

template <typename Function>
bool resolve(void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  return function != nullptr;
}

Library open_library() {
  Library library;
  void* handle = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return library;
  library.complete = resolve(handle, "ZSTD_createCCtx", library.create_compressor) &&
                     resolve(handle, "ZSTD_freeCCtx", library.free_compressor) &&
                     resolve(handle, "ZSTD_CCtx_setParameter", library.set_parameter) &&
                     resolve(handle, "ZSTD_compress2", library.compress) &&
                     resolve(handle, "ZSTD_createDCtx", library.create_decompressor) &&
                     resolve(handle, "ZSTD_freeDCtx", library.free_decompressor) &&
                     resolve(handle, "ZSTD_decompressDCtx", library.decompress) &&
                     resolve(handle, "ZSTD_isError", library.is_error) &&
                     resolve(handle, "ZSTD_getFrameContentSize", library.frame_content_size) &&
                     resolve(handle, "ZSTD_findFrameCompressedSize", library.frame_compressed_size) &&
                     resolve(handle, "ZSTD_versionNumber", library.version);
  return library;
}

const Library& library() {
  static const Library opened = open_library();
  return opened;
}

// Memory of one thread that is kept from call to call, because fresh memory is slow. Contents are undefined.
class Scratch {
 public:
  std::uint8_t* at_least(std::size_t size_bytes) {
    if (size_bytes > size_bytes_) {
      memory_.reset();  // give back first: the two together could be too much
      size_bytes_ = 0;
      memory_.reset(new std::uint8_t[size_bytes]);
      size_bytes_ = size_bytes;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<std::uint8_t[]> memory_;
  std::size_t size_bytes_ = 0;
};

// What a thread keeps; freed when it ends.
struct PerThread {
  void* compressor = nullptr;
  void* decompressor = nullptr;
  int level = 0;
  Scratch planes;
  Scratch frame;
  Scratch other;

  ~PerThread() {
    if (compressor != nullptr) library().free_compressor(compressor);
    if (decompressor != nullptr) library().free_decompressor(decompressor);
  }
};

PerThread& per_thread() {
  thread_local PerThread mine;
  return mine;
}

void* compressor_for(int level) {
  PerThread& mine = per_thread();
  if (mine.compressor == nullptr) {
    mine.compressor = library().create_compressor();
    if (mine.compressor == nullptr) throw std::bad_alloc();
    // A library that refuses this writes larger frames, but right ones.
    library().set_parameter(mine.compressor, kLiteralCompressionMode, kLiteralsHuffman);
    library().set_parameter(mine.compressor, kCompressionLevel, level);
    mine.level = level;
  }
  if (mine.level != level) {
    library().set_parameter(mine.compressor, kCompressionLevel, level);
    mine.level = level;
  }
  return mine.compressor;
}

// One frame, or 0 when it does not fit `capacity`.
std::size_t compress(const std::uint8_t* data, std::size_t size, int level, std::uint8_t* out, std::size_t capacity) {
  const std::size_t written = library().compress(compressor_for(level), out, capacity, data, size);
  return library().is_error(written) ? 0 : written;
}

// Whether a sample of the plane gets smaller by matching than by coding its bytes one by one.
bool has_repetitions(const std::uint8_t* plane, std::size_t size) {
  constexpr int kQuickLevel = 1;
  std::uint8_t* const frame = per_thread().other.at_least(kRepetitionBytes);
  const std::size_t pieces = size > kRepetitionPieces * kRepetitionBytes ? kRepetitionPieces : 1;
  const std::size_t piece = std::min(size, kRepetitionBytes);
  std::size_t matched = 0, coded = 0;
  for (std::size_t number = 0; number < pieces; ++number) {
    const std::uint8_t* const from = plane + (pieces == 1 ? 0 : (size - piece) / (pieces - 1) * number);
    const std::size_t found = compress(from, piece, kQuickLevel, frame, piece);
    matched += found != 0 ? found : piece;
    coded += literals_estimate(from, piece, 0);
  }
  return matched * 100 < coded * 99;
}

void decode_frame(const std::uint8_t* frame, std::size_t stored, std::size_t plane_size, std::uint8_t* out,
                  std::size_t number) {
  const std::string name = "zstd plane " + std::to_string(number);
  if (stored < sizeof(kFrameMagic) || std::memcmp(frame, kFrameMagic, sizeof(kFrameMagic)) != 0) {
    throw BadPayload(name + " does not start with a zstd frame");
  }
  if (library().frame_content_size(frame, stored) != plane_size) {
    throw BadPayload(name + " does not say that it has " + std::to_string(plane_size) + " bytes");
  }
  if (library().frame_compressed_size(frame, stored) != stored) {
    throw BadPayload(name + " is not exactly one whole frame of " + std::to_string(stored) + " bytes");
  }
  PerThread& mine = per_thread();
  if (mine.decompressor == nullptr) mine.decompressor = library().create_decompressor();
  if (mine.decompressor == nullptr) throw std::bad_alloc();
  if (library().decompress(mine.decompressor, out, plane_size, frame, stored) != plane_size) {
    throw BadPayload(name + " does not decode to " + std::to_string(plane_size) + " bytes");
  }
}

}  // namespace

bool zstd_available() noexcept { return library().complete; }

unsigned zstd_version() noexcept { return zstd_available() ? library().version() : 0; }

std::size_t estimate_planes(const std::uint8_t* raw, const std::uint8_t* base, std::size_t size_bytes,
                            const EncodeParameters& parameters) {
  const std::size_t item = parameters.item_size_bytes;
  const std::size_t count = size_bytes / item;
  if (count == 0) return 0;
  const std::size_t pieces = count > kSampleItems ? kSamplePieces : 1;
  const std::size_t piece = count > kSampleItems ? kSampleItems / kSamplePieces : count;
  const std::size_t sampled = pieces * piece;
  std::uint8_t* const gathered = per_thread().planes.at_least(3 * sampled * item);
  std::uint8_t* const gathered_base = gathered + sampled * item;
  std::uint8_t* const planes = gathered_base + sampled * item;
  for (std::size_t number = 0; number < pieces; ++number) {
    // Evenly from the first item to the last.
    const std::size_t start = pieces == 1 ? 0 : (count - piece) / (pieces - 1) * number;
    std::memcpy(gathered + number * piece * item, raw + start * item, piece * item);
    if (base != nullptr) std::memcpy(gathered_base + number * piece * item, base + start * item, piece * item);
  }
  split_transformed(parameters.transform, gathered, base != nullptr ? gathered_base : nullptr, sampled, item, planes);
  std::size_t estimate = 0;
  for (std::size_t plane = 0; plane < item; ++plane) {
    estimate += literals_estimate(planes + plane * sampled, sampled, parameters.minimum_gain_permille);
  }
  return static_cast<std::size_t>(static_cast<double>(estimate) * static_cast<double>(count) /
                                  static_cast<double>(sampled));
}

std::vector<PlaneEntry> encode_planes(const std::uint8_t* raw, const std::uint8_t* base, std::size_t size_bytes,
                                      const EncodeParameters& parameters, std::uint8_t* out) {
  const std::size_t item = parameters.item_size_bytes;
  const std::size_t count = size_bytes / item;
  std::vector<PlaneEntry> entries;
  if (count == 0) return entries;
  // Planes are split into their final buffer; what shrinks makes those behind it move up.
  const std::uint8_t* planes = raw;
  if (item > 1 || parameters.transform != Transform::kNone) {
    split_transformed(parameters.transform, raw, base, count, item, out);
    planes = out;
  }
  const bool quickly = parameters.level == 0;
  std::uint8_t* to = out;
  bool shrank = false;
  for (std::size_t plane = 0; plane < item; ++plane) {
    const std::uint8_t* const from = planes + plane * count;
    std::uint8_t* const coded = per_thread().frame.at_least(literals_bound(count));
    const std::uint8_t* frame = coded;
    std::size_t stored = compress_literals(from, count, parameters.minimum_gain_permille, quickly, coded);
    if (!quickly && zstd_available() && has_repetitions(from, count)) {
      std::uint8_t* const other = per_thread().other.at_least(count);
      const std::size_t found = compress(from, count, parameters.level, other, (stored != 0 ? stored : count) - 1);
      if (found != 0) {
        frame = other;
        stored = found;
      }
    }
    if (stored != 0) {
      std::memcpy(to, frame, stored);
      entries.push_back({kPlaneZstd, stored});
      shrank = true;
    } else {
      if (to != from) std::memmove(to, from, count);
      entries.push_back({kPlaneRaw, count});
    }
    to += entries.back().stored_size_bytes;
  }
  if (!shrank) entries.clear();
  return entries;
}

void decode_planes(const std::uint8_t* payload, std::size_t payload_size_bytes, const std::vector<PlaneEntry>& planes,
                   Transform transform, const std::uint8_t* base, std::size_t raw_size_bytes, std::uint8_t* out) {
  const std::size_t item = planes.size();
  if (!is_item_size(item) || raw_size_bytes % item != 0 || raw_size_bytes > kMaxChunkBytes) {
    throw BadPayload(std::to_string(raw_size_bytes) + " bytes cannot have " + std::to_string(item) + " planes");
  }
  const std::size_t count = raw_size_bytes / item;
  std::size_t rest = payload_size_bytes;
  std::size_t frames = 0;
  for (std::size_t number = 0; number < item; ++number) {
    const PlaneEntry& entry = planes[number];
    if (entry.stored_size_bytes > rest) throw BadPayload("planes are longer than their payload");
    if (entry.method != kPlaneRaw && entry.method != kPlaneZstd) throw BadPayload("unknown plane method");
    if (entry.method == kPlaneRaw && entry.stored_size_bytes != count) {
      throw BadPayload("raw plane " + std::to_string(number) + " has another length than its record says");
    }
    frames += entry.method == kPlaneZstd ? 1 : 0;
    rest -= entry.stored_size_bytes;
  }
  if (rest != 0) throw BadPayload("planes are shorter than their payload");
  if (frames > 0 && !zstd_available()) throw std::runtime_error("libzstd.so.1 is not available");

  const bool in_place = item == 1 && transform == Transform::kNone;
  std::uint8_t* decoded = frames > 0 && !in_place ? per_thread().planes.at_least(frames * count) : nullptr;
  const std::uint8_t* sources[kMaxItemBytes];
  const std::uint8_t* from = payload;
  for (std::size_t number = 0; number < item; ++number) {
    const PlaneEntry& entry = planes[number];
    sources[number] = from;
    if (entry.method == kPlaneZstd) {
      std::uint8_t* const target = in_place ? out : decoded;
      decode_frame(from, entry.stored_size_bytes, count, target, number);
      sources[number] = target;
      decoded += in_place ? 0 : count;
    }
    from += entry.stored_size_bytes;
  }
  if (sources[0] != out) merge_transformed(transform, sources, base, count, item, out);
}

}  // namespace ciuic
