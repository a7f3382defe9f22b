// What the test programs need: conditions that say where they failed, and tests that are run by name.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

namespace check {

// Stays on in release builds, unlike assert.
#define CHECK(condition) \
  if (!(condition)) check::failed(__FILE__, __LINE__, #condition)

// The call throws `type`, with `text` in its message.
#define CHECK_THROWS(type, text, ...)                                                                \
  do {                                                                                               \
    std::string message;                                                                             \
    try {                                                                                            \
      __VA_ARGS__;                                                                                   \
      check::failed(__FILE__, __LINE__, "nothing was thrown by " #__VA_ARGS__);                      \
    } catch (const type& error) {                                                                    \
      message = error.what();                                                                        \
    }                                                                                                \
    if (message.find(text) == std::string::npos) check::failed(__FILE__, __LINE__, message.c_str()); \
  } while (false)

[[noreturn]] inline void failed(const char* file, int line, const char* what) {
  std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
  std::exit(1);
}

struct Test {
  const char* name;
  void (*run)();
};

template <std::size_t N>
int run(const Test (&tests)[N]) {
  for (const Test& test : tests) {
    try {
      test.run();
    } catch (const std::exception& error) {
      failed(test.name, 0, error.what());
    }
    std::printf("ok %s\n", test.name);
  }
  return 0;
}

}  // namespace check
