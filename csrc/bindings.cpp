// The module fastpix2pix._native. It and the headers that it alone includes (gil, arguments, specs, engines, dlpack)
// are all that knows both Python and the core. Types are in fastpix2pix/_native.pyi.
#include <pybind11/stl.h>

#include <atomic>
#include <mutex>
#include <set>
#include <utility>

#include "arguments.hpp"
#include "convert.hpp"
#include "engines.hpp"
#include "gil.hpp"
#include "runtime.hpp"
#include "specs.hpp"
#ifdef FASTPIX2PIX_CUDA
#include "dlpack.hpp"
#endif

namespace fastpix2pix::python {
namespace {

void run_input(InputPlan& plan, const py::object& network, const py::object& frame) {
  const InputSpec& spec = plan.spec();
  const py::buffer_info to = tensor_argument(network, spec.network, true);
  const auto from = frame_argument<const std::uint8_t>(frame, spec.frame, format_name(spec.frame));
  const WithoutGil without;
  plan.run(to.ptr, from.planes);
}

void run_output(OutputPlan& plan, const py::object& frame, const py::object& network) {
  const OutputSpec& spec = plan.spec();
  const auto to = frame_argument<std::uint8_t>(frame, spec.frame, format_name(spec.frame));
  const py::buffer_info from = tensor_argument(network, spec.network, false);
  const WithoutGil without;
  plan.run(to.planes, from.ptr);
}

// So many seconds from now; None and what is beyond three years never comes.
Time time_in(const char* what, std::optional<double> seconds) {
  if (seconds && !(*seconds >= 0.0)) {
    throw InvalidInput(std::string(what) + " = " + std::to_string(*seconds) +
                       " seconds from now; allowed are 0 and more, or None");
  }
  if (!seconds || *seconds > 1e8) return kNever;
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(*seconds));
}

// Waits in steps of 100 ms, so that Ctrl-C ends it; step(until) says whether it is done.
template <class Step>
void wait_for(std::optional<double> timeout, const Step& step) {
  const Time end = time_in("timeout", timeout);
  while (true) {
    const Time until = std::min(end, Clock::now() + std::chrono::milliseconds(100));
    {
      const WithoutGil without;
      if (step(until)) return;
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (Clock::now() >= end) return;
  }
}

class PyRuntime {
 public:
  PyRuntime(const InputSpec& input, const OutputSpec& output, const py::object& engine, const std::string& device,
            const std::string& kind, const std::string& graph, int slots, int depth, const std::string& policy,
            int threads)
      : source_(input.frame), target_(output.frame), device_(device) {
    const FrameRuntime::Shape shape{input.frame, output.frame, slots, depth, named("policy", policy, kPolicies)};
    Ring(slots, shape.policy, depth);  // checks both before memory is taken
    std::unique_ptr<Backend> backend;
    if (device == "cpu") {
      if (kind != "call" || graph != "auto") {
        throw InvalidInput("kind = '" + kind + "', graph = '" + graph +
                           "' on the CPU; allowed are 'call' and 'auto' there");
      }
      std::vector<SlotTensors> tensors;
      Engine call = engine.is_none() ? Engine() : array_engine(engine, input, output, slots, tensors);
      backend = make_cpu_backend(input, output, std::move(call), slots, threads, tensors);
    } else {
      backend = cuda(input, output, engine, kind, graph, slots);
    }
    refuse_at_exit();
    runtime_ = std::make_shared<FrameRuntime>(std::move(backend), shape);
    open_.insert(runtime_);
  }
  PyRuntime(const PyRuntime&) = delete;
  PyRuntime& operator=(const PyRuntime&) = delete;

  // The threads may be waiting for the GIL.
  ~PyRuntime() {
    open_.erase(runtime_);
    const WithoutGil without;
    runtime_.reset();
  }

  // At exit: the runtimes' own threads end while there is still a GIL for them. The set is taken as a whole, as other
  // threads that are woken may destroy their PyRuntime, and those that sleep from here on never do.
  static void close_all() {
    ending_ = true;
    const auto open = std::exchange(open_, {});
    const WithoutGil without;
    static_cast<void>(std::lock_guard(making_));  // whoever makes one is through
    for (const auto& runtime : open) runtime->close();
    WithoutGil::last_thread();
  }

  bool submit(const py::object& frame, std::int64_t tag, std::optional<double> deadline,
              std::optional<double> timeout) {
    const Time due = time_in("deadline", deadline);
    done_->let_go();
    auto result = FrameRuntime::Submitted::timed_out;
#ifdef FASTPIX2PIX_CUDA
    if (device_ != "cpu" && on_cuda(frame)) {
      runtime_->check_open();  // or a device that broke is taken for a frame that is wrong
      DeviceArgument held = DeviceFrame(stream_, ordinal_, done_).argument(frame, source_, format_name(source_));
      wait_for(timeout, [&](Time until) {
        result = runtime_->submit_device(held.planes, held.owner, tag, due, until);
        return result != FrameRuntime::Submitted::timed_out;
      });
      return result == FrameRuntime::Submitted::accepted;
    }
#endif
    const auto from = frame_argument<const std::uint8_t>(frame, source_, format_name(source_));
    wait_for(timeout, [&](Time until) {
      result = runtime_->submit(from.planes, tag, due, until);
      return result != FrameRuntime::Submitted::timed_out;
    });
    return result == FrameRuntime::Submitted::accepted;
  }

  std::optional<std::int64_t> collect(const py::object& frame, std::optional<double> timeout) {
    const auto to = frame_argument<std::uint8_t>(frame, target_, format_name(target_));
    std::optional<std::int64_t> tag;
    wait_for(timeout, [&](Time until) {
      tag = runtime_->collect(to.planes, until);
      return tag.has_value() || runtime_->drained();
    });
    done_->let_go();
    return tag;
  }

  std::optional<std::int64_t> poll(const py::object& frame) { return collect(frame, 0.0); }

  void finish() { runtime_->finish(); }
  bool drained() { return runtime_->drained(); }

  void close() {
    {
      const WithoutGil without;
      runtime_->close();
    }
    done_->let_go();
  }

  py::dict stats() {
    const Counters n = runtime_->counters();
    py::dict frames, latency;
    const std::pair<const char*, std::uint64_t> counts[] = {
        {"submitted", n.submitted},           {"collected", n.collected}, {"dropped_oldest", n.dropped_oldest},
        {"dropped_newest", n.dropped_newest}, {"late", n.late},           {"failed", n.failed},
        {"abandoned", n.abandoned},           {"pending", n.pending}};
    for (const auto& [name, count] : counts) frames[name] = count;
    const auto stages = runtime_->latency();
    for (int i = 0; i < FrameRuntime::kStages; ++i) {
      const Latency& stage = stages[static_cast<std::size_t>(i)];
      py::dict of;
      of["count"] = stage.count();
      of["p50_ms"] = stage.quantile_ms(0.50);
      of["p95_ms"] = stage.quantile_ms(0.95);
      of["p99_ms"] = stage.quantile_ms(0.99);
      of["max_ms"] = stage.max_ms();
      latency[FrameRuntime::kStageNames[i]] = of;
    }
    py::dict all;
    all["frames"] = frames;
    all["latency"] = latency;
    return all;
  }

  py::dict describe() const {
    py::dict about;
    about["device"] = device_;
    about["graph"] = graph_;
    about["slots"] = runtime_->shape().slots;
    about["depth"] = runtime_->shape().depth;
    about["policy"] = name_of(runtime_->shape().policy, kPolicies);
    return about;
  }

 private:
  std::unique_ptr<Backend> cuda(const InputSpec& input, const OutputSpec& output, const py::object& engine,
                                const std::string& kind, const std::string& graph, int slots) {
#ifdef FASTPIX2PIX_CUDA
    CudaOptions options;
    options.device = cuda_ordinal(device_);
    options.slots = slots;
    options.graph = named("graph", graph, kGraphs);
    if (kind != "call" && kind != "graph") throw InvalidInput("kind = '" + kind + "'; allowed are call, graph");
    if (!engine.is_none() && kind == "call") options.engine = pointer_engine(engine);
    if (!engine.is_none() && kind == "graph") options.graph_of_slot = graph_engine(engine);
    ordinal_ = options.device;
    CudaBackendInfo info;
    // Others may run Python while memory is taken and the engine warms up, but not during captures.
    options.undisturbed = [](const std::function<void()>& work) {
      const py::gil_scoped_acquire acquire;
      const CollectorOff off;
      const Recording alone;
      work();
    };
    const WithoutGil without;
    // One after the other: torch waits for the whole device before its own captures, which breaks another's.
    const std::lock_guard lock(making_);
    refuse_at_exit();
    auto backend = make_cuda_backend(input, output, std::move(options), info);
    graph_ = info.graph;
    stream_ = info.producer_stream;
    return backend;
#else
    static_cast<void>(input), static_cast<void>(output), static_cast<void>(engine), static_cast<void>(kind);
    static_cast<void>(graph), static_cast<void>(slots);
    throw InvalidInput("device = '" + device_ +
                       "'; this build has only the CPU (device = 'cpu'). For CUDA reinstall with nvcc and "
                       "FASTPIX2PIX_CUDA=on");
#endif
  }

#ifdef FASTPIX2PIX_CUDA
  static constexpr Names<GraphUse, 3> kGraphs = {
      {{"auto", GraphUse::automatic}, {"on", GraphUse::on}, {"off", GraphUse::off}}};

  static int cuda_ordinal(const std::string& device) {
    if (device == "cuda") return 0;
    const std::string digits = device.rfind("cuda:", 0) == 0 ? device.substr(5) : "";
    if (digits.empty() || digits.size() > 3 || digits.find_first_not_of("0123456789") != std::string::npos) {
      throw InvalidInput("device = '" + device + "'; allowed are cpu, cuda and cuda:N");
    }
    return std::stoi(digits);
  }

  std::uintptr_t stream_ = 0;  // where device frames wait for whoever writes them
  int ordinal_ = 0;
#endif

  static void refuse_at_exit() {
    if (ending_) throw Failed("the interpreter ends; a frame runtime can no longer be made");
  }

  inline static std::set<std::shared_ptr<FrameRuntime>> open_;  // touched with the GIL held
  inline static std::mutex making_;                             // one on CUDA; taken without the GIL
  inline static std::atomic<bool> ending_{false};

  FrameShape source_, target_;
  std::string device_, graph_ = "none";
  std::shared_ptr<Done> done_ = std::make_shared<Done>();  // what device frames have held
  std::shared_ptr<FrameRuntime> runtime_;
};

// Raises the package's own errors, so that the commands treat them like all others.
void translate(std::exception_ptr pointer) {
  const auto raise = [](const char* name, const std::exception& error) {
    const py::object type = py::module_::import("fastpix2pix.errors").attr(name);
    PyErr_SetString(type.ptr(), error.what());
  };
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const InvalidInput& error) {
    raise("InputError", error);
  } catch (const Failed& error) {
    raise("EnvironmentFailed", error);
  }
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Pixel conversions and the frame runtime; see fastpix2pix.runtime.native.";
  py::register_local_exception_translator(translate);
  py::module_::import("atexit").attr("register")(py::cpp_function(&PyRuntime::close_all));

#ifdef FASTPIX2PIX_CUDA
  m.attr("CUDA") = FASTPIX2PIX_CUDA_VERSION;
#else
  m.attr("CUDA") = py::none();
#endif

  py::class_<InputSpec>(m, "InputSpec")
      .def(py::init(&input_spec), py::arg("format"), py::arg("frame"), py::arg("network"), py::kw_only(),
           py::arg("crop") = py::none(), py::arg("place") = py::none(), py::arg("border") = "reflect",
           py::arg("fill") = 0.0f, py::arg("filter") = "bicubic", py::arg("matrix") = "bt709",
           py::arg("range") = "limited", py::arg("layout") = "nchw", py::arg("dtype") = "float32");
  py::class_<OutputSpec>(m, "OutputSpec")
      .def(py::init(&output_spec), py::arg("format"), py::arg("frame"), py::arg("network"), py::kw_only(),
           py::arg("region") = py::none(), py::arg("filter") = "bicubic", py::arg("matrix") = "bt709",
           py::arg("range") = "limited", py::arg("layout") = "nchw", py::arg("dtype") = "float32");
  py::class_<InputPlan>(m, "InputPlan")
      .def(py::init<const InputSpec&, int>(), py::arg("spec"), py::arg("threads") = 1)
      .def("run", &run_input, py::arg("network"), py::arg("frame"));
  py::class_<OutputPlan>(m, "OutputPlan")
      .def(py::init<const OutputSpec&, int>(), py::arg("spec"), py::arg("threads") = 1)
      .def("run", &run_output, py::arg("frame"), py::arg("network"));
  py::class_<PyRuntime>(m, "FrameRuntime")
      .def(py::init<const InputSpec&, const OutputSpec&, const py::object&, const std::string&, const std::string&,
                    const std::string&, int, int, const std::string&, int>(),
           py::arg("input"), py::arg("output"), py::arg("engine"), py::kw_only(), py::arg("device") = "cpu",
           py::arg("kind") = "call", py::arg("graph") = "auto", py::arg("slots") = 4, py::arg("depth") = 2,
           py::arg("policy") = "block", py::arg("threads") = 1)
      .def("submit", &PyRuntime::submit, py::arg("frame"), py::arg("tag") = 0, py::kw_only(),
           py::arg("deadline") = py::none(), py::arg("timeout") = py::none())
      .def("collect", &PyRuntime::collect, py::arg("frame"), py::kw_only(), py::arg("timeout") = py::none())
      .def("poll", &PyRuntime::poll, py::arg("frame"))
      .def("finish", &PyRuntime::finish)
      .def("close", &PyRuntime::close)
      // True once finish was called and no frame is inside, so that None of a collect with a timeout is clear
      .def_property_readonly("drained", &PyRuntime::drained)
      .def("stats", &PyRuntime::stats)
      .def("describe", &PyRuntime::describe);
}

}  // namespace fastpix2pix::python
