// The Python face of the native core: the only file that knows Python. Every call releases the GIL while it works.
// ciuic_async/_native.pyi holds the signatures and what they promise.

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>

#include "copy.h"
#include "planes.h"
#include "segment_format.h"
#include "writer.h"
#include "zstd.h"

namespace nb = nanobind;

namespace {

using ciuic::CopyRange;
using ciuic::PlaneEntry;

// A contiguous buffer of any Python object, held for the time of a call. Made and destroyed under the GIL.
class View {
 public:
  View(nb::handle object, bool writable) {
    if (PyObject_GetBuffer(object.ptr(), &buffer_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) {
      throw nb::python_error();
    }
  }
  ~View() { PyBuffer_Release(&buffer_); }
  View(const View&) = delete;
  View& operator=(const View&) = delete;

  std::uint8_t* data() const { return static_cast<std::uint8_t*>(buffer_.buf); }
  std::size_t size() const { return static_cast<std::size_t>(buffer_.len); }

 private:
  Py_buffer buffer_;
};

void check_items(std::size_t size_bytes, std::size_t item_size_bytes) {
  if (!ciuic::is_item_size(item_size_bytes)) throw nb::value_error("item size is not 1, 2, 4, 8 or 16 bytes");
  if (size_bytes % item_size_bytes != 0) throw nb::value_error("buffer is not a whole number of items");
}

void check_apart(const View& source, const View& destination) {
  if (source.size() != destination.size()) throw nb::value_error("buffers have different lengths");
  if (source.data() < destination.data() + destination.size() && destination.data() < source.data() + source.size()) {
    throw nb::value_error("buffers overlap");
  }
}

void copy_many(const nb::list& pairs, unsigned threads) {
  if (threads == 0) throw nb::value_error("threads must be at least 1");
  std::vector<CopyRange> ranges;
  ranges.reserve(nb::len(pairs));
  for (nb::handle pair : pairs) {
    if (!PyTuple_Check(pair.ptr()) || PyTuple_Size(pair.ptr()) != 3) {
      throw nb::value_error("expected tuples (destination, source, size_bytes)");
    }
    ranges.push_back({reinterpret_cast<char*>(nb::cast<std::uintptr_t>(pair[0])),
                      reinterpret_cast<const char*>(nb::cast<std::uintptr_t>(pair[1])),
                      nb::cast<std::size_t>(pair[2])});
  }
  const nb::gil_scoped_release released;
  ciuic::copy_many(ranges, threads);
}

// A column of numbers of 64 bits, as an array of Python or numpy holds them.
class Column {
 public:
  explicit Column(nb::handle object) : view_(object, false) {
    if (view_.size() % sizeof(std::uint64_t) != 0) throw nb::value_error("a column is no array of 64-bit numbers");
  }
  std::size_t size() const { return view_.size() / sizeof(std::uint64_t); }
  std::uint64_t operator[](std::size_t row) const {
    std::uint64_t value = 0;
    std::memcpy(&value, view_.data() + row * sizeof value, sizeof value);
    return value;
  }

 private:
  View view_;
};

std::vector<CopyRange> ranges_of(nb::handle destinations, nb::handle sources, nb::handle sizes_bytes) {
  const Column to(destinations);
  const Column from(sources);
  const Column sizes(sizes_bytes);
  if (to.size() != from.size() || to.size() != sizes.size()) throw nb::value_error("columns have different lengths");
  const nb::gil_scoped_release released;
  std::vector<CopyRange> ranges;
  ranges.reserve(to.size());
  for (std::size_t row = 0; row < to.size(); ++row) {
    ranges.push_back({reinterpret_cast<char*>(to[row]), reinterpret_cast<const char*>(from[row]), sizes[row]});
  }
  return ranges;
}

void copy_columns(nb::handle destinations, nb::handle sources, nb::handle sizes_bytes, unsigned threads) {
  if (threads == 0) throw nb::value_error("threads must be at least 1");
  const std::vector<CopyRange> ranges = ranges_of(destinations, sources, sizes_bytes);
  const nb::gil_scoped_release released;
  ciuic::copy_many(ranges, threads);
}

// Copies that are made part by part, each by a thread that reads the bytes at once.
class PyTwiceCopier {
 public:
  PyTwiceCopier(nb::handle destinations, nb::handle sources, nb::handle sizes_bytes)
      : ranges_(ranges_of(destinations, sources, sizes_bytes)) {
    for (std::size_t row = 1; row < ranges_.size(); ++row) {
      const CopyRange& before = ranges_[row - 1];
      if (ranges_[row].destination < before.destination + before.size_bytes) {
        throw nb::value_error("destinations do not rise, or overlap");
      }
    }
  }

  void copy(std::uintptr_t destination, nb::handle twin) const {
    const View also(twin, true);
    bool complete = false;
    {
      const nb::gil_scoped_release released;
      complete = ciuic::copy_twice(ranges_, reinterpret_cast<char*>(destination), also.size(),
                                   reinterpret_cast<char*>(also.data()));
    }
    if (!complete) throw nb::value_error("the rows do not cover these bytes");
  }

