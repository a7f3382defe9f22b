// The runtime on the CPU: every frame comes out whole and in order, engines may fail, closing never hangs, and the
// frame path allocates nothing.
#include <atomic>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "allocations.hpp"
#include "check.hpp"
#include "cpu_backend.hpp"

using namespace fastpix2pix;
using std::chrono::milliseconds;

namespace {

constexpr int kWidth = 16, kHeight = 8;
using Submitted = FrameRuntime::Submitted;

std::unique_ptr<FrameRuntime> runtime(Engine engine = {}, Policy policy = Policy::block, int slots = 4, int depth = 2,
                                      Format format = Format::rgb, int threads = 1) {
  const FrameShape frame{format, kWidth, kHeight};
  const TensorShape network{kWidth, kHeight, false, false};
  const Colour colour = make_colour(Matrix::bt709, Range::limited);
  const InputSpec in{frame,        {0, 0, kWidth, kHeight}, kWidth, kHeight, 0, 0, network,
                     Filter::area, Border::reflect,         0.0f,   colour};
  const OutputSpec out{network, {0, 0, kWidth, kHeight}, frame, Filter::area, colour};
  return std::make_unique<FrameRuntime>(make_cpu_backend(in, out, std::move(engine), slots, threads),
                                        FrameRuntime::Shape{frame, frame, slots, depth, policy});
}

// A frame of one level everywhere, its rows `padding` bytes apart.
struct Frame {
  explicit Frame(int level = 0, std::ptrdiff_t padding = 0, Format format = Format::rgb)
      : shape{format, kWidth, kHeight} {
    for (int p = 0; p < plane_count(format); ++p) {
      const std::ptrdiff_t stride = plane_width(shape, p) + padding;
      memory[p].assign(static_cast<std::size_t>(stride * plane_rows(shape, p)), static_cast<std::uint8_t>(level));
      planes.data[p] = memory[p].data();
      planes.stride[p] = stride;
    }
  }
  ConstPlanes read() const { return as_const(planes); }
  // The rows are `level`; what lies between them is `between`.
  bool is(int level, int between) const {
    for (int p = 0; p < plane_count(shape.format); ++p) {
      for (std::size_t i = 0; i < memory[p].size(); ++i) {
        const bool inside = static_cast<std::ptrdiff_t>(i) % planes.stride[p] < plane_width(shape, p);
        if (memory[p][i] != static_cast<std::uint8_t>(inside ? level : between)) return false;
      }
    }
    return true;
  }

