// The native core without Python, for sanitizers: `csrc/tests/build.sh`. Ends with 0, or says what is wrong and aborts.
#include <cstdio>

#include "checks.h"

int main() {
  test_copies();
  test_planes();
  test_codecs();
  test_writer();
  std::puts("native core: all checks hold");
  return 0;
}
