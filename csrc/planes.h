// Byte planes (docs/format.md, section 5): plane k holds byte k of every item.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ciuic {

// Whether planes are defined for items of this size: 1, 2, 4, 8 or 16 bytes.
bool is_item_size(std::size_t item_size_bytes) noexcept;

// Writes the planes of `count` items one after the other into `planes`, which holds as many bytes as `items`.
// The two do not overlap. Runs on the calling thread, allocates nothing.
void split_planes(const std::uint8_t* items, std::size_t count, std::size_t item_size_bytes,
                  std::uint8_t* planes) noexcept;

// The way back. `planes` points to one pointer for each plane, each to `count` bytes that do not overlap `items`.
void merge_planes(const std::uint8_t* const* planes, std::size_t count, std::size_t item_size_bytes,
                  std::uint8_t* items) noexcept;

// What is done to items before they are split (docs/format.md, section 5). Numbers of the native core alone.
enum class Transform : unsigned { kNone = 0, kXor = 1, kDifference = 2, kRotated = 3 };

// Whether this transform exists for items of this size: the last two for 2, 4 and 8 bytes only.
bool is_transform(unsigned number, std::size_t item_size_bytes) noexcept;

// split_planes of transformed items; the two deltas read `base`, as long as `items`, which else may be null.
void split_transformed(Transform transform, const std::uint8_t* items, const std::uint8_t* base, std::size_t count,
                       std::size_t item_size_bytes, std::uint8_t* planes) noexcept;

// The way back. `base` may not overlap `items`.
void merge_transformed(Transform transform, const std::uint8_t* const* planes, const std::uint8_t* base,
                       std::size_t count, std::size_t item_size_bytes, std::uint8_t* items) noexcept;

}  // namespace ciuic