  FrameShape shape;
  std::vector<std::uint8_t> memory[3];
  Planes planes;
};

void check_sum(FrameRuntime& runtime) {
  const Counters n = runtime.counters();
  CHECK(n.submitted == n.collected + n.dropped_oldest + n.dropped_newest + n.late + n.failed + n.abandoned + n.pending);
}

Engine sleeping(std::atomic<bool>& hold) {
  return [&hold](int, const void*, void*, void*) {
    while (hold) std::this_thread::sleep_for(milliseconds(1));
  };
}

void frames_come_out_whole_and_in_order() {
  for (const Format format : {Format::rgb, Format::rgba, Format::nv12, Format::yuv420}) {
    auto r = runtime({}, Policy::block, 3, 2, format, 2);
    std::thread submitter([&] {
      for (int i = 0; i < 300; ++i) {
        const Frame frame(128, i % 2 ? 5 : 0, format);  // gray is a fixed point of every conversion but alpha
        CHECK(r->submit(frame.read(), i, kNever, kNever) == Submitted::accepted);
      }
      r->finish();
    });
    for (int i = 0; i < 300; ++i) {
      Frame back(1, i % 3 ? 7 : 0, format);
      CHECK(r->collect(back.planes, kNever) == i);
      if (format != Format::rgba) CHECK(back.is(128, 1));
    }
    Frame back;
    CHECK(!r->collect(back.planes, kNever) && r->drained());
    submitter.join();
    check_sum(*r);
    for (const Latency& stage : r->latency()) CHECK(stage.count() == 300);
  }
}

void copies_keep_to_their_rows() {
  for (const Format format : {Format::bgr, Format::nv12, Format::yuv420}) {
    for (const std::ptrdiff_t from : {0, 1, 13}) {
      for (const std::ptrdiff_t to : {0, 1, 13}) {
        const Frame source(9, from, format);
        Frame target(3, to, format);
        copy_planes(target.planes, source.read(), source.shape);
        CHECK(target.is(9, 3));
      }
    }
  }
  // bottom up
  Frame source(0), target(0);
  for (int y = 0; y < kHeight; ++y) std::memset(source.planes.data[0] + y * source.planes.stride[0], y, kWidth * 3);
  Planes flipped = source.planes;
  flipped.data[0] += (kHeight - 1) * flipped.stride[0];
  flipped.stride[0] = -flipped.stride[0];
  copy_planes(target.planes, as_const(flipped), source.shape);
  for (int y = 0; y < kHeight; ++y) CHECK(target.planes.data[0][y * target.planes.stride[0]] == kHeight - 1 - y);
}

void engines_get_the_tensors_of_their_slot() {
  std::vector<const void*> inputs(4), outputs(4);
  auto r = runtime([&](int slot, const void* in, void* out, void* stream) {
    const auto s = static_cast<std::size_t>(slot);
    CHECK(stream == nullptr);
    CHECK((!inputs[s] || inputs[s] == in) && (!outputs[s] || outputs[s] == out));
    inputs[s] = in, outputs[s] = out;
    for (int i = 0; i < 3 * kWidth * kHeight; ++i) static_cast<float*>(out)[i] = -static_cast<const float*>(in)[i];
  });
  for (int i = 0; i < 50; ++i) {
    const Frame frame(i);
    Frame back;
    CHECK(r->submit(frame.read(), i, kNever, kNever) == Submitted::accepted);
    CHECK(r->collect(back.planes, kNever) == i && back.is(255 - i, 255 - i));
  }
}

void an_engines_failure_surfaces_at_the_next_call() {
  auto r = runtime([](int, const void* in, void* out, void*) {
    if (*static_cast<const float*>(in) > 0.9f) throw std::runtime_error("too bright");
    std::memcpy(out, in, sizeof(float) * 3 * kWidth * kHeight);
  });
  const Frame dark(10), bright(250);
  Frame back;
  CHECK(r->submit(dark.read(), 1, kNever, kNever) == Submitted::accepted);
  CHECK(r->collect(back.planes, kNever) == 1);
  r->check_open();
  CHECK(r->submit(bright.read(), 2, kNever, kNever) == Submitted::accepted);
  CHECK_THROWS(Failed, "too bright", r->collect(back.planes, kNever));
  CHECK_THROWS(Failed, "too bright", r->check_open());
  CHECK_THROWS(Failed, "too bright", r->submit(dark.read(), 3, kNever, kNever));
  CHECK(r->counters().failed == 1);
  check_sum(*r);
  r->close();
  CHECK_THROWS(Failed, "too bright", r->collect(back.planes, kNever));
}

void closing_with_frames_in_flight() {
  for (int pause = 0; pause < 4; ++pause) {
    std::atomic<bool> hold{true};
    auto r = runtime(sleeping(hold));
    const Frame frame(5);
    for (int i = 0; i < 4; ++i) r->submit(frame.read(), i, kNever, kNever);
    std::thread collector([&] {
      Frame back;
      CHECK_THROWS(Failed, "the frame runtime is closed", while (r->collect(back.planes, kNever)){});
    });
    std::thread submitter([&] {
      CHECK_THROWS(Failed, "the frame runtime is closed", while (true) { r->submit(frame.read(), 9, kNever, kNever); });
    });
    std::this_thread::sleep_for(milliseconds(pause));
    std::thread opener([&] {
      std::this_thread::sleep_for(milliseconds(2));
      hold = false;
    });
    std::thread also([&] { r->close(); });
    r->close();
    for (std::thread* thread : {&also, &collector, &submitter, &opener}) thread->join();
    r->close();
    check_sum(*r);
    CHECK(r->counters().pending == 0);
  }
}

void closing_at_once() {
  for (int i = 0; i < 50; ++i) runtime({}, Policy::block, 2, 1, Format::rgb, 3);
}

void policies_when_the_engine_is_slow() {
  for (const Policy policy : {Policy::drop_oldest, Policy::drop_newest}) {
    std::atomic<bool> hold{true};
    auto r = runtime(sleeping(hold), policy, 4, 1);
    const Frame frame(5);
    int accepted = 0;
    for (int i = 0; i < 20; ++i) accepted += r->submit(frame.read(), i, kNever, kNever) == Submitted::accepted;
    hold = false;
    r->finish();
    std::vector<std::int64_t> tags;
    Frame back;
    while (const auto tag = r->collect(back.planes, kNever)) tags.push_back(*tag);
    const Counters n = r->counters();
    CHECK(n.submitted == 20 && n.collected == tags.size() && n.pending == 0);
    check_sum(*r);
    if (policy == Policy::drop_oldest) {
      CHECK(accepted == 20 && tags.back() == 19 && n.dropped_oldest == 20 - tags.size());
    } else {
      CHECK(accepted == static_cast<int>(tags.size()) && tags.front() == 0 && n.dropped_newest == 20 - tags.size());
    }
    for (std::size_t i = 1; i < tags.size(); ++i) CHECK(tags[i] > tags[i - 1]);
  }
}

void deadlines_and_timeouts() {
  std::atomic<bool> hold{true};
  auto r = runtime(sleeping(hold), Policy::block, 2, 1);
  const Frame frame(5);
  Frame back;
  CHECK(!r->collect(back.planes, Clock::now() + milliseconds(2)));
  CHECK(r->submit(frame.read(), 0, kNever, kNever) == Submitted::accepted);
  CHECK(r->submit(frame.read(), 1, Clock::now() + milliseconds(1), kNever) == Submitted::accepted);
  CHECK(r->submit(frame.read(), 2, kNever, Clock::now() + milliseconds(5)) == Submitted::timed_out);
  hold = false;
  r->finish();
  CHECK(r->collect(back.planes, kNever) == 0);
  CHECK(!r->collect(back.planes, kNever));
  const Counters n = r->counters();
  CHECK(n.submitted == 2 && n.late == 1 && n.collected == 1);
}

// std::function and threads allocate at the start; after that only the engine may.
void the_frame_path_allocates_nothing() {
  auto r = runtime([](int, const void* in, void* out, void*) { std::memcpy(out, in, 12 * kWidth * kHeight); },
                   Policy::block, 4, 2, Format::nv12, 2);
  const Frame frame(128, 0, Format::nv12), strided(128, 3, Format::nv12);
  Frame back(0, 0, Format::nv12);
  for (int i = 0; i < 8; ++i) {
    r->submit(frame.read(), i, kNever, kNever);
    r->collect(back.planes, kNever);
  }
  const long before = allocations();
  for (int i = 0; i < 1000; ++i) {
    r->submit(i % 2 ? frame.read() : strided.read(), i, Clock::now() + std::chrono::hours(1), kNever);
    CHECK(r->collect(back.planes, i % 2 ? kNever : Clock::now() + std::chrono::hours(1)) == i);
    r->collect(back.planes, Clock::now());  // poll
  }
  CHECK(allocations() == before);
}

void many_threads_submit_and_collect() {
  auto r = runtime({}, Policy::drop_oldest, 5, 3);
  std::vector<std::thread> threads;
  std::atomic<int> submitters{3};
  std::atomic<std::uint64_t> collected{0};
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      const Frame frame(77);
      for (int k = 0; k < 500; ++k) r->submit(frame.read(), k, kNever, kNever);
      if (--submitters == 0) r->finish();
    });
    threads.emplace_back([&] {
      Frame back;
      while (r->collect(back.planes, kNever)) {
        CHECK(back.is(77, 77));
        ++collected;
      }
    });
  }
  threads.emplace_back([&] {
    while (!r->drained()) {
      check_sum(*r);
      r->latency();
    }
  });
  for (std::thread& thread : threads) thread.join();
  CHECK(r->counters().submitted == 1500 && r->counters().collected == collected);
}

