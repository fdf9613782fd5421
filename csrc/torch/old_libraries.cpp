// What torch's headers use of libraries that are newer than those of manylinux_2_28 (glibc 2.28,
// libstdc++ of GCC 8), so that a build with newer ones loads beside the old ones, too.

#include <sstream>

// Messages of its checks are written with these; GCC 12's C++20 has members that GCC 8's lacks.
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

extern "C" {
// std::shared_ptr asks glibc 2.32 and newer whether the process has one thread, and counts without
// atomic instructions then. With a variable of our own it always counts with them.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
