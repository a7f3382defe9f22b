#include "cuda_backend.hpp"

#include <exception>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_convert.hpp"
#include "cuda_handles.hpp"

namespace fastpix2pix {
namespace {

int checked_device(int device) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "find a GPU");
  if (device < count) return device;
  throw InvalidInput("device = 'cuda:" + std::to_string(device) + "'; this machine has " + std::to_string(count) +
                     " GPU(s), counted from 0");
}

Latency::Duration between(const CudaEvent& begin, const CudaEvent& end) {
  float ms = 0.0f;
  check(cudaEventElapsedTime(&ms, begin.get(), end.get()), "read a time");
  return std::chrono::duration_cast<Latency::Duration>(std::chrono::duration<float, std::milli>(ms));
}

// A stage on its stream: what runs between two events, whose times finish reads.
struct Stage {
  CudaEvent begin = make_event(), end = make_event(cudaEventBlockingSync);

  template <class Work>
  void record(cudaStream_t stream, const Work& work) const {
    check(cudaEventRecord(begin.get(), stream), "record an event");
    work();
    check(cudaEventRecord(end.get(), stream), "record an event");
  }
  // What comes next on `stream` waits for the end.
  void before(cudaStream_t stream) const { check(cudaStreamWaitEvent(stream, end.get(), 0), "let a stream wait"); }
  // To be woken takes time, which a small network notices; to spin takes a core for each stream. So spin for a moment,
  // then sleep. How long is a guess until a GPU has measured it.
  void await(const char* doing) const {
    const Time late = Clock::now() + std::chrono::microseconds(100);
    while (Clock::now() < late) {
      const cudaError_t code = cudaEventQuery(end.get());
      if (code != cudaErrorNotReady) return check(code, doing);
      std::this_thread::yield();
    }
    check(cudaEventSynchronize(end.get()), doing);
  }
  Latency::Duration time() const { return between(begin, end); }
};

struct Slot {
  Slot(const InputSpec& in, const OutputSpec& out)
      : staging(pinned_memory<std::uint8_t>(frame_bytes(in.frame))),
        result(pinned_memory<std::uint8_t>(frame_bytes(out.frame))),
        source(device_memory<std::uint8_t>(frame_bytes(in.frame))),
        target(device_memory<std::uint8_t>(frame_bytes(out.frame))),
        input(device_memory<void>(tensor_bytes(in.network))),
        output(device_memory<void>(tensor_bytes(out.network))) {}

  PinnedMemory<std::uint8_t> staging, result;  // of the host: packed frames in and out
  DeviceMemory<std::uint8_t> source, target;   // the same on the device
  DeviceMemory<void> input, output;            // the network's tensors
  Stage upload, compute, download;
  CudaEvent produced = make_event(cudaEventDisableTiming);  // an adopted frame is ready to be read
  bool adopted = false;
  ConstPlanes frame;  // adopted: where it lies
  CudaGraphExec graph;
};