// A GPU that does nothing, and each step of it once it is let.
struct Device final : Backend {
  Planes staging(int) override { return {}; }
  ConstPlanes result(int) override { return picture.read(); }
  void stage(int) override {}
  void adopt(int, const ConstPlanes&) override {}
  void launch(int) override {
    if (fails) throw Failed("no launch");
    begun = true;
    pass(launching);
  }
  void await_read(int) override { pass(reading); }
  StageTimes finish(int) override {
    pass(finishing);
    return {};
  }
  static void pass(const std::atomic<bool>& open) {
    while (!open) std::this_thread::sleep_for(milliseconds(1));
  }

  Frame picture{3};
  std::atomic<bool> fails{false}, begun{false}, launching{true}, reading{true}, finishing{true};
};

// A runtime on such a device, and how many of the frames that it was given are held.
struct DeviceRuntime {
  explicit DeviceRuntime(Policy policy) : runtime(std::unique_ptr<Backend>(device), shape(policy)) {}
  ~DeviceRuntime() {
    for (std::atomic<bool>* step : {&device->launching, &device->reading, &device->finishing}) *step = true;
  }
  FrameRuntime::Shape shape(Policy policy) const {
    return {device->picture.shape, device->picture.shape, 3, 1, policy};
  }
  void submit(Time deadline = kNever) {
    ++held;
    Owner owner(&held, [](std::atomic<int>* count) { --*count; });
    CHECK(runtime.submit_device({}, owner, 0, deadline, kNever) == Submitted::accepted && !owner);
  }
  // Without another call: those who wait for a frame's memory may be the ones who would make it.
  void holds(int count) const {
    for (int ms = 0; held != count && ms < 5000; ++ms) std::this_thread::sleep_for(milliseconds(1));
    CHECK(held == count);
  }

