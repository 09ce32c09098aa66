// planes.h: the planes are those of the specification, and every transform comes back.
#include "../planes.h"
#include "checks.h"

namespace {

constexpr std::size_t kItemSizes[] = {1, 2, 4, 8, 16};
constexpr std::size_t kCounts[] = {0, 1, 2, 31, 32, 33, 63, 65, 2047, 2048, 2049, 5001};

void splits_and_merges(Source& source, std::size_t item, std::size_t count) {
  const Bytes content = source.bytes(item * count);
  const Guarded items(content);
  Guarded planes(content.size());
  ciuic::split_planes(items.data(), count, item, planes.data());
  for (std::size_t plane = 0; plane < item; ++plane) {
    for (std::size_t at = 0; at < count; ++at) CHECK(planes.data()[plane * count + at] == content[at * item + plane]);
  }
  const std::uint8_t* sources[16];
  for (std::size_t plane = 0; plane < item; ++plane) sources[plane] = planes.data() + plane * count;
  Guarded back(content.size());
  ciuic::merge_planes(sources, count, item, back.data());
  CHECK(back.holds(content));
}

void transforms(Source& source, std::size_t item, std::size_t count) {
  for (unsigned number = 0; number <= 4; ++number) {
    if (!ciuic::is_transform(number, item)) {
      CHECK(number > 1);
      continue;
    }
    const auto how = static_cast<ciuic::Transform>(number);
    const Bytes content = source.bytes(item * count);
    Bytes other = content;
    for (std::size_t at = 0; at < other.size(); at += 5) other[at] = static_cast<std::uint8_t>(source.below(256));
    const Guarded items(content);
    const Guarded base(other);
    const bool delta = how == ciuic::Transform::kXor || how == ciuic::Transform::kDifference;
    const std::uint8_t* const given = delta ? base.data() : nullptr;
    Guarded planes(content.size());
    ciuic::split_transformed(how, items.data(), given, count, item, planes.data());
    const std::uint8_t* sources[16];
    for (std::size_t plane = 0; plane < item; ++plane) sources[plane] = planes.data() + plane * count;
    Guarded back(content.size());
    ciuic::merge_transformed(how, sources, given, count, item, back.data());
    CHECK(back.holds(content));
  }
}

}  // namespace

void test_planes() {
  Source source(5);
  for (const std::size_t item : kItemSizes) {
    CHECK(ciuic::is_item_size(item));
    for (const std::size_t count : kCounts) {
      splits_and_merges(source, item, count);
      transforms(source, item, count);
    }
  }
  for (const std::size_t item : {0U, 3U, 5U, 15U, 17U, 32U}) CHECK(!ciuic::is_item_size(item));
}
