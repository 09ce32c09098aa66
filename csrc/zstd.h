// zstd from the system's libzstd.so.1, found at run time: no headers are needed to build and nothing is linked.
// Contexts and scratch memory belong to the calling thread and go with it. Callable from any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace ciuic {

// Bytes that claim to be planes and are not. Nothing was written beyond the buffers given.
struct BadPayload : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One line of a record's plane directory.
struct PlaneEntry {
  std::uint8_t method;  // kPlaneRaw or kPlaneZstd
  std::size_t stored_size_bytes;
};

bool zstd_available() noexcept;

// As zstd counts: major * 10000 + minor * 100 + patch; 0 where it is not available.
unsigned zstd_version() noexcept;

struct EncodeParameters {
  std::size_t item_size_bytes;  // is_item_size, and a divisor of the raw size
  int level;
  unsigned minimum_gain_permille;
  std::size_t probe_size_bytes;
};

// Which planes are worth compressing: bit k is set when a sample of plane k, taken from several places, shrinks by the
// minimum gain. Reads only the sample. 0 where zstd is not available.
std::uint32_t probe_planes(const std::uint8_t* raw, std::size_t size_bytes, const EncodeParameters& parameters);

// Writes the planes' payloads to `out`, which has room for `size_bytes` and does not overlap `raw`. Planes outside
// `worthwhile`, and those that do not shrink, are stored raw. Returns one entry for each plane, or none at all when
// no plane shrank; `out` then holds nothing of use. Throws std::bad_alloc.
std::vector<PlaneEntry> encode_planes(const std::uint8_t* raw, std::size_t size_bytes,
                                      const EncodeParameters& parameters, std::uint32_t worthwhile, std::uint8_t* out);

// Fills `out` with exactly `raw_size_bytes`. All input is hostile: sizes are checked before memory is allocated, each
// frame must be one whole frame that says and has the plane's length. Throws BadPayload (`out` is then undefined),
// std::bad_alloc.
void decode_planes(const std::uint8_t* payload, std::size_t payload_size_bytes, const std::vector<PlaneEntry>& planes,
                   std::size_t raw_size_bytes, std::uint8_t* out);

}  // namespace ciuic
