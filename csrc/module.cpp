// The Python face of the native core: the only file that knows Python. Every call releases the GIL while it works.
// ciuic_async/_native.pyi holds the signatures and what they promise.

#include <cerrno>
#include <cstdint>
#include <memory>
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

nb::object encode_planes(nb::handle raw, std::size_t item_size_bytes, int level, unsigned minimum_gain_permille,
                         std::size_t probe_size_bytes) {
  const View data(raw, false);
  check_items(data.size(), item_size_bytes);
  if (data.size() > ciuic::kMaxChunkBytes) throw nb::value_error("chunk is larger than 64 MiB");
  if (minimum_gain_permille > 1000) throw nb::value_error("minimum gain is not in 0..1000");
  const ciuic::EncodeParameters parameters{item_size_bytes, level, minimum_gain_permille, probe_size_bytes};
  std::uint32_t worthwhile = 0;
  {
    const nb::gil_scoped_release released;
    worthwhile = ciuic::probe_planes(data.data(), data.size(), parameters);
  }
  if (worthwhile == 0) return nb::none();
  const auto payload = nb::steal(PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(data.size())));
  if (!payload.is_valid()) throw nb::python_error();
  auto* const out = reinterpret_cast<std::uint8_t*>(PyByteArray_AsString(payload.ptr()));
  std::vector<PlaneEntry> entries;
  {
    const nb::gil_scoped_release released;
    entries = ciuic::encode_planes(data.data(), data.size(), parameters, worthwhile, out);
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

void decode_planes(nb::handle payload, const nb::sequence& planes, nb::handle out) {
  const View data(payload, false);
  const View raw(out, true);
  std::vector<PlaneEntry> entries;
  for (nb::handle plane : planes) {
    const auto [method, stored] =
        std::pair(nb::cast<std::uint8_t>(plane[0]), nb::cast<std::size_t>(plane[1]));
    entries.push_back({method, stored});
  }
  const nb::gil_scoped_release released;
  ciuic::decode_planes(data.data(), data.size(), entries, raw.size(), raw.data());
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

  module.def("copy_many", &copy_many, nb::arg("pairs"), nb::arg("threads"));
  module.def("touch", &touch, nb::arg("address"), nb::arg("size_bytes"));
  module.def("split_planes", &split_planes, nb::arg("items"), nb::arg("planes"), nb::arg("item_size_bytes"));
  module.def("merge_planes", &merge_planes, nb::arg("planes"), nb::arg("items"), nb::arg("item_size_bytes"));
  module.def("zstd_available", &ciuic::zstd_available);
  module.def("zstd_version", &ciuic::zstd_version);
  module.def("encode_planes", &encode_planes, nb::arg("raw"), nb::arg("item_size_bytes"), nb::arg("level"),
             nb::arg("minimum_gain_permille"), nb::arg("probe_size_bytes"));
  module.def("decode_planes", &decode_planes, nb::arg("payload"), nb::arg("planes"), nb::arg("out"));

  nb::class_<PyDirectWriter>(module, "DirectWriter")
      .def(nb::init<int, std::size_t, unsigned, int>(), nb::arg("fd"), nb::arg("buffer_size_bytes"),
           nb::arg("queue_depth"), nb::arg("niceness"))
      .def("append", &PyDirectWriter::add, nb::arg("data"))
      .def("finish", &PyDirectWriter::complete)
      .def("abort", &PyDirectWriter::stop)
      .def_prop_ro("direct_bytes", &PyDirectWriter::direct_bytes);
}
