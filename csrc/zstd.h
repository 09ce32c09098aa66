// Byte planes as zstd frames. Most frames are written here (literals.h); where a plane has repetitions, and to decode,
// zstd comes from the system's libzstd.so.1, found at run time: no headers are needed to build and nothing is linked.
// Contexts and scratch memory belong to the calling thread and go with it. Callable from any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "planes.h"

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
  Transform transform;          // is_transform
  int level;                    // zstd's, for planes with repetitions; 0: coded byte by byte, and quickly
  unsigned minimum_gain_permille;
};

// What encoding would give in bytes, judged by samples.
std::size_t estimate_planes(const std::uint8_t* raw, const std::uint8_t* base, std::size_t size_bytes,
                            const EncodeParameters& parameters);

// Splits the transformed items and compresses what of each plane shrinks by the minimum gain. Writes the planes'
// payloads to `out`, which has room for `size_bytes` and overlaps neither input; `base` is as long as `raw` where the
// transform needs one, else null. Returns one entry for each plane, or none at all when no plane shrank; `out` then
// holds nothing of use. Throws std::bad_alloc.
std::vector<PlaneEntry> encode_planes(const std::uint8_t* raw, const std::uint8_t* base, std::size_t size_bytes,
                                      const EncodeParameters& parameters, std::uint8_t* out);

// Fills `out` with exactly `raw_size_bytes`. All input is hostile: sizes are checked before memory is allocated, each
// frame must be one whole frame that says and has the plane's length. `base` has `raw_size_bytes` where the transform
// needs one, and does not overlap `out`. Throws BadPayload (`out` is then undefined), std::bad_alloc.
void decode_planes(const std::uint8_t* payload, std::size_t payload_size_bytes, const std::vector<PlaneEntry>& planes,
                   Transform transform, const std::uint8_t* base, std::size_t raw_size_bytes, std::uint8_t* out);

}  // namespace ciuic