 private:
  std::vector<CopyRange> ranges_;
};

void touch(std::uintptr_t address, std::size_t size_bytes) {
  const nb::gil_scoped_release released;
  ciuic::touch(reinterpret_cast<char*>(address), size_bytes);
}

void split_planes(nb::handle source, nb::handle destination, std::size_t item_size_bytes) {
  const View items(source, false);
  const View planes(destination, true);
  check_items(items.size(), item_size_bytes);
  check_apart(items, planes);
  const nb::gil_scoped_release released;
  ciuic::split_planes(items.data(), items.size() / item_size_bytes, item_size_bytes, planes.data());
}

void merge_planes(nb::handle source, nb::handle destination, std::size_t item_size_bytes) {
  const View planes(source, false);
  const View items(destination, true);
  check_items(planes.size(), item_size_bytes);
  check_apart(planes, items);
  const std::size_t count = planes.size() / item_size_bytes;
  const std::uint8_t* sources[ciuic::kMaxItemBytes];
  for (std::size_t plane = 0; plane < item_size_bytes; ++plane) sources[plane] = planes.data() + plane * count;
  const nb::gil_scoped_release released;
  ciuic::merge_planes(sources, count, item_size_bytes, items.data());
}

ciuic::Transform check_transform(unsigned transform, std::size_t item_size_bytes) {
  if (!ciuic::is_transform(transform, item_size_bytes)) throw nb::value_error("no such transform of these items");
  return static_cast<ciuic::Transform>(transform);
}

// The other bytes of a delta, or null where the transform needs none.
const std::uint8_t* check_base(const std::optional<View>& base, ciuic::Transform transform, std::size_t size_bytes) {
  const bool needed = transform == ciuic::Transform::kXor || transform == ciuic::Transform::kDifference;
  if (needed != base.has_value()) throw nb::value_error("this transform does not go with or without a base");
  if (needed && base->size() != size_bytes) throw nb::value_error("the base has another length");
  return needed ? base->data() : nullptr;
}

void hold(std::optional<View>& view, nb::handle object) {
  if (!object.is_none()) view.emplace(object, false);
}

struct EncodeArguments {
  EncodeArguments(nb::handle raw, nb::handle base_or_none, std::size_t item_size_bytes, unsigned transform, int level,
                  unsigned minimum_gain_permille)
      : data(raw, false) {
    check_items(data.size(), item_size_bytes);
    if (data.size() > ciuic::kMaxChunkBytes) throw nb::value_error("chunk is larger than 64 MiB");
    if (minimum_gain_permille > 1000) throw nb::value_error("minimum gain is not in 0..1000");
    parameters = {item_size_bytes, check_transform(transform, item_size_bytes), level, minimum_gain_permille};
    hold(held_base, base_or_none);
    base = check_base(held_base, parameters.transform, data.size());
  }

  View data;
  std::optional<View> held_base;
  const std::uint8_t* base = nullptr;
  ciuic::EncodeParameters parameters{};
};

std::size_t estimate_planes(nb::handle raw, nb::handle base, std::size_t item_size_bytes, unsigned transform,
                            unsigned minimum_gain_permille) {
  const EncodeArguments given(raw, base, item_size_bytes, transform, 0, minimum_gain_permille);
  const nb::gil_scoped_release released;
  return ciuic::estimate_planes(given.data.data(), given.base, given.data.size(), given.parameters);
}

nb::object encode_planes(nb::handle raw, nb::handle base, std::size_t item_size_bytes, unsigned transform, int level,
                         unsigned minimum_gain_permille) {
  const EncodeArguments given(raw, base, item_size_bytes, transform, level, minimum_gain_permille);
  const auto room = static_cast<Py_ssize_t>(given.data.size());
  const auto payload = nb::steal(PyByteArray_FromStringAndSize(nullptr, room));
  if (!payload.is_valid()) throw nb::python_error();
  auto* const out = reinterpret_cast<std::uint8_t*>(PyByteArray_AsString(payload.ptr()));
  std::vector<PlaneEntry> entries;
  {
    const nb::gil_scoped_release released;
    entries = ciuic::encode_planes(given.data.data(), given.base, given.data.size(), given.parameters, out);
  }
  if (entries.empty()) return nb::none();
  nb::list directory;
  std::size_t stored = 0;
  for (const PlaneEntry& entry : entries) {
    directory.append(nb::make_tuple(static_cast<unsigned>(entry.method), entry.stored_size_bytes));
    stored += entry.stored_size_bytes;
  }
  if (PyByteArray_Resize(payload.ptr(), static_cast<Py_ssize_t>(stored)) != 0) throw nb::python_error();
  return nb::make_tuple(directory, payload);
}

void decode_planes(nb::handle payload, const nb::sequence& planes, nb::handle base, unsigned transform,
                   nb::handle out) {
  const View data(payload, false);
  const View raw(out, true);
  std::optional<View> held_base;
  hold(held_base, base);
  std::vector<PlaneEntry> entries;
  for (nb::handle plane : planes) {
    const auto [method, stored] =
        std::pair(nb::cast<std::uint8_t>(plane[0]), nb::cast<std::size_t>(plane[1]));
    entries.push_back({method, stored});
  }
  const ciuic::Transform how = check_transform(transform, entries.size());
  const std::uint8_t* const other = check_base(held_base, how, raw.size());
  const nb::gil_scoped_release released;
  ciuic::decode_planes(data.data(), data.size(), entries, how, other, raw.size(), raw.data());
}

// Ends its thread without the GIL, also when Python drops it.
class PyDirectWriter : public ciuic::DirectWriter {
 public:
  using DirectWriter::DirectWriter;
  ~PyDirectWriter() { stop(); }

