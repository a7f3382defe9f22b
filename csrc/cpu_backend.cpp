#include "cpu_backend.hpp"

#include <utility>

namespace fastpix2pix {
namespace {

class CpuBackend final : public Backend {
 public:
  CpuBackend(const InputSpec& input, const OutputSpec& output, Engine engine, int slots, int threads,
             const std::vector<SlotTensors>& tensors)
      : input_(input, threads), output_(output, threads), engine_(std::move(engine)) {
    if (!engine_) check_identity(input.network, output.network);
    slots_.reserve(static_cast<std::size_t>(slots));
    for (int i = 0; i < slots; ++i) {
      slots_.emplace_back(input, output, tensors.empty() ? nullptr : &tensors[static_cast<std::size_t>(i)]);
      SlotTensors& own = slots_.back().tensors;
      if (!engine_) own.output = own.input;
    }
  }

  Planes staging(int slot) override { return packed_planes(input_.spec().frame, at(slot).source.data()); }
  ConstPlanes result(int slot) override {
    return as_const(packed_planes(output_.spec().frame, at(slot).target.data()));
  }
  void stage(int) override {}
  void adopt(int, const ConstPlanes&) override {
    throw InvalidInput("a frame in GPU memory was submitted to a runtime on the CPU; submit it from host memory");
  }

  void launch(int slot) override {
    Slot& s = at(slot);
    const Time begin = Clock::now();
    input_.run(s.tensors.input, as_const(staging(slot)));
    const Time converted = Clock::now();
    if (engine_) engine_(slot, s.tensors.input, s.tensors.output, nullptr);
    s.times.upload = converted - begin;
    s.times.compute = Clock::now() - converted;
  }

  void await_read(int) override {}
  StageTimes finish(int slot) override {
    Slot& s = at(slot);
    const Time begin = Clock::now();
    output_.run(packed_planes(output_.spec().frame, s.target.data()), s.tensors.output);
    s.times.download = Clock::now() - begin;
    return s.times;
  }

 private:
  struct Slot {
    Slot(const InputSpec& in, const OutputSpec& out, const SlotTensors* given)
        : source(frame_bytes(in.frame)),
          target(frame_bytes(out.frame)),
          input(given ? 0 : tensor_bytes(in.network)),
          output(given ? 0 : tensor_bytes(out.network)),
          tensors(given ? *given : SlotTensors{input.data(), output.data()}) {}
    Slot(Slot&&) = default;  // moving a vector keeps its memory in place

    std::vector<std::uint8_t> source, target;
    std::vector<std::uint8_t> input, output;  // operator new aligns for every element type
    SlotTensors tensors;
    StageTimes times;
  };

  Slot& at(int slot) { return slots_[static_cast<std::size_t>(slot)]; }

  InputPlan input_;
  OutputPlan output_;
  Engine engine_;
  std::vector<Slot> slots_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const InputSpec& input, const OutputSpec& output, Engine engine, int slots,
                                          int threads, const std::vector<SlotTensors>& tensors) {
  return std::make_unique<CpuBackend>(input, output, std::move(engine), slots, threads, tensors);
}

}  // namespace fastpix2pix
