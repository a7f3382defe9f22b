// Engines written in Python as what a backend calls, from any thread.
#pragma once

#include <pybind11/numpy.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "cpu_backend.hpp"
#ifdef FASTPIX2PIX_CUDA
#include "cuda_backend.hpp"
#endif

namespace fastpix2pix::python {

// A Python object that other threads may drop: the last reference goes with the GIL held.
inline std::shared_ptr<py::object> shared(py::object object) {
  return {new py::object(std::move(object)), [](py::object* held) {
            py::gil_scoped_acquire acquire;
            delete held;
          }};
}

// Calls Python and turns what it raises into Failed, with the GIL held around all of it.
template <class Call>
void call_python(const Call& call) {
  py::gil_scoped_acquire acquire;
  try {
    call();
  } catch (py::error_already_set& error) {
    throw Failed("the engine failed: " + text_of(error));
  }
}

inline py::array new_tensor(const TensorShape& shape) {
  const std::vector<py::ssize_t> last = {shape.height, shape.width, 3}, first = {3, shape.height, shape.width};
  return py::array(py::dtype(shape.half ? "float16" : "float32"), shape.channels_last ? last : first);
}

// engine(input, output) over numpy arrays, one pair per slot; the engine may keep them, they own their memory.
inline Engine array_engine(py::object engine, const InputSpec& input, const OutputSpec& output, int slots,
                           std::vector<SlotTensors>& tensors) {
  py::list pairs;
  for (int i = 0; i < slots; ++i) {
    py::array in = new_tensor(input.network), out = new_tensor(output.network);
    tensors.push_back({in.mutable_data(), out.mutable_data()});
    pairs.append(py::make_tuple(in, out));
  }
  return [call = shared(std::move(engine)), arrays = shared(std::move(pairs))](int slot, const void*, void*, void*) {
    call_python([&] {
      const py::tuple pair = (*arrays)[py::int_(slot)];
      (*call)(pair[0], pair[1]);
    });
  };
}

#ifdef FASTPIX2PIX_CUDA
inline std::size_t address(const void* pointer) { return reinterpret_cast<std::size_t>(pointer); }

// engine(input, output, stream) with addresses.
inline Engine pointer_engine(py::object engine) {
  return [call = shared(std::move(engine))](int, const void* in, void* out, void* stream) {
    call_python([&] { (*call)(address(in), address(out), address(stream)); });
  };
}

// Python's garbage collector may free what CUDA work of its own hangs on, in the middle of a capture.
class CollectorOff {
 public:
  CollectorOff() : was_on_(PyGC_Disable() != 0) {}
  ~CollectorOff() {
    if (was_on_) PyGC_Enable();
  }
  CollectorOff(const CollectorOff&) = delete;
  CollectorOff& operator=(const CollectorOff&) = delete;

 private:
  bool was_on_;
};

// Keeps Python's threads from recording graphs of their own (fastpix2pix/capture.py). Where that is not imported, none
// does.
class Recording {
 public:
  Recording() {
    const py::str name("fastpix2pix.capture");
    const auto module = py::reinterpret_steal<py::object>(PyImport_GetModule(name.ptr()));
    if (!module) {
      if (PyErr_Occurred()) throw py::error_already_set();
      return;
    }
    alone_ = module.attr("recording")();
    alone_.attr("__enter__")();
  }
  ~Recording() {
    if (!alone_) return;
    try {
      alone_.attr("__exit__")(py::none(), py::none(), py::none());
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("the end of a recording");
    }
  }
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

 private:
  py::object alone_;
};

// engine(input, output) -> the address of a cudaGraph_t, which the caller keeps alive as long as the runtime.
inline GraphOfSlot graph_engine(py::object engine) {
  return [call = shared(std::move(engine))](int, const void* in, void* out) {
    std::size_t graph = 0;
    call_python([&] { graph = (*call)(address(in), address(out)).template cast<std::size_t>(); });
    return reinterpret_cast<void*>(graph);
  };
}
#endif

}  // namespace fastpix2pix::python