  void add(nb::handle data) {
    const View view(data, false);
    const nb::gil_scoped_release released;
    append(view.data(), view.size());
  }

  void add_lent(nb::handle data) {
    const View view(data, false);
    const nb::gil_scoped_release released;
    lend(view.data(), view.size());
  }

  void wait() {
    const nb::gil_scoped_release released;
    drain();
  }

  std::uint64_t complete() {
    const nb::gil_scoped_release released;
    return finish();
  }

  void stop() {
    const nb::gil_scoped_release released;
    abort();
  }
};

void translate_write_error(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const ciuic::WriteError& error) {
    errno = error.number;
    PyErr_SetFromErrno(PyExc_OSError);
  }
}

void translate_bad_payload(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const ciuic::BadPayload& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  }
}

}  // namespace

NB_MODULE(_native, module) {
  nb::register_exception_translator(translate_write_error);
  nb::register_exception_translator(translate_bad_payload);

  module.attr("DIRECT_ALIGNMENT_BYTES") = ciuic::kDirectAlignmentBytes;
  module.attr("MAX_CHUNK_BYTES") = ciuic::kMaxChunkBytes;
  module.attr("MAX_ITEM_BYTES") = ciuic::kMaxItemBytes;
  module.attr("PLANE_RAW") = static_cast<unsigned>(ciuic::kPlaneRaw);
  module.attr("PLANE_ZSTD") = static_cast<unsigned>(ciuic::kPlaneZstd);
  module.attr("TRANSFORM_NONE") = static_cast<unsigned>(ciuic::Transform::kNone);
  module.attr("TRANSFORM_XOR") = static_cast<unsigned>(ciuic::Transform::kXor);
  module.attr("TRANSFORM_DIFFERENCE") = static_cast<unsigned>(ciuic::Transform::kDifference);
  module.attr("TRANSFORM_ROTATED") = static_cast<unsigned>(ciuic::Transform::kRotated);

  module.def("copy_many", &copy_many, nb::arg("pairs"), nb::arg("threads"));
  module.def("copy_columns", &copy_columns, nb::arg("destinations"), nb::arg("sources"), nb::arg("sizes_bytes"),
             nb::arg("threads"));
  module.def("touch", &touch, nb::arg("address"), nb::arg("size_bytes"));
  module.def("split_planes", &split_planes, nb::arg("items"), nb::arg("planes"), nb::arg("item_size_bytes"));
  module.def("merge_planes", &merge_planes, nb::arg("planes"), nb::arg("items"), nb::arg("item_size_bytes"));
  module.def("zstd_available", &ciuic::zstd_available);
  module.def("zstd_version", &ciuic::zstd_version);
  module.def("estimate_planes", &estimate_planes, nb::arg("raw"), nb::arg("base").none(), nb::arg("item_size_bytes"),
             nb::arg("transform"), nb::arg("minimum_gain_permille"));
  module.def("encode_planes", &encode_planes, nb::arg("raw"), nb::arg("base").none(), nb::arg("item_size_bytes"),
             nb::arg("transform"), nb::arg("level"), nb::arg("minimum_gain_permille"));
  module.def("decode_planes", &decode_planes, nb::arg("payload"), nb::arg("planes"), nb::arg("base").none(),
             nb::arg("transform"), nb::arg("out"));

  nb::class_<PyTwiceCopier>(module, "TwiceCopier")
      .def(nb::init<nb::handle, nb::handle, nb::handle>(), nb::arg("destinations"), nb::arg("sources"),
           nb::arg("sizes_bytes"))
      .def("copy", &PyTwiceCopier::copy, nb::arg("destination"), nb::arg("twin"));

  nb::class_<PyDirectWriter>(module, "DirectWriter")
      .def(nb::init<int, std::size_t, unsigned, int>(), nb::arg("fd"), nb::arg("buffer_size_bytes"),
           nb::arg("queue_depth"), nb::arg("niceness"))
      .def("append", &PyDirectWriter::add, nb::arg("data"))
      .def("lend", &PyDirectWriter::add_lent, nb::arg("data"))
      .def("drain", &PyDirectWriter::wait)
      .def("finish", &PyDirectWriter::complete)
      .def("abort", &PyDirectWriter::stop)
      .def_prop_ro("direct_bytes", &PyDirectWriter::direct_bytes)
      .def_prop_ro("busy_s", &PyDirectWriter::busy_s);
}
