// Where an instruction of this module comes from, for error messages.
#pragma once

#include <string>

namespace nf {
namespace emulator {

std::string function_name(const void* function);
std::string source_line(const void* return_address);  // "in <file>:<line>"

}  // namespace emulator
}  // namespace nf
