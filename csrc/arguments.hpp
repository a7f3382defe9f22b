// Python arguments as what the core takes: names, frames and tensors. Raises InvalidInput.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <optional>
#include <string>
#include <utility>

#include "frame.hpp"

namespace fastpix2pix::python {

namespace py = pybind11;

template <class E, std::size_t N>
using Names = std::array<std::pair<const char*, E>, N>;

template <class E, std::size_t N>
E named(const char* what, const std::string& given, const Names<E, N>& names) {
  std::string allowed;
  for (const auto& [name, value] : names) {
    if (given == name) return value;
    allowed += (allowed.empty() ? "" : ", ") + std::string(name);
  }
  throw InvalidInput(std::string(what) + " = '" + given + "'; allowed are " + allowed);
}

template <class E, std::size_t N>
const char* name_of(E value, const Names<E, N>& names) {
  for (const auto& [name, named] : names) {
    if (named == value) return name;
  }
  return "?";
}

inline std::string described(const py::buffer_info& info) {
  std::string text = "[";
  for (py::ssize_t i = 0; i < info.ndim; ++i) text += (i ? ", " : "") + std::to_string(info.shape[i]);
  return text + "] of format '" + info.format + "'";
}

inline std::string type_name(const py::handle& object) {
  return std::string(py::str(py::type::of(object).attr("__name__")));
}

// "ValueError: seven is odd", without the traceback of error.what().
inline std::string text_of(const py::error_already_set& error) {
  return type_name(error.value()) + ": " + std::string(py::str(error.value()));
}

// Memory of a Python object, kept alive and locked for as long as this lives.
inline py::buffer_info buffer_of(py::object object, bool writable, const char* what) {
  if (!PyObject_CheckBuffer(object.ptr()) && py::hasattr(object, "__dlpack__")) {
    try {  // a tensor on the CPU; shares its memory
      object = py::module_::import("numpy").attr("from_dlpack")(object);
    } catch (py::error_already_set& error) {
      throw InvalidInput(std::string(what) + " of type " + type_name(object) +
                         ": its memory cannot be shared: " + text_of(error));
    }
  }
  try {
    return py::reinterpret_borrow<py::buffer>(object).request(writable);
  } catch (py::error_already_set& error) {
    throw InvalidInput(std::string(what) + " of type " + type_name(object) +
                       (writable ? ": it must be writable memory, such as a numpy array"
                                 : ": it must be memory, such as a numpy array or bytes"));
  }
}

// The planes of a frame and the locks on their memory.
template <class Byte>
struct FrameArgument {
  PlanesOf<Byte> planes;
  std::array<std::optional<py::buffer_info>, 3> held;
};

// One plane: rows of `width` bytes that are whole in themselves, at any distance from each other.
inline bool is_plane(const py::buffer_info& info, py::ssize_t rows, py::ssize_t width) {
  if (info.format != "B" || info.ndim < 2 || info.shape[0] != rows) return false;
  py::ssize_t bytes = 1;
  for (py::ssize_t i = info.ndim - 1; i >= 1; --i) {
    if (info.shape[i] != 1 && info.strides[i] != bytes) return false;
    bytes *= info.shape[i];
  }
  return bytes == width;
}

inline bool is_contiguous(const py::buffer_info& info) {
  py::ssize_t bytes = info.itemsize;
  for (py::ssize_t i = info.ndim - 1; i >= 0; --i) {
    if (info.shape[i] != 1 && info.strides[i] != bytes) return false;
    bytes *= info.shape[i];
  }
  return true;
}

// A frame is one contiguous buffer with its planes one after the other, or a sequence of planes, of which a packed
// format has one: [rows, bytes], [rows, pixels, channels]. memory_of(object, what) says where an object lies.
template <class Byte, class MemoryOf>
FrameArgument<Byte> frame_argument(const py::object& object, const FrameShape& shape, const char* format,
                                   const MemoryOf& memory_of) {
  const int count = plane_count(shape.format);
  FrameArgument<Byte> frame;
  const bool sequence = py::isinstance<py::tuple>(object) || py::isinstance<py::list>(object);
  if (sequence && static_cast<int>(py::len(object)) != count) {
    throw InvalidInput("a frame of " + std::to_string(py::len(object)) + " planes; " + format + " has " +
                       std::to_string(count));
  }
  if (!sequence) {
    frame.held[0] = memory_of(object, "a frame");
    const py::buffer_info& info = *frame.held[0];
    if (count > 1 || info.ndim < 2) {
      const auto bytes = static_cast<py::ssize_t>(frame_bytes(shape));
      if (info.format != "B" || info.size != bytes || !is_contiguous(info)) {
        throw InvalidInput("a frame " + described(info) + "; allowed are " + std::to_string(bytes) +
                           " contiguous uint8 (" + format + " " + std::to_string(shape.width) + "x" +
                           std::to_string(shape.height) + "), or a tuple of planes");
      }
      const Planes planes = packed_planes(shape, static_cast<std::uint8_t*>(info.ptr));
      for (int p = 0; p < 3; ++p) frame.planes.data[p] = planes.data[p], frame.planes.stride[p] = planes.stride[p];
      return frame;
    }
  }
  for (int p = 0; p < count; ++p) {
    if (sequence) frame.held[p] = memory_of(object[py::int_(p)], "a plane");
    const py::buffer_info& info = *frame.held[p];
    const py::ssize_t rows = plane_rows(shape, p), width = plane_width(shape, p);
    if (!is_plane(info, rows, width)) {
      throw InvalidInput("plane " + std::to_string(p) + " " + described(info) + "; allowed are " +
                         std::to_string(rows) + " rows of " + std::to_string(width) + " uint8 each (" + format + " " +
                         std::to_string(shape.width) + "x" + std::to_string(shape.height) + ")");
    }
    frame.planes.data[p] = static_cast<Byte*>(info.ptr);
    frame.planes.stride[p] = info.strides[0];
  }
  return frame;
}

// The same of host memory, which it must be possible to write where Byte is not const.
template <class Byte>
FrameArgument<Byte> frame_argument(const py::object& object, const FrameShape& shape, const char* format) {
  return frame_argument<Byte>(object, shape, format, [](const py::object& memory, const char* what) {
    return buffer_of(memory, !std::is_const_v<Byte>, what);
  });
}

// A contiguous [3, H, W] or [H, W, 3] (or one of them in a batch of 1) of the type the shape names.
inline py::buffer_info tensor_argument(const py::object& object, const TensorShape& shape, bool writable) {
  py::buffer_info info = buffer_of(object, writable, "a network tensor");
  const std::array<py::ssize_t, 3> last = {shape.height, shape.width, 3}, first = {3, shape.height, shape.width};
  const auto& wanted = shape.channels_last ? last : first;
  const bool batch = info.ndim == 4 && info.shape[0] == 1;
  bool fits = (info.ndim == 3 || batch) && info.format == (shape.half ? "e" : "f") && is_contiguous(info);
  for (int i = 0; fits && i < 3; ++i) fits = info.shape[i + batch] == wanted[i];
  if (fits) return info;
  throw InvalidInput("a network tensor " + described(info) + "; allowed is a contiguous " +
                     (shape.half ? "float16 [" : "float32 [") + std::to_string(wanted[0]) + ", " +
                     std::to_string(wanted[1]) + ", " + std::to_string(wanted[2]) + "]");
}

}  // namespace fastpix2pix::python
