// Frames in GPU memory: DLPack tensors (torch, PyAV's decoded planes, CuPy) and __cuda_array_interface__.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "cuda_backend.hpp"
#include "gil.hpp"

namespace fastpix2pix::python {

// dmlc/dlpack, ABI before version 1: what a capsule named "dltensor" points to.
struct DLPackTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;  // of the element type
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null: contiguous
  std::uint64_t byte_offset;
};
constexpr int kDLPackCuda = 2, kDLPackCudaManaged = 13, kDLPackUInt = 1;

struct DeviceArgument {
  ConstPlanes planes;
  Owner owner;
};

inline bool lies_on_cuda(const py::handle& object) {
  if (py::hasattr(object, "__dlpack_device__")) {
    const int type = py::int_(py::tuple(object.attr("__dlpack_device__")())[0]);
    return type == kDLPackCuda || type == kDLPackCudaManaged;
  }
  return py::hasattr(object, "__cuda_array_interface__");
}

// A sequence of planes is where its first one is.
inline bool on_cuda(const py::object& frame) {
  if (!py::isinstance<py::tuple>(frame) && !py::isinstance<py::list>(frame)) return lies_on_cuda(frame);
  return py::len(frame) > 0 && lies_on_cuda(frame[py::int_(0)]);
}

// Takes planes from Python, makes `stream` wait for whoever writes them, and holds them until they are `done`.
class DeviceFrame {
 public:
  DeviceFrame(std::uintptr_t stream, int device, std::shared_ptr<Done> done)
      : stream_(stream), device_(device), done_(std::move(done)) {}

  DeviceArgument argument(const py::object& frame, const FrameShape& shape, const char* format) {
    const auto planes = frame_argument<const std::uint8_t>(
        frame, shape, format, [this](const py::object& plane, const char* what) { return memory_of(plane, what); });
    Owner owner(new Done::Objects(std::move(held_)), [done = done_](Done::Objects* held) {
      done->add(std::move(*held));
      delete held;
    });
    return {planes.planes, std::move(owner)};
  }

 private:
  py::buffer_info memory_of(const py::object& plane, const char* what) {
    if (!lies_on_cuda(plane)) {
      throw InvalidInput(std::string(what) + " in host memory beside planes on the GPU; allowed is one kind of both");
    }
    return py::hasattr(plane, "__dlpack__") ? of_dlpack(plane, what) : of_interface(plane, what);
  }

  py::buffer_info of_dlpack(const py::object& plane, const char* what) {
    check_device(py::int_(py::tuple(plane.attr("__dlpack_device__")())[1]), what);
    py::object capsule;
    try {
      on_device(device_, [&] { capsule = shared_here(plane); });
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_NotImplementedError)) {
        throw InvalidInput(std::string(what) + " of type " + type_name(plane) +
                           ": its memory cannot be shared: " + text_of(error));
      }
      // PyAV's decoded planes know no streams: decoders work on the default one
      await_stream(stream_, kLegacyStream, device_);
      capsule = plane.attr("__dlpack__")();
    }
    const auto* tensor = static_cast<const DLPackTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (tensor == nullptr) throw py::error_already_set();
    held_.push_back(std::move(capsule));  // it frees the tensor when it goes, as nobody renamed it
    const bool bytes = tensor->code == kDLPackUInt && tensor->bits == 8 && tensor->lanes == 1;
    std::vector<py::ssize_t> shape(tensor->shape, tensor->shape + tensor->ndim), strides(shape.size());
    const py::ssize_t itemsize = (tensor->bits * tensor->lanes + 7) / 8;
    py::ssize_t contiguous = itemsize;
    for (std::size_t i = shape.size(); i-- > 0; contiguous *= shape[i]) {
      strides[i] = tensor->strides ? tensor->strides[i] * itemsize : contiguous;
    }
    return info(static_cast<std::uint8_t*>(tensor->data) + tensor->byte_offset, bytes ? "B" : "not uint8", itemsize,
                std::move(shape), std::move(strides));
  }

  // torch shares what lies on the current device, of which it has an idea of its own: one where it has made no context
  // yet is the current one in name only.
  py::object shared_here(const py::object& plane) const {
    const auto share = [&]() -> py::object { return plane.attr("__dlpack__")(py::arg("stream") = stream_); };
    const py::str name("torch");
    const auto torch = py::reinterpret_steal<py::object>(PyImport_GetModule(name.ptr()));
    if (!torch || !py::isinstance(plane, torch.attr("Tensor"))) return share();
    const py::object here = torch.attr("cuda").attr("device")(device_);
    here.attr("__enter__")();
    const auto leave = [&] { here.attr("__exit__")(py::none(), py::none(), py::none()); };
    py::object capsule;
    try {
      capsule = share();
    } catch (...) {
      leave();
      throw;
    }
    leave();
    return capsule;
  }

  py::buffer_info of_interface(const py::object& plane, const char* what) {
    const py::dict interface = plane.attr("__cuda_array_interface__");
    const std::string type = py::str(interface["typestr"]);
    const auto pointer = py::tuple(interface["data"])[0].cast<std::uintptr_t>();
    check_device(device_of(reinterpret_cast<const void*>(pointer), device_), what);
    // None: whoever gives it has synchronised
    if (interface.contains("stream") && !interface["stream"].is_none()) {
      await_stream(stream_, interface["stream"].cast<std::uintptr_t>(), device_);
    }
    held_.push_back(plane);
    const py::ssize_t itemsize = std::stoi(type.substr(2));
    auto shape = interface["shape"].cast<std::vector<py::ssize_t>>();
    std::vector<py::ssize_t> strides(shape.size());
    py::ssize_t contiguous = itemsize;
    for (std::size_t i = shape.size(); i-- > 0; contiguous *= shape[i]) strides[i] = contiguous;
    if (interface.contains("strides") && !interface["strides"].is_none()) {
      strides = interface["strides"].cast<std::vector<py::ssize_t>>();
    }
    return info(reinterpret_cast<void*>(pointer), type == "|u1" ? "B" : type, itemsize, std::move(shape),
                std::move(strides));
  }

  static py::buffer_info info(void* data, const std::string& format, py::ssize_t itemsize,
                              std::vector<py::ssize_t> shape, std::vector<py::ssize_t> strides) {
    const auto ndim = static_cast<py::ssize_t>(shape.size());
    return py::buffer_info(data, itemsize, format, ndim, std::move(shape), std::move(strides), true);
  }

  void check_device(int device, const char* what) const {
    if (device == device_) return;
    throw InvalidInput(std::string(what) + " on cuda:" + std::to_string(device) +
                       "; this runtime is on cuda:" + std::to_string(device_));
  }

  static constexpr std::uintptr_t kLegacyStream = 1;  // cudaStreamLegacy

  std::uintptr_t stream_;
  int device_;
  std::shared_ptr<Done> done_;
  Done::Objects held_;
};

}  // namespace fastpix2pix::python
