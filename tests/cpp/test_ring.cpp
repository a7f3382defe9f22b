// The ring's promises: order, policies, deadlines, and that every frame is accounted for whatever happens.
#include <atomic>
#include <thread>
#include <vector>

#include "check.hpp"
#include "ring.hpp"

using namespace fastpix2pix;
using std::chrono::milliseconds;

namespace {

Time now() { return Clock::now(); }
Time soon() { return now() + milliseconds(5); }

void check_sum(Ring& ring) {
  const Counters n = ring.counters();
  CHECK(n.submitted == n.collected + n.dropped_oldest + n.dropped_newest + n.late + n.failed + n.abandoned + n.pending);
}

int put(Ring& ring, std::int64_t tag, Time deadline = kNever) {
  const Ring::Acquired got = ring.acquire(kNever);
  CHECK(got.taken == Ring::Taken::slot);
  ring.publish(got.slot, tag, deadline);
  return got.slot;
}

// One frame through both stages, as the runtime's threads would do it.
void work(Ring& ring) {
  const int slot = ring.next_to_launch();
  ring.launched(slot);
  CHECK(ring.next_to_finish() == slot);
  ring.finished(slot);
}

std::int64_t get(Ring& ring) {
  const auto result = ring.take(now());
  CHECK(result.has_value());
  ring.release(result->slot);
  return result->tag;
}

void frames_come_out_in_order() {
  Ring ring(3, Policy::block, 2);
  for (std::int64_t tag = 0; tag < 10; ++tag) {
    put(ring, tag);
    put(ring, 100 + tag);
    work(ring);
    work(ring);
    CHECK(get(ring) == tag && get(ring) == 100 + tag);
    check_sum(ring);
  }
  CHECK(!ring.take(now()));
}

void block_waits_for_a_slot() {
  Ring ring(2, Policy::block, 1);
  put(ring, 0);
  put(ring, 1);
  CHECK(ring.acquire(soon()).taken == Ring::Taken::timed_out);
  CHECK(ring.counters().submitted == 2);
  std::thread collector([&] {
    work(ring);
    CHECK(get(ring) == 0);
  });
  put(ring, 2);  // waits until the collector has released a slot
  collector.join();
  check_sum(ring);
}

void drop_newest_refuses() {
  Ring ring(2, Policy::drop_newest, 1);
  put(ring, 0);
  put(ring, 1);
  for (int i = 0; i < 5; ++i) CHECK(ring.acquire(kNever).taken == Ring::Taken::refused);
  work(ring);
  CHECK(get(ring) == 0);
  put(ring, 2);
  const Counters n = ring.counters();
  CHECK(n.submitted == 8 && n.dropped_newest == 5 && n.collected == 1 && n.pending == 2);
}

void drop_oldest_gives_up_what_nobody_works_on() {
  Ring ring(3, Policy::drop_oldest, 2);
  put(ring, 0);
  const int launched = ring.next_to_launch();
  ring.launched(launched);
  put(ring, 1);
  put(ring, 2);
  CHECK(put(ring, 3) != launched);  // 1 went
  CHECK(ring.next_to_finish() == launched);
  ring.finished(launched);
  put(ring, 4);  // 0 went, done but not collected
  const Counters n = ring.counters();
  CHECK(n.dropped_oldest == 2 && n.pending == 3 && n.submitted == 5);
  check_sum(ring);
}

void drop_oldest_waits_while_all_are_in_work() {
  Ring ring(2, Policy::drop_oldest, 2);
  put(ring, 0);
  put(ring, 1);
  const int first = ring.next_to_launch(), second = ring.next_to_launch();
  CHECK(ring.acquire(soon()).taken == Ring::Taken::timed_out);
  ring.launched(first);
  ring.launched(second);
  CHECK(ring.acquire(soon()).taken == Ring::Taken::timed_out);
  CHECK(ring.counters().dropped_oldest == 0);
}

void late_frames_are_not_begun() {
  Ring ring(4, Policy::block, 1);
  put(ring, 0, now() - milliseconds(1));
  put(ring, 1, now() + std::chrono::hours(1));
  put(ring, 2, now() - milliseconds(1));
  put(ring, 3);
  work(ring);
  work(ring);
  CHECK(get(ring) == 1 && get(ring) == 3);
  CHECK(ring.counters().late == 2);
  check_sum(ring);
}

void depth_limits_what_is_in_work() {
  Ring ring(4, Policy::block, 2);
  for (std::int64_t tag = 0; tag < 3; ++tag) put(ring, tag);
  const int first = ring.next_to_launch();
  ring.launched(first);
  ring.launched(ring.next_to_launch());
  std::atomic<bool> third{false};
  std::thread launcher([&] {
    ring.launched(ring.next_to_launch());
    third = true;
  });
  std::this_thread::sleep_for(milliseconds(5));
  CHECK(!third);
  CHECK(ring.next_to_finish() == first);
  ring.finished(first);
  launcher.join();
}

void finish_lets_the_rest_out() {
  Ring ring(2, Policy::block, 1);
  put(ring, 7);
  ring.finish();
  CHECK_THROWS(InvalidInput, "submit after finish", ring.acquire(kNever));
  CHECK(!ring.drained());
  work(ring);
  CHECK(ring.take(kNever)->tag == 7);
  CHECK(!ring.drained());  // it is being read
  ring.release(0);
  CHECK(ring.drained() && !ring.take(kNever));
}

// Whoever collects waits for a frame that is being filled while the end is announced.
void finish_waits_for_a_frame_being_filled() {
  Ring ring(2, Policy::block, 1);
  const Ring::Acquired got = ring.acquire(kNever);
  ring.finish();
  CHECK(!ring.drained());
  ring.publish(got.slot, 5, kNever);
  work(ring);
  CHECK(get(ring) == 5 && ring.drained());
}

void finish_with_a_frame_that_could_not_be_filled() {
  Ring ring(2, Policy::block, 1);
  const Ring::Acquired got = ring.acquire(kNever);
  ring.finish();
  std::thread filler([&] { ring.give_back(got.slot); });
  CHECK(!ring.take(kNever));
  filler.join();
  CHECK(ring.counters().submitted == 0);
}

void stop_ends_every_wait() {
  for (const Policy policy : {Policy::block, Policy::drop_oldest}) {
    Ring ring(2, policy, 2);
    std::thread collector([&] { CHECK_THROWS(Failed, "the frame runtime is closed", ring.take(kNever)); });
    put(ring, 0);
    put(ring, 1);
    const int first = ring.next_to_launch(), second = ring.next_to_launch();
    std::thread submitter([&] { CHECK_THROWS(Failed, "the frame runtime is closed", ring.acquire(kNever)); });
    std::thread finisher([&] {
      int slot;
      while ((slot = ring.next_to_finish()) >= 0) ring.finished(slot);
    });
    std::this_thread::sleep_for(milliseconds(2));
    ring.stop();
    ring.launched(first);  // both were being launched when the ring stopped
    ring.launched(second);
    CHECK(ring.next_to_launch() == -1);
    for (std::thread* thread : {&collector, &submitter, &finisher}) thread->join();
    CHECK(ring.counters().abandoned == 2 && ring.counters().pending == 0);
    check_sum(ring);
  }
}

void a_failure_is_raised_by_every_call() {
  Ring ring(3, Policy::block, 2);
  put(ring, 0);
  put(ring, 1);
  put(ring, 2);
  const int first = ring.next_to_launch(), second = ring.next_to_launch();
  ring.launched(first);
  ring.fail(second, "the second went wrong");
  ring.fail(first, "and so did the first");
  CHECK(ring.next_to_launch() == -1 && ring.next_to_finish() == -1);
  CHECK_THROWS(Failed, "the second went wrong", ring.acquire(kNever));
  CHECK_THROWS(Failed, "the second went wrong", ring.take(kNever));
  const Counters n = ring.counters();
  CHECK(n.failed == 2 && n.abandoned == 1 && n.pending == 0);
  check_sum(ring);
}

void refusals() {
  CHECK_THROWS(InvalidInput, "slots = 1; allowed are 2 to 64", Ring(1, Policy::block, 1));
  CHECK_THROWS(InvalidInput, "slots = 65; allowed are 2 to 64", Ring(65, Policy::block, 1));
  CHECK_THROWS(InvalidInput, "depth = 0; allowed are 1 to slots = 3", Ring(3, Policy::block, 0));
  CHECK_THROWS(InvalidInput, "depth = 4; allowed are 1 to slots = 3", Ring(3, Policy::block, 4));
}

// Submitters and collectors of all kinds at once, both worker threads, and a stop in the middle or at the end.
void many_threads(Policy policy, bool to_the_end) {
  constexpr int kSubmitters = 3, kCollectors = 3, kFrames = 2000;
  Ring ring(4, policy, 2);
  std::vector<std::int64_t> memory(4);  // a slot's frame; the sanitizer sees a slot with two holders
  std::atomic<std::uint64_t> accepted{0}, refused{0}, collected{0};
  std::thread launcher([&] {
    int slot;
    while ((slot = ring.next_to_launch()) >= 0) {
      memory[static_cast<std::size_t>(slot)] += 1;
      ring.launched(slot);
    }
  });
  std::thread finisher([&] {
    int slot;
    while ((slot = ring.next_to_finish()) >= 0) {
      memory[static_cast<std::size_t>(slot)] += 1;
      ring.finished(slot);
    }
  });
  std::vector<std::thread> submitters, collectors;
  for (int i = 0; i < kSubmitters; ++i) {
    submitters.emplace_back([&, i] {
      try {
        for (std::int64_t k = 0; k < kFrames;) {
          const Ring::Acquired got = ring.acquire(k % 3 ? kNever : now() + std::chrono::microseconds(50));
          if (got.taken == Ring::Taken::timed_out) continue;
          if (got.taken == Ring::Taken::refused) {
            ++refused;
          } else {
            const std::int64_t tag = k * kSubmitters + i;
            memory[static_cast<std::size_t>(got.slot)] = tag;
            ring.publish(got.slot, tag, k % 7 ? kNever : now() + std::chrono::microseconds(20));
            ++accepted;
          }
          ++k;
        }
      } catch (const Failed&) {  // stopped
      }
    });
  }
  for (int i = 0; i < kCollectors; ++i) {
    collectors.emplace_back([&, i] {
      std::vector<std::int64_t> last(kSubmitters, -1);
      try {
        while (true) {
          const auto result = ring.take(i == 0 ? now() + std::chrono::microseconds(50) : kNever);
          if (!result && ring.drained()) return;
          if (!result) continue;
          CHECK(memory[static_cast<std::size_t>(result->slot)] == result->tag + 2);
          std::int64_t& before = last[static_cast<std::size_t>(result->tag % kSubmitters)];
          CHECK(result->tag > before);  // what one thread submits comes in order
          before = result->tag;
          ring.release(result->slot);
          ++collected;
        }
      } catch (const Failed&) {
      }
    });
  }
  if (!to_the_end) {
    while (ring.counters().submitted < kFrames) std::this_thread::yield();
    ring.stop();
  }
  for (std::thread& thread : submitters) thread.join();
  ring.finish();
  for (std::thread& thread : collectors) thread.join();
  ring.stop();
  launcher.join();
  finisher.join();
  const Counters n = ring.counters();
  check_sum(ring);
  CHECK(n.pending == 0 && n.failed == 0);
  CHECK(n.submitted == accepted + refused && n.collected == collected && n.dropped_newest == refused);
  if (to_the_end) CHECK(n.abandoned == 0 && n.submitted == kSubmitters * kFrames);
  if (policy == Policy::block) CHECK(n.dropped_oldest == 0 && n.dropped_newest == 0);
}

void many_threads_to_the_end() {
  for (const Policy policy : {Policy::block, Policy::drop_oldest, Policy::drop_newest}) many_threads(policy, true);
}

void many_threads_stopped() {
  for (const Policy policy : {Policy::block, Policy::drop_oldest, Policy::drop_newest}) many_threads(policy, false);
}

}  // namespace

int main() {
  return check::run({{"frames_come_out_in_order", frames_come_out_in_order},
                     {"block_waits_for_a_slot", block_waits_for_a_slot},
                     {"drop_newest_refuses", drop_newest_refuses},
                     {"drop_oldest_gives_up_what_nobody_works_on", drop_oldest_gives_up_what_nobody_works_on},
                     {"drop_oldest_waits_while_all_are_in_work", drop_oldest_waits_while_all_are_in_work},
                     {"late_frames_are_not_begun", late_frames_are_not_begun},
                     {"depth_limits_what_is_in_work", depth_limits_what_is_in_work},
                     {"finish_lets_the_rest_out", finish_lets_the_rest_out},
                     {"finish_waits_for_a_frame_being_filled", finish_waits_for_a_frame_being_filled},
                     {"finish_with_a_frame_that_could_not_be_filled", finish_with_a_frame_that_could_not_be_filled},
                     {"stop_ends_every_wait", stop_ends_every_wait},
                     {"a_failure_is_raised_by_every_call", a_failure_is_raised_by_every_call},
                     {"refusals", refusals},
                     {"many_threads_to_the_end", many_threads_to_the_end},
                     {"many_threads_stopped", many_threads_stopped}});
}