class CudaBackend final : public Backend {
 public:
  CudaBackend(const InputSpec& input, const OutputSpec& output, CudaOptions options, CudaBackendInfo& info)
      : options_(std::move(options)), source_(input.frame), target_(output.frame), input_(input), output_(output) {
    if (!options_.engine && !options_.graph_of_slot) {
      check_identity(input.network, output.network);
      options_.engine = [bytes = tensor_bytes(input.network)](int, const void* in, void* out, void* stream) {
        check(cudaMemcpyAsync(out, in, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)),
              "copy the network's input to its output");
      };
    }
    slots_.reserve(static_cast<std::size_t>(options_.slots));
    for (int i = 0; i < options_.slots; ++i) slots_.emplace_back(input, output);
    // Memory was cleared and tables were copied on the default stream, for which the others do not wait.
    check(cudaStreamSynchronize(nullptr), "prepare memory on the GPU");
    info.graph = build_graphs();
    info.producer_stream = reinterpret_cast<std::uintptr_t>(producer_.get());
  }

  // Whoever drops the runtime may be on another device, where freeing would make a context.
  ~CudaBackend() override {
    try {
      here_.emplace(options_.device);
    } catch (const Failed&) {  // the work that broke the device has raised it
    }
  }

  Planes staging(int slot) override { return packed_planes(source_, at(slot).staging.get()); }
  ConstPlanes result(int slot) override { return as_const(packed_planes(target_, at(slot).result.get())); }

  void stage(int slot) override { at(slot).adopted = false; }

  void adopt(int slot, const ConstPlanes& device_frame) override {
    const OnDevice here(options_.device);
    Slot& s = at(slot);
    s.frame = device_frame;
    s.adopted = true;
    check(cudaEventRecord(s.produced.get(), producer_.get()), "record an event");
  }

  void launch(int slot) override {
    use_device(options_.device);
    try {
      begin(slot);
    } catch (...) {
      static_cast<void>(cudaStreamSynchronize(upload_.get()));  // nobody keeps an adopted frame from now on
      throw;
    }
  }

  void await_read(int slot) override {
    use_device(options_.device);
    if (at(slot).adopted) at(slot).upload.await("read a frame");
  }

  StageTimes finish(int slot) override {
    use_device(options_.device);
    Slot& s = at(slot);
    s.download.await("translate a frame");
    return {s.upload.time(), s.compute.time(), s.download.time()};
  }

 private:
  Slot& at(int slot) { return slots_[static_cast<std::size_t>(slot)]; }

  void begin(int slot) {
    Slot& s = at(slot);
    if (s.adopted) check(cudaStreamWaitEvent(upload_.get(), s.produced.get(), 0), "let a stream wait");
    s.upload.record(upload_.get(), [&] { upload(s); });
    s.upload.before(compute_.get());
    s.compute.record(compute_.get(), [&] {
      s.graph ? check(cudaGraphLaunch(s.graph.get(), compute_.get()), "launch a graph") : enqueue(slot);
    });
    s.compute.before(download_.get());
    s.download.record(download_.get(), [&] {
      check(cudaMemcpyAsync(s.result.get(), s.target.get(), frame_bytes(target_), cudaMemcpyDeviceToHost,
                            download_.get()),
            "copy a frame from the GPU");
    });
  }

  // The frame into the slot's memory on the device, where the graph reads it.
  void upload(const Slot& s) const {
    if (!s.adopted) {
      return check(
          cudaMemcpyAsync(s.source.get(), s.staging.get(), frame_bytes(source_), cudaMemcpyHostToDevice, upload_.get()),
          "copy a frame to the GPU");
    }
    const Planes to = packed_planes(source_, s.source.get());
    for (int p = 0; p < plane_count(source_.format); ++p) {
      // Bottom-up rows have a negative stride, which cudaMemcpy2D does not take: row by row then.
      const auto width = static_cast<std::size_t>(plane_width(source_, p));
      const int rows = plane_rows(source_, p), step = s.frame.stride[p] < to.stride[p] ? 1 : rows;
      for (int y = 0; y < rows; y += step) {
        check(cudaMemcpy2DAsync(to.data[p] + y * to.stride[p], width, s.frame.data[p] + y * s.frame.stride[p],
                                step == 1 ? width : static_cast<std::size_t>(s.frame.stride[p]), width,
                                static_cast<std::size_t>(step), cudaMemcpyDeviceToDevice, upload_.get()),
              "copy a frame on the GPU");
      }
    }
  }

  void convert_in(const Slot& s) const {
    input_.enqueue(s.input.get(), as_const(packed_planes(source_, s.source.get())), compute_.get());
  }
  void convert_out(const Slot& s) const {
    output_.enqueue(packed_planes(target_, s.target.get()), s.output.get(), compute_.get());
  }
  void run_engine(int slot) { options_.engine(slot, at(slot).input.get(), at(slot).output.get(), compute_.get()); }

  void enqueue(int slot) {
    convert_in(at(slot));
    if (options_.engine) run_engine(slot);
    convert_out(at(slot));
  }

  // Returns CudaBackendInfo::graph.
  std::string build_graphs() {
    if (options_.graph_of_slot) {
      if (options_.graph == GraphUse::off) {
        throw InvalidInput("graph = 'off' with an engine that is a graph; allowed are auto and on");
      }
      warm_up();
      build_each([this](int slot, const auto& add) { add(given_graph(slot)); });
      return "child";
    }
    if (options_.graph == GraphUse::off) return "none";
    warm_up();
    try {
      build_each([this](int slot, const auto& add) { add(captured([&] { run_engine(slot); }).get()); });
      return "captured";
    } catch (const std::exception& error) {
      if (options_.graph == GraphUse::on) throw;
      for (Slot& slot : slots_) slot.graph.reset();
      return std::string("none: ") + error.what();
    }
  }

  // Kernels are loaded and engines set themselves up in their first calls, which a capture does not allow.
  void warm_up() {
    for (int i = 0; i < 2 * options_.slots; ++i) enqueue(i / 2);
    check(cudaStreamSynchronize(compute_.get()), "run the engine");
  }

  // One graph for each slot: conversion, the engine's part, conversion. add copies a graph into the whole.
  template <class EnginePart>
  void build_each(const EnginePart& engine_part) {
    options_.undisturbed([&] { build_undisturbed(engine_part); });
  }
  template <class EnginePart>
  void build_undisturbed(const EnginePart& engine_part) {
    for (int slot = 0; slot < options_.slots; ++slot) {
      Slot& s = at(slot);
      const CudaGraph whole = make_graph();
      cudaGraphNode_t last = nullptr;
      const auto add = [&](cudaGraph_t part) {
        cudaGraphNode_t node;
        check(cudaGraphAddChildGraphNode(&node, whole.get(), &last, last ? 1 : 0, part), "join graphs");
        last = node;
      };
      add(captured([&] { convert_in(s); }).get());
      engine_part(slot, add);
      add(captured([&] { convert_out(s); }).get());
      cudaGraphExec_t graph;
      check(cudaGraphInstantiate(&graph, whole.get(), 0), "instantiate a graph");
      s.graph.reset(graph);
      check(cudaGraphUpload(graph, compute_.get()), "upload a graph");
    }
    check(cudaStreamSynchronize(compute_.get()), "upload the graphs");
  }

  cudaGraph_t given_graph(int slot) {
    void* graph = options_.graph_of_slot(slot, at(slot).input.get(), at(slot).output.get());
    if (graph == nullptr) throw InvalidInput("the engine gave 0; allowed is the address of a finished cudaGraph_t");
    return static_cast<cudaGraph_t>(graph);
  }

  // What `work` enqueues on the compute stream. Only this thread's calls are checked: others (loaders, torch's) may
  // allocate meanwhile. The capture is ended whatever happens, or the stream could never be used again.
  template <class Work>
  CudaGraph captured(const Work& work) {
    check(cudaStreamBeginCapture(compute_.get(), cudaStreamCaptureModeThreadLocal), "begin a capture");
    std::exception_ptr raised;
    try {
      work();
    } catch (...) {
      raised = std::current_exception();
    }
    cudaGraph_t graph = nullptr;
    const cudaError_t code = cudaStreamEndCapture(compute_.get(), &graph);
    CudaGraph owner(graph);
    if (raised) {
      cudaGetLastError();
      std::rethrow_exception(raised);
    }
    check(code, "capture the engine in a graph");
    return owner;
  }

  // Destroyed from the last to the first: graphs, then what they were made of, then the engine that owns its memory.
  std::optional<OnDevice> here_;  // until all of it is gone
  CudaOptions options_;
  FrameShape source_, target_;
  CudaInputPlan input_;
  CudaOutputPlan output_;
  CudaStream producer_ = make_stream(), upload_ = make_stream(), compute_ = make_stream(), download_ = make_stream();
  std::vector<Slot> slots_;
  // Frames may be in flight, or the engine's first calls where the constructor throws: nothing that they use goes
  // before they are through.
  struct Drain {
    const CudaBackend& backend;
    ~Drain() {
      for (const auto* stream : {&backend.producer_, &backend.upload_, &backend.compute_, &backend.download_}) {
        static_cast<void>(cudaStreamSynchronize(stream->get()));
      }
    }
  } drain_{*this};
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(const InputSpec& input, const OutputSpec& output, CudaOptions options,
                                           CudaBackendInfo& info) {
  const OnDevice here(checked_device(options.device));
  return std::make_unique<CudaBackend>(input, output, std::move(options), info);
}

int device_of(const void* pointer, int device) {
  const OnDevice here(device);
  cudaPointerAttributes about;
  check(cudaPointerGetAttributes(&about, pointer), "find where a frame lies");
  return about.type == cudaMemoryTypeDevice || about.type == cudaMemoryTypeManaged ? about.device : -1;
}

void on_device(int device, const std::function<void()>& work) {
  const OnDevice here(device);
  work();
}

void await_stream(std::uintptr_t waiting, std::uintptr_t producer, int device) {
  const OnDevice here(device);
  const CudaEvent now = make_event(cudaEventDisableTiming);
  check(cudaEventRecord(now.get(), reinterpret_cast<cudaStream_t>(producer)), "record an event");
  check(cudaStreamWaitEvent(reinterpret_cast<cudaStream_t>(waiting), now.get(), 0), "let a stream wait");
}

}  // namespace fastpix2pix