  std::atomic<int> held{0};
  Device* device = new Device;
  FrameRuntime runtime;
};

void a_device_frame_is_held_until_it_has_been_read() {
  DeviceRuntime on(Policy::block);
  on.device->reading = on.device->finishing = false;
  on.submit();
  std::this_thread::sleep_for(milliseconds(5));
  on.holds(1);
  on.device->reading = true;
  on.holds(0);
  on.device->finishing = true;
  Frame back;
  CHECK(on.runtime.collect(back.planes, kNever) == 0 && back.is(3, 3));
}

void device_frames_that_are_given_up_are_let_go() {
  {
    DeviceRuntime on(Policy::block);
    on.device->finishing = false;
    on.submit();
    on.submit(Clock::now());
    on.holds(0);
    CHECK(on.runtime.counters().late == 1);
  }
  {
    DeviceRuntime on(Policy::drop_oldest);
    on.device->launching = false;
    on.submit();
    Device::pass(on.device->begun);
    for (int i = 0; i < 5; ++i) on.submit();
    on.holds(3);
  }
  {
    DeviceRuntime on(Policy::block);
    on.device->fails = true;
    on.submit();
    on.holds(0);
  }
  {
    DeviceRuntime on(Policy::block);
    on.device->reading = false;
    for (int i = 0; i < 3; ++i) on.submit();
    Device::pass(on.device->begun);
    std::thread closing([&] { on.runtime.close(); });
    on.holds(1);  // the one in work
    on.device->reading = true;
    closing.join();
    CHECK(on.held == 0);
  }
}

// Each frame's owner goes once, whoever gives it up.
void many_device_frames() {
  for (const Policy policy : {Policy::block, Policy::drop_oldest}) {
    DeviceRuntime on(policy);
    std::vector<std::thread> threads;
    for (int i = 0; i < 2; ++i) {
      threads.emplace_back(
          [&] { CHECK_THROWS(Failed, "closed", for (int k = 0;; ++k) on.submit(k % 7 ? kNever : Clock::now())); });
      threads.emplace_back([&] {
        Frame back;
        CHECK_THROWS(Failed, "closed", while (on.runtime.collect(back.planes, kNever)){});
      });
    }
    std::this_thread::sleep_for(milliseconds(20));
    on.runtime.close();
    for (std::thread& thread : threads) thread.join();
    CHECK(on.held == 0);
    check_sum(on.runtime);
  }
}

void refusals() {
  const FrameShape frame{Format::rgb, kWidth, kHeight};
  const InputSpec in{frame, {0, 0, 8, 8}, 8, 8, 0, 0, {8, 8, false, false}, Filter::area, Border::reflect, 0.0f, {}};
  const OutputSpec out{{16, 8, false, false}, {0, 0, 16, 8}, frame, Filter::area, {}};
  CHECK_THROWS(InvalidInput, "without an engine", make_cpu_backend(in, out, {}, 2, 1));
  auto r = runtime();
  Owner owner;
  CHECK_THROWS(InvalidInput, "submitted to a runtime on the CPU", r->submit_device({}, owner, 0, kNever, kNever));
  const Frame good(4);
  CHECK(r->submit(good.read(), 1, kNever, kNever) == Submitted::accepted);  // the slot was given back
  CHECK(r->counters().submitted == 1);
}

}  // namespace

int main() {
  return check::run({{"frames_come_out_whole_and_in_order", frames_come_out_whole_and_in_order},
                     {"copies_keep_to_their_rows", copies_keep_to_their_rows},
                     {"engines_get_the_tensors_of_their_slot", engines_get_the_tensors_of_their_slot},
                     {"an_engines_failure_surfaces_at_the_next_call", an_engines_failure_surfaces_at_the_next_call},
                     {"closing_with_frames_in_flight", closing_with_frames_in_flight},
                     {"closing_at_once", closing_at_once},
                     {"policies_when_the_engine_is_slow", policies_when_the_engine_is_slow},
                     {"deadlines_and_timeouts", deadlines_and_timeouts},
                     {"the_frame_path_allocates_nothing", the_frame_path_allocates_nothing},
                     {"many_threads_submit_and_collect", many_threads_submit_and_collect},
                     {"a_device_frame_is_held_until_it_has_been_read", a_device_frame_is_held_until_it_has_been_read},
                     {"device_frames_that_are_given_up_are_let_go", device_frames_that_are_given_up_are_let_go},
                     {"many_device_frames", many_device_frames},
                     {"refusals", refusals}});
}
