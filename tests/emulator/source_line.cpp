#include "source_line.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <vector>

namespace nf {
namespace emulator {
namespace {

// Pairs of function and file:line, innermost first. Needs binutils' addr2line, which comes with g++.
std::vector<std::string> look_up(uintptr_t address) {
  Dl_info info;
  std::vector<std::string> lines;
  if (!dladdr(reinterpret_cast<void*>(address), &info) || !info.dli_fname) return lines;
  char command[4096];
  std::snprintf(command, sizeof command, "env -u LD_PRELOAD addr2line -C -f -i -e '%s' 0x%zx 2>/dev/null",
                info.dli_fname, static_cast<size_t>(address - reinterpret_cast<uintptr_t>(info.dli_fbase)));
  FILE* pipe = popen(command, "r");
  if (!pipe) return lines;
  std::string line;
  for (int c; (c = std::fgetc(pipe)) != EOF;) {
    if (c != '\n') {
      line += static_cast<char>(c);
      continue;
    }
    lines.push_back(line);
    line.clear();
  }
  pclose(pipe);
  return lines;
}

}  // namespace

// "void nf::cuda::(anonymous namespace)::add<(nf::DType)0>(float*)" is add<(nf::DType)0>.
std::string function_name(const void* function) {
  const auto lines = look_up(reinterpret_cast<uintptr_t>(function));
  if (lines.empty()) return "(unknown)";
  std::string name = lines.front();
  if (!name.empty() && name.back() == ')') {
    int depth = 0;
    size_t parameters = name.size();
    do {
      --parameters;
      depth += name[parameters] == ')' ? 1 : name[parameters] == '(' ? -1 : 0;
    } while (parameters > 0 && depth > 0);
    name = name.substr(0, parameters);
  }
  const std::string hidden = "(anonymous namespace)::";
  const size_t arguments = name.find('<');  // of a template: they may be hidden as well
  const size_t prefix = name.rfind(hidden, arguments);
  return prefix == std::string::npos ? name : name.substr(prefix + hidden.size());
}

std::string source_line(const void* return_address) {
  const auto lines = look_up(reinterpret_cast<uintptr_t>(return_address) - 1);
  for (size_t i = 1; i < lines.size(); i += 2) {
    const std::string& place = lines[i];
    if (place.find("emulator.h:") != std::string::npos || place.find("device.h:") != std::string::npos) continue;
    const size_t slash = place.rfind('/');
    const std::string file = slash == std::string::npos ? place : place.substr(slash + 1);
    return "in " + file.substr(0, file.find(' '));  // without "(discriminator 3)"
  }
  return "in an unknown line";
}

}  // namespace emulator
}  // namespace nf
