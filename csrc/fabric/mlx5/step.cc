// Names and remedies of the set-up's steps.

#include "step.h"

#include <stdexcept>

namespace epcomm::fabric::devx {

namespace {

struct Words {
    const char* name;
    const char* remedy;
};

constexpr Words kWords[] = {
#define EPCOMM_DEVX_WORDS(enumerator, name, remedy) {name, remedy},
    EPCOMM_DEVX_STEPS(EPCOMM_DEVX_WORDS)
#undef EPCOMM_DEVX_WORDS
};

}  // namespace

const char* name_of(Step step) { return kWords[size_t(step)].name; }

const char* remedy_of(Step step) { return kWords[size_t(step)].remedy; }

void fail(Step step, const std::string& where, const std::string& why) {
    throw std::runtime_error("ibgda: " + std::string(name_of(step)) + " failed on " + where + ": " +
                             why + "; " + remedy_of(step));
}

}  // namespace epcomm::fabric::devx
